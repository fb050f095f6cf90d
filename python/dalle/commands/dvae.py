"""`dalle dvae train` and `dalle dvae reconstruct`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from dalle import pictures
from dalle.commands import presets
from dalle.commands.fits import require_dvae_fits
from dalle.commands.notes import cluster_notes, dvae_notes, loop_notes
from dalle.commands.report import banner, end_block, next_command
from dalle.commands.training import check_model_target, keep_options, require_recipe_of_run
from dalle.configs import did_you_mean
from dalle.console import is_main_process, printable
from dalle.data.augment import center_crop, to_tensor
from dalle.data.codes import require_pictures
from dalle.data.folder import find_pictures
from dalle.data.images import decode, read_bytes
from dalle.data.pairs import (
    MAX_NAMED,
    Pairs,
    format_counts,
    input_files,
    left_out,
    load_or_skip,
)
from dalle.data.sources import BUILT_IN, built_in_of, is_picture_folder, load_pairs
from dalle.devices import pick_device
from dalle.distributed.config import ClusterConfig
from dalle.distributed.parallelize import parallelize
from dalle.distributed.world import join, shared_options
from dalle.dvae.codebook import codebook_health
from dalle.dvae.likelihood import psnr, set_psnr
from dalle.dvae.model import PRESETS, DiscreteVAE, DiscreteVAEConfig
from dalle.dvae.picture_size import DEFAULT_SIDE, side_for, trained_size
from dalle.dvae.straight_through import codebook_parameters, feature_width, freeze_codebook
from dalle.errors import DataError, UsageError
from dalle.files import check_not_input, check_targets
from dalle.memory import require_memory
from dalle.recipes import DVAE_RECIPES, scaled
from dalle.train.config import LoopConfig
from dalle.train.dvae import (
    COLLAPSED,
    RELAXATION_OPTIONS,
    VECTOR_OPTIONS,
    DvaeTask,
    DvaeTrainConfig,
)
from dalle.train.fine_tune import (
    LR_SHARE,
    FineTuneConfig,
    freeze,
    load_start,
    say_sizes_stay,
    start_from,
)
from dalle.train.held_out import held_out_pictures, save_better
from dalle.train.loop import train as run_loop
from dalle.train.seeds import start_seed

PAPER_STEPS = 3_000_000
METHODS = ("autoencode", "vector_quantized")  # of the model, that run it

if TYPE_CHECKING:
    DvaeOptions = DvaeTrainConfig
else:
    DvaeOptions = presets.overrides(DvaeTrainConfig, "image_size", "batch_size")


@dataclass(frozen=True, kw_only=True)
class DvaeCommandConfig:
    """Trains a discrete VAE; the weights go to OUT/model: the averaged or the last ones, whichever
    are better on the held-out part.

    Args:
        data: shapes, emoji, a folder of pictures with captions (which are not used) or of tar
            shards, or a table (docs/data.md); several by weights: --data a=0.7 --data b=0.3.
        preset: tiny, small, base or paper; shapes or emoji with the sizes and the recipe of the
            demo.
        recipe: quick (a warm start, a codebook of k-means, schedules that fit the run) or paper.
            Left out, quick for tiny and small on one process, paper else.
        image_size: side in pixels; 0 takes the preset's, or the median picture's if that is less.
        batch_size: pictures an update; 0 takes the recipe's (512 in the paper).
        vocab_size: codes; 0 takes the preset's, or with quick as many as the pictures can fill.
        validation: share of the pictures held out for scores, by their hashes; 0 for none. Left
            out, 0.1 with quick and 0 with paper.
        precision: of the products in the forward and backward pass: fp32, bf16, or auto, which is
            bf16 on a GPU. Weights are fp32, and so are tokens and scores.
        device: cpu, cuda or auto.
        loop: folder, updates (800 with quick and tiny, 3,000,000 in the paper), checkpoints,
            seed.
        training: the training; what is left out is the recipe's.
        start: a saved model to start from, and what stays frozen.
        cluster: how the processes of torchrun work together.
    """

    data: str
    preset: str = "tiny"
    recipe: presets.Recipe | None = None
    image_size: int = 0
    batch_size: int = 0
    vocab_size: int = 0
    validation: float | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    loop: LoopConfig = field(default_factory=partial(LoopConfig, out=Path("run/dvae"), steps=0))
    training: DvaeOptions = field(default_factory=DvaeOptions)
    start: FineTuneConfig = field(default_factory=FineTuneConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """Sends pictures through the tokens and back, beside each other in one PNG.

    Args:
        data: a folder of pictures, shapes or emoji.
        model: model folder of `dalle dvae train`.
        out: the PNG to write.
        image_size: side in pixels the pictures are cropped to; 0 takes that of the dVAE's training;
            where it is not known, the demo's for shapes and emoji, else 256, and a line says so.
        split: of shapes and emoji.
        limit: how many pictures.
        columns: pairs a row of the PNG.
        device: cpu, cuda or auto.
    """

    data: str
    model: Path = Path("run/dvae/model")
    out: Path = Path("run/reconstructions.png")
    image_size: int = 0
    split: str = "train"
    limit: int = 64
    columns: int = 4
    device: str = "auto"


class Plan(NamedTuple):
    """What `dalle dvae train` makes of its options and the data."""

    config: DvaeCommandConfig  # with every value filled in
    model: DiscreteVAEConfig
    train: DvaeTrainConfig
    pairs: Pairs
    validation: Pairs | None
    saved: DiscreteVAE | None  # to start from


def plan(config: DvaeCommandConfig, processes: int) -> Plan:
    """Opens the data and chooses what is left open.

    Raises:
        UsageError: options that do not fit each other.
        DataError: no usable data.
    """
    owner, preset, loop = "dvae train", config.preset, config.loop
    refuse_other_quantizer(config.training)
    built_in, saved = DVAE_RECIPES.get(preset), None
    if config.start.init_from is not None:
        saved = load_start(DiscreteVAE, config.start.init_from)
        of_saved = trained_size(saved, config.start.init_from)
        config = replace(config, image_size=config.image_size or of_saved)
    recipe: presets.Recipe = "quick"
    if not built_in:
        recipe = presets.chosen_recipe(owner, config.recipe, preset, processes)
    if built_in and config.recipe == "paper":
        raise UsageError(f"dvae train: recipe must be quick for preset {preset}, got paper")
    require_recipe_of_run(owner, recipe, loop, processes)
    if built_in:
        side = built_in.image_size
    else:
        quick_side = presets.QUICK_SIZES[preset].side
        side = quick_side if recipe == "quick" else presets.paper_side(preset)
    pairs = presets.open_pairs(config.data, config.image_size, side, loop.seed)
    require_pictures(owner, pairs)
    size = config.image_size
    if not size and (built_in or built_in_of(config.data)):
        size = side if built_in else pairs.image_size
    elif not size and recipe == "quick":
        size = presets.quick_size(preset, pairs)
    elif not size:
        size = presets.fitting_size(side, pairs, PRESETS[preset].factor)
    pairs, validation, share = presets.split_pairs(
        owner, config.data, pairs, config.validation, recipe, size, loop.seed
    )
    changes = presets.given(config.training) | {"image_size": size}
    if config.batch_size:
        changes["batch_size"] = config.batch_size
    if built_in:
        steps = loop.steps or built_in.steps
        scaled_train = scaled(built_in.train, steps / built_in.steps)
        model, base = built_in.model, replace(scaled_train, image_size=size)
    elif recipe == "quick":
        steps = loop.steps or presets.QUICK_SIZES[preset].dvae_steps
        warm = changes.get("warm_start_steps")
        made = presets.quick_model(owner, preset, size, len(pairs), config.vocab_size, steps, warm)
        left = max(1, steps - made.train.warm_start_steps)
        model, base = made.model, replace(made.train, health_every=min(100, max(1, left // 4)))
    else:
        steps = loop.steps or PAPER_STEPS
        model, base = PRESETS[preset], DvaeTrainConfig()
    if config.vocab_size:
        model = replace(model, vocab_size=config.vocab_size)
    straight_through = config.training.quantizer == "straight-through"
    if straight_through:
        model = replace(model, n_init=feature_width(model))
    if saved is not None:
        if config.vocab_size not in (0, saved.num_tokens):
            want = f"the {saved.num_tokens} of {config.start.init_from}"
            raise UsageError(f"dvae train: vocab_size must be {want}, got {config.vocab_size}")
        say_sizes_stay(owner, preset, model, saved.config)
        model, base = saved.config, of_fine_tuning(base)
    train_config = replace(base, **(presets.one_process_only(recipe, processes) | changes))
    if steps <= train_config.warm_start_steps:
        raise UsageError(
            f"dvae train: steps must be more than the {train_config.warm_start_steps} of the warm "
            f"start, got {steps}"
        )
    resolved = replace(
        config,
        recipe=recipe,
        image_size=size,
        batch_size=train_config.batch_size,
        vocab_size=model.vocab_size,
        validation=share,
        loop=presets.length(loop, steps, validation is not None),
        training=without_other_quantizer(presets.filled(config.training, train_config)),
    )
    return Plan(resolved, model, train_config, pairs, validation, saved)


def other_options(quantizer: str | None) -> tuple[str, ...]:
    """Options that have no effect with a quantizer."""
    return RELAXATION_OPTIONS if quantizer == "straight-through" else VECTOR_OPTIONS[1:]


def refuse_other_quantizer(options: DvaeOptions) -> None:
    """Raises UsageError for an option that has no effect with the quantizer."""
    for name in other_options(options.quantizer):
        value = getattr(options, name)
        if value is not None:
            quantizer = options.quantizer or "gumbel"
            raise UsageError(
                f"dvae train: {name} must be left out with quantizer {quantizer}, on which it has "
                f"no effect, got {value}"
            )


def without_other_quantizer(options: DvaeOptions) -> DvaeOptions:
    """The options that `refuse_other_quantizer` takes again, from a file too."""
    changes: dict[str, Any] = dict.fromkeys(other_options(options.quantizer))
    return replace(options, **changes)


def codebook_is_free(vae: DiscreteVAE) -> None:
    """Raises UsageError where `--freeze` holds what the moving averages change."""
    for name, parameter in codebook_parameters(vae).items():
        if not parameter.requires_grad:
            raise UsageError(
                f"dvae train: freeze must leave the codebook free with quantizer straight-through, "
                f"got a pattern of {name}"
            )


def of_fine_tuning(recipe: DvaeTrainConfig) -> DvaeTrainConfig:
    """A recipe for weights that are good already: a quarter of its step sizes, the temperature and
    the KL weight that it ends with, no warm start."""
    changes: dict[str, Any] = {"tau_steps": 0, "kl_steps": 0, "warm_start_steps": 0}
    changes |= {name: LR_SHARE * getattr(recipe, name) for name in ("lr_start", "lr_end")}
    return replace(recipe, **changes)


def train(config: DvaeCommandConfig) -> None:
    """Trains, saves the better weights, and says how good they are, where, and what is next."""
    choices = [*PRESETS, *DVAE_RECIPES]
    if config.preset not in choices:
        names, hint = ", ".join(choices), did_you_mean(config.preset, choices)
        raise UsageError(f"dvae train: preset must be one of {names}, got {config.preset!r}{hint}")
    owner, out = "dvae train", config.loop.out
    device = pick_device(config.device, deterministic=config.loop.deterministic)
    with join(config.cluster, device, shared_options(config)) as world:
        with world.raise_on_all():
            check_model_target(owner, out / "model", DiscreteVAE)
            made = plan(config, world.size)
        sizes = made.train.image_size, made.train.batch_size
        if world.size == 1:
            require_dvae_fits(owner, made.model, *sizes, world.device)
        resolved, loop = made.config, made.config.loop
        torch.manual_seed(start_seed(loop.seed, "dvae"))
        vae, start = DiscreteVAE(made.model), []
        with world.raise_on_all():
            if made.saved is not None:
                start = start_from(owner, vae, made.saved, config.start)
            start += freeze(owner, vae, config.start.freeze)
            if made.train.quantizer == "straight-through":
                codebook_is_free(vae)
                freeze_codebook(vae)
                start.append("nearest codes with straight-through gradients")
        vae.train_precision = presets.precision(config.precision, world.device)
        parameters = sum(p.numel() for p in vae.parameters())
        parallelize(vae, world, vae.resblocks(), owner=owner, forwards=METHODS)
        task = DvaeTask(
            vae,
            made.pairs,
            made.train,
            seed=loop.seed,
            world=world,
            validation=made.validation,
            workers=loop.workers,
        )
        rows, columns = vae.grid(made.train.image_size)
        banner(
            owner,
            made.pairs,
            made.validation,
            recipe=str(resolved.recipe),
            image_size=sizes[0],
            batch_size=made.train.total_batch,
            loop=loop,
            parameters=parameters,
            device=world.device,
            precision=vae.train_precision,
            enlarges=made.train.augment == "none",
            more=[
                f"{rows} x {columns} tokens a picture, {made.model.vocab_size:,} codes",
                *start,
            ],
            notes=[
                *dvae_notes(config.training, made.train, loop.steps),
                *loop_notes(config.loop, made.validation is not None),
                *cluster_notes(config.cluster, world.size),
            ],
        )
        result = run_loop(task, loop, begun=keep_options(owner, resolved, out))
        save_better(owner, task, out / "model", result.step)
    if is_main_process():
        end_block(
            owner,
            result,
            out / "model",
            left_out(made.pairs),
            [*saved_scores(made, out, world.device)],
            next_command(config.data, config.preset, out.parent, dvae=out / "model"),
        )


@torch.no_grad()
def saved_scores(made: Plan, out: Path, device: torch.device) -> Iterator[str]:
    """Lines on the model in OUT/model: its reconstructions, its codes, whether they collapsed.

    Draws pictures, training ones above held-out ones, each beside its reconstruction, as
    OUT/pictures/saved.png.
    """
    vae = DiscreteVAE.from_pretrained(out / "model").to(device).eval()
    size = made.train.image_size
    counts = torch.zeros(vae.num_tokens, dtype=torch.int64, device="cpu")
    shown, values = [], {}
    for name, pairs in (("training", made.pairs), ("held-out", made.validation)):
        if pairs is None:
            continue
        images = to_tensor(held_out_pictures(pairs, size)[0])
        decoded, tokens = vae.reconstruct(images)
        counts += torch.bincount(tokens.flatten(), minlength=vae.num_tokens)
        values[name] = set_psnr(images, decoded), len(images)
        shown.append(pictures.beside([images[:16], decoded[:16]]))
    for name, (value, count) in values.items():
        yield f"PSNR {value:.2f} dB on {count} {name} pictures"
    health = codebook_health(counts)
    yield f"{health.in_words()} of these pictures"
    if health.collapsed(int(counts.sum())):
        yield COLLAPSED.format(words=health.in_words())
    if not made.config.loop.picture_every:
        return
    sheet = pictures.grid(torch.cat(shown), columns=8, scale=pictures.default_scale(size))
    yield f"picture: {pictures.save_png(out / 'pictures' / 'saved.png', sheet)}"


def load_pictures(config: ReconstructConfig, size: int) -> torch.Tensor:
    """(N, 3, size, size) in [0, 1]; a folder needs no captions.

    Raises:
        DataError: nothing there that decodes.
    """
    if not is_picture_folder(config.data):
        pairs = load_pairs(config.data, image_size=size, split=config.split)
        check_not_input("dvae reconstruct", config.out, input_files(pairs))
        loaded, _ = load_or_skip(
            pairs, range(len(pairs)), lambda image, _: center_crop(image, size), limit=config.limit
        )
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
    built_in = DVAE_RECIPES.get((built_in_of(config.data) or ("",))[0])
    size = side_for(
        "dvae reconstruct",
        vae,
        config.model,
        asked=config.image_size,
        otherwise=built_in.image_size if built_in else DEFAULT_SIDE,
    )
    needed = 4 * 3 * 3 * size**2 * config.limit  # pictures, reconstructions, sheet
    require_memory(
        "dvae reconstruct",
        needed,
        f"{config.limit} pictures of {size} pixels",
        "take a smaller --limit or --image-size",
    )
    if is_picture_folder(config.data):
        check_not_input("dvae reconstruct", config.out, find_pictures(Path(config.data)))
    pictures.check_sheet("dvae reconstruct", 2 * config.limit, size, pictures.default_scale(size))
    images = load_pictures(config, size)
    reconstructions, tokens = vae.reconstruct(images)
    sheet = pictures.grid(
        pictures.beside([images, reconstructions]),
        columns=2 * config.columns,
        scale=pictures.default_scale(size),
    )
    pictures.save_png(config.out, sheet)
    values = psnr(images, reconstructions)
    health = codebook_health(torch.bincount(tokens.flatten(), minlength=vae.num_tokens))
    print(
        f"{len(images)} pictures: PSNR {float(values.mean()):.2f} dB "
        f"({float(values.min()):.2f} .. {float(values.max()):.2f}), {health.in_words()}: "
        f"{config.out}"
    )
