"""`dalle ranker train`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from dalle.commands.training import (
    check_model_target,
    keep_options,
    require_one_process,
    save_model,
)
from dalle.console import say
from dalle.data.pairs import left_out
from dalle.data.sources import load_pairs
from dalle.devices import pick_device
from dalle.dvae.model import DiscreteVAE
from dalle.ranker.model import ContrastiveRanker
from dalle.tokenizer import Tokenizer
from dalle.train.config import LoopConfig
from dalle.train.loop import train
from dalle.train.ranker import RankerTask, RankerTrainConfig
from dalle.train.seeds import start_seed

STEPS = 600


@dataclass(frozen=True, kw_only=True)
class RankerCommandConfig:
    """Trains the model that chooses the best of many samples; it goes to OUT/model.

    Attributes:
        data: shapes, emoji, or a folder of pictures with .txt captions; the prior's.
        image_size: side in pixels of the pictures; the prior's.
        tokenizer: folder of `dalle tokenizer train`.
        vae: folder of a trained dVAE. Pictures are then also shown as it gives them back, which is
            what samples look like, and broken ones are made of its codes.
        preset: tiny, small or base.
        device: cpu, cuda or auto.
        loop: folder, updates (600 if nothing is said), checkpoints, seed.
        recipe: the training recipe.
    """

    data: str
    image_size: int
    tokenizer: Path
    vae: Path | None = None
    preset: str = "tiny"
    device: str = "auto"
    loop: LoopConfig = field(default_factory=partial(LoopConfig, out=Path("out/ranker"), steps=0))
    recipe: RankerTrainConfig = field(default_factory=RankerTrainConfig)


def train_command(config: RankerCommandConfig) -> None:
    """Trains, saves, and says where."""
    require_one_process("ranker train")
    device = pick_device(config.device)
    loop = replace(config.loop, steps=config.loop.steps or STEPS)
    folder = loop.out / "model"
    check_model_target("ranker train", folder, ContrastiveRanker)
    tokenizer, vae = Tokenizer.from_pretrained(config.tokenizer), None
    if config.vae is not None:
        vae = DiscreteVAE.from_pretrained(config.vae).to(device)
        vae.grid(config.image_size)
    pairs = load_pairs(config.data, image_size=config.image_size, seed=loop.seed)
    torch.manual_seed(start_seed(loop.seed, "ranker"))
    ranker = ContrastiveRanker.from_preset(
        config.preset, tokenizer=tokenizer, image_size=config.image_size
    ).to(device)
    cut = tokenizer.truncated
    task = RankerTask(ranker, pairs, config.recipe, vae, steps=loop.steps, seed=loop.seed)
    if tokenizer.truncated > cut:
        count, slots = tokenizer.truncated - cut, ranker.config.text_len
        say(f"ranker train: {count} captions have more than {slots} tokens, the rest is cut off")
    resolved = replace(config, loop=loop)
    result = train(task, loop, begun=keep_options("ranker train", resolved, loop.out))
    save_model("ranker train", task, folder)
    print(f"ranker train: {result.step} updates, model in {folder}{left_out(pairs)}")
