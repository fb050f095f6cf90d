"""`dalle prior train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from dalle.commands.fits import require_prior_fits
from dalle.commands.training import check_model_target, keep_options, save_model
from dalle.configs import did_you_mean
from dalle.console import is_main_process, say
from dalle.data.pairs import left_out
from dalle.data.sources import load_pairs
from dalle.devices import pick_device
from dalle.distributed.config import ClusterConfig
from dalle.distributed.parallelize import parallelize
from dalle.distributed.world import World, join, shared_options
from dalle.dvae.model import DiscreteVAE
from dalle.errors import UsageError
from dalle.pretrained import from_presets
from dalle.prior.config import PRESETS
from dalle.prior.model import Prior
from dalle.tokenizer import Tokenizer
from dalle.train.config import LoopConfig
from dalle.train.loop import train
from dalle.train.prior import PriorTask
from dalle.train.prior_recipe import PriorTrainConfig
from dalle.train.seeds import start_seed


@dataclass(frozen=True, kw_only=True)
class PriorCommandConfig:
    """Trains the transformer on captions and the codes of their images; it goes to OUT/model.

    Attributes:
        data: shapes, emoji, or a folder of pictures with .txt captions.
        image_size: side in pixels of the pictures; a multiple of the dVAE's factor.
        tokenizer: folder of `dalle tokenizer train`.
        vae: folder of a trained dVAE.
        preset: tiny, small, base, 1b or 12b; vocabularies and grid come from tokenizer and dVAE.
        text_len: text positions, start-of-text included; 0 is the preset's.
        precision: inside the resblocks; fp16-scaled is the paper's, with a gradient scale for
            each resblock; auto is fp32 on the CPU and fp16-scaled elsewhere.
        half_weights: store the resblocks' matrices in 16 bits too, as the paper did.
        checkpointing: recompute each resblock in the backward pass.
        device: cpu, cuda or auto.
        loop: folder, updates, checkpoints, seed.
        recipe: the training recipe; the defaults are the paper's.
        cluster: how the processes of torchrun work together.
    """

    data: str
    image_size: int
    tokenizer: Path
    vae: Path
    loop: LoopConfig
    preset: str = "tiny"
    text_len: int = 0
    precision: Literal["auto", "fp32", "bf16", "fp16-scaled"] = "auto"
    half_weights: bool = False
    checkpointing: bool = False
    device: str = "auto"
    recipe: PriorTrainConfig = field(default_factory=PriorTrainConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            choices, hint = ", ".join(PRESETS), did_you_mean(self.preset, PRESETS)
            raise UsageError(
                f"prior train: preset must be one of {choices}, got {self.preset!r}{hint}"
            )


def train_command(config: PriorCommandConfig) -> None:
    """Trains, saves the averaged weights, and says where."""
    with join(config.cluster, pick_device(config.device), shared_options(config)) as world:
        _train(config, world)


def _new_prior(
    config: PriorCommandConfig, tokenizer: Tokenizer, vae: DiscreteVAE, world: World
) -> Prior:
    """A new prior on the CPU, with the sizes that tokenizer and dVAE ask for."""
    sizes: dict[str, Any] = {
        "text_vocab": tokenizer.vocab_size,
        "image_vocab": vae.num_tokens,
        "grid": vae.grid(config.image_size),
        "precision": config.precision,
        "half_weights": config.half_weights,
    }
    if config.precision == "auto":
        sizes["precision"] = "fp32" if world.device.type == "cpu" else "fp16-scaled"
    if config.text_len:
        sizes["text_len"] = config.text_len
    if config.checkpointing:
        sizes["checkpointing"] = True
    shape = from_presets("Prior", PRESETS, config.preset, **sizes)
    if world.size == 1:
        require_prior_fits("prior train", shape, config.recipe.batch_size, world.device)
    torch.manual_seed(start_seed(config.loop.seed, "prior"))
    return Prior(shape)


def _train(config: PriorCommandConfig, world: World) -> None:
    loop, folder = config.loop, config.loop.out / "model"
    with world.raise_on_all():
        check_model_target("prior train", folder, Prior)
        tokenizer = Tokenizer.from_pretrained(config.tokenizer)
        vae = DiscreteVAE.from_pretrained(config.vae).to(world.device)
        pairs = load_pairs(config.data, image_size=config.image_size, seed=config.loop.seed)
        prior = _new_prior(config, tokenizer, vae, world)
    blocks = prior.resblocks().values()
    parallelize(prior, world, blocks, owner="prior train", compressible=True)
    task = PriorTask(prior, tokenizer, vae, pairs, config.recipe, seed=loop.seed, world=world)
    result = train(task, loop, begun=keep_options("prior train", config, loop.out))
    save_model("prior train", task, folder)
    for line in world.summary():
        say(f"prior train: {line}")
    if is_main_process():
        print(f"prior train: {result.step} updates, model in {folder}{left_out(pairs)}")
