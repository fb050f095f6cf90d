"""`dalle prior train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from dalle.commands.fits import require_prior_fits
from dalle.commands.training import check_model_target, loop_config, save_model
from dalle.configs import did_you_mean
from dalle.console import leads, say
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
from dalle.train.loop import train
from dalle.train.prior import PriorTask
from dalle.train.prior_recipe import PriorTrainConfig
from dalle.train.seeds import start_seed


@dataclass(frozen=True, kw_only=True)
class PriorCommandConfig:
    """Trains the transformer on captions and the codes of their images.

    Attributes:
        data: shapes, emoji, or a folder of pictures with .txt captions.
        image_size: side in pixels of the pictures; a multiple of the dVAE's factor.
        tokenizer: folder of `dalle tokenizer train`.
        vae: folder of a trained dVAE.
        out: folder for checkpoints, metrics and pictures; the trained model goes to out/prior.
        steps: updates.
        preset: tiny, small, base, 1b or 12b; vocabularies and grid come from tokenizer and dVAE.
        text_len: text positions, start-of-text included; 0 is the preset's.
        precision: inside the resblocks; fp16-scaled is the paper's, with a gradient scale for
            each resblock; auto is fp32 on the CPU and fp16-scaled elsewhere.
        half_weights: store the resblocks' matrices in 16 bits too, as the paper did.
        checkpointing: recompute each resblock in the backward pass.
        device: cpu, cuda or auto.
        seed: for everything random.
        resume: auto, none, or a checkpoint.
        accept_changes: go on from a checkpoint of other options, data, tokenizer or dVAE.
        log_every, checkpoint_every, picture_every: updates between records, checkpoints, pictures.
        deterministic: same bits on every run.
        recipe: the training recipe; the defaults are the paper's.
        cluster: how the processes of torchrun work together.
    """

    data: str
    image_size: int
    tokenizer: Path
    vae: Path
    out: Path
    steps: int
    preset: str = "tiny"
    text_len: int = 0
    precision: Literal["auto", "fp32", "bf16", "fp16-scaled"] = "auto"
    half_weights: bool = False
    checkpointing: bool = False
    device: str = "auto"
    seed: int = 0
    resume: str = "auto"
    accept_changes: bool = False
    log_every: int = 10
    checkpoint_every: int = 500
    picture_every: int = 500
    deterministic: bool = False
    recipe: PriorTrainConfig = field(default_factory=PriorTrainConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            known, hint = ", ".join(PRESETS), did_you_mean(self.preset, PRESETS)
            raise UsageError(
                f"prior train: preset must be one of {known}, got {self.preset!r}{hint}"
            )


def train_command(config: PriorCommandConfig) -> None:
    """Trains, saves the averaged weights, and says where."""
    with join(config.cluster, pick_device(config.device), shared_options(config)) as world:
        _train(config, world)


def _new_prior(
    config: PriorCommandConfig, tokenizer: Tokenizer, vae: DiscreteVAE, world: World
) -> Prior:
    """On the CPU, of the sizes that tokenizer and dVAE ask for."""
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
    torch.manual_seed(start_seed(config.seed, "prior"))
    return Prior(shape)


def _train(config: PriorCommandConfig, world: World) -> None:
    loop = loop_config(config, config.steps)  # refuses its options before anything is loaded
    with world.agreed():
        check_model_target("prior train", config.out / "prior", Prior)
        tokenizer = Tokenizer.from_pretrained(config.tokenizer)
        vae = DiscreteVAE.from_pretrained(config.vae).to(world.device)
        pairs = load_pairs(config.data, image_size=config.image_size, seed=config.seed)
        prior = _new_prior(config, tokenizer, vae, world)
    blocks = prior.resblocks().values()
    parallelize(prior, world, blocks, owner="prior train", compressible=True)
    task = PriorTask(prior, tokenizer, vae, pairs, config.recipe, seed=config.seed, world=world)
    result = train(task, loop)
    save_model("prior train", task, config.out / "prior")
    for line in world.summary():
        say(f"prior train: {line}")
    if leads():
        where = config.out / "prior"
        print(f"prior train: {result.step} updates, weights in {where}{left_out(pairs)}")
