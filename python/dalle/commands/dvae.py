"""`dalle dvae train` and `dalle dvae reconstruct`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dalle import pictures
from dalle.commands.fits import require_dvae_fits
from dalle.commands.training import check_model_target, keep_options, save_model
from dalle.configs import did_you_mean
from dalle.console import is_main_process, printable
from dalle.data.augment import center_crop, to_tensor
from dalle.data.folder import find_pictures
from dalle.data.images import decode, read_bytes
from dalle.data.pairs import MAX_NAMED, format_counts, left_out, load_or_skip
from dalle.data.sources import BUILT_IN, is_picture_folder, load_pairs
from dalle.devices import pick_device
from dalle.distributed.config import ClusterConfig
from dalle.distributed.parallelize import parallelize
from dalle.distributed.world import join, shared_options
from dalle.dvae.codebook import codebook_health
from dalle.dvae.likelihood import psnr
from dalle.dvae.model import PRESETS, DiscreteVAE
from dalle.errors import DataError, UsageError
from dalle.files import check_not_input, check_targets
from dalle.memory import require_memory
from dalle.recipes import DVAE_RECIPES
from dalle.train.config import LoopConfig
from dalle.train.dvae import DvaeTask, DvaeTrainConfig
from dalle.train.loop import train as run_loop
from dalle.train.seeds import start_seed


@dataclass(frozen=True, kw_only=True)
class DvaeCommandConfig:
    """Trains a discrete VAE; the weights go to OUT/model, averaged over the iterates.

    Args:
        data: shapes, emoji, or a folder of pictures with captions (which are not used).
        preset: tiny, small, base or paper with the paper's training; shapes or emoji with
            the recipe of the demo.
        image_size: side in pixels; 0 takes the recipe's (256 for the paper's training).
        batch_size: pictures an update; 0 takes the recipe's (512 in the paper).
        device: cpu, cuda or auto.
        loop: folder, updates (3,000,000 in the paper), checkpoints, seed.
        cluster: how the processes of torchrun work together.
    """

    data: str
    preset: str = "base"
    image_size: int = 0
    batch_size: int = 0
    device: str = "auto"
    loop: LoopConfig = field(default_factory=partial(LoopConfig, out=Path("out/dvae"), steps=0))
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """Sends pictures through the tokens and back, beside each other in one PNG.

    Args:
        data: a folder of pictures, shapes or emoji.
        model: folder of a discrete VAE.
        out: the PNG to write.
        image_size: side in pixels the pictures are cropped to; 0 takes the nearest size the
            model can cut into tokens: the demo's for shapes and emoji, else 256.
        split: of shapes and emoji.
        limit: how many pictures.
        columns: pairs a row of the PNG.
        device: cpu, cuda or auto.
    """

    data: str
    model: Path = Path("out/dvae/model")
    out: Path = Path("out/reconstructions.png")
    image_size: int = 0
    split: str = "train"
    limit: int = 64
    columns: int = 4
    device: str = "auto"


def train(config: DvaeCommandConfig) -> None:
    """Trains, saves the averaged weights, and says where they are."""
    choices = [*PRESETS, *DVAE_RECIPES]
    if config.preset not in choices:
        names, hint = ", ".join(choices), did_you_mean(config.preset, choices)
        raise UsageError(f"dvae train: preset must be one of {names}, got {config.preset!r}{hint}")
    if config.preset in DVAE_RECIPES:
        recipe = DVAE_RECIPES[config.preset]
        model_config, train_config, steps = recipe.model, recipe.train, recipe.steps
    else:
        model_config, train_config, steps = PRESETS[config.preset], DvaeTrainConfig(), 3_000_000
    train_config = replace(
        train_config,
        image_size=config.image_size or train_config.image_size,
        batch_size=config.batch_size or train_config.batch_size,
    )
    loop = replace(config.loop, steps=config.loop.steps or steps)
    folder = loop.out / "model"
    if loop.steps <= train_config.warm_start_steps:
        raise UsageError(
            f"dvae train: steps must be more than the {train_config.warm_start_steps} of the warm "
            f"start, got {loop.steps}"
        )
    with join(config.cluster, pick_device(config.device), shared_options(config)) as world:
        with world.raise_on_all():
            check_model_target("dvae train", folder, DiscreteVAE)
            pairs = load_pairs(config.data, image_size=train_config.image_size, seed=loop.seed)
        if world.size == 1:
            sizes = train_config.image_size, train_config.batch_size
            require_dvae_fits("dvae train", model_config, *sizes, world.device)
        torch.manual_seed(start_seed(loop.seed, "dvae"))
        vae = DiscreteVAE(model_config)
        parallelize(vae, world, vae.resblocks(), owner="dvae train", forwards=["autoencode"])
        task = DvaeTask(vae, pairs, train_config, seed=loop.seed, world=world)
        resolved = replace(
            config,
            image_size=train_config.image_size,
            batch_size=train_config.batch_size,
            loop=loop,
        )
        result = run_loop(task, loop, begun=keep_options("dvae train", resolved, loop.out))
        save_model("dvae train", task, folder)
    if is_main_process():
        print(f"dvae train: {result.step} updates, model in {folder}{left_out(pairs)}")


def load_pictures(config: ReconstructConfig, size: int) -> torch.Tensor:
    """(N, 3, size, size) in [0, 1]; a folder needs no captions.

    Raises:
        DataError: nothing there that decodes.
    """
    if not is_picture_folder(config.data):
        pairs = load_pairs(config.data, image_size=size, split=config.split)
        check_not_input("dvae reconstruct", config.out, getattr(pairs, "paths", ()))
        loaded, _ = load_or_skip(pairs, np.arange(min(config.limit, len(pairs))))
        return to_tensor(loaded)
    folder = Path(config.data)
    files = find_pictures(folder)
    crops: list[np.ndarray] = []
    skipped: Counter[str] = Counter()
    for path in files:
        if len(crops) == config.limit:
            break
        try:
            crops.append(center_crop(decode(read_bytes(path), path), size))
        except DataError as error:
            skipped[getattr(error, "reason", "does not decode")] += 1
            if skipped.total() <= MAX_NAMED:
                print(printable(f"dvae reconstruct: left out: {error}"))
    if skipped:
        print(f"dvae reconstruct: left out {skipped.total()}: {format_counts(skipped)}")
    if not crops:
        raise DataError(
            f"dvae reconstruct: data must be {', '.join(BUILT_IN)} or a folder with pictures, got "
            f"{folder}" + (f" ({format_counts(skipped)})" if skipped else "")
        )
    return to_tensor(crops)


@torch.no_grad()
def reconstruct(config: ReconstructConfig) -> None:
    """Writes the PNG (left the picture, right its reconstruction), prints PSNR and code use."""
    for name in ("limit", "columns"):
        if getattr(config, name) < 1:
            value = getattr(config, name)
            raise UsageError(f"dvae reconstruct: {name} must be at least 1, got {value}")
    check_targets("dvae reconstruct", config.out)
    vae = DiscreteVAE.from_pretrained(config.model).to(pick_device(config.device))
    size = config.image_size
    if not size:
        default_size = DVAE_RECIPES[config.data].image_size if config.data in DVAE_RECIPES else 256
        size = max(1, round(default_size / vae.factor)) * vae.factor
    vae.grid(size)
    needed = 4 * 3 * 3 * size**2 * config.limit  # pictures, reconstructions, sheet
    require_memory(
        "dvae reconstruct",
        needed,
        f"{config.limit} pictures of {size} pixels",
        "take a smaller --limit or --image-size",
    )
    if is_picture_folder(config.data):
        check_not_input("dvae reconstruct", config.out, find_pictures(Path(config.data)))
    pictures.check_sheet("dvae reconstruct", 2 * config.limit, size, max(1, 96 // size))
    images = load_pictures(config, size)
    device = next(vae.parameters()).device
    tokens = torch.cat([vae.encode(part.to(device)) for part in images.split(64)])
    reconstructions = torch.cat([vae.decode(part).cpu() for part in tokens.split(64)])
    sheet = pictures.grid(
        pictures.beside([images, reconstructions]),
        columns=2 * config.columns,
        scale=max(1, 96 // size),
    )
    pictures.save_png(config.out, sheet)
    values = psnr(images, reconstructions)
    health = codebook_health(torch.bincount(tokens.flatten().cpu(), minlength=vae.num_tokens))
    print(
        f"{len(images)} pictures: PSNR {float(values.mean()):.2f} dB "
        f"({float(values.min()):.2f} .. {float(values.max()):.2f}), {health.in_words()}: "
        f"{config.out}"
    )
