"""`dalle ranker train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from dalle.commands.training import alone, check_model_target, loop_config, save_model
from dalle.console import say
from dalle.data.pairs import left_out
from dalle.data.sources import load_pairs
from dalle.devices import pick_device
from dalle.dvae.model import DiscreteVAE
from dalle.ranker.model import ContrastiveRanker
from dalle.tokenizer import Tokenizer
from dalle.train.loop import train
from dalle.train.ranker import RankerTask, RankerTrainConfig
from dalle.train.seeds import start_seed


@dataclass(frozen=True, kw_only=True)
class RankerTrainCommand:
    """Trains the model that chooses the best of many samples; it goes to OUT/model.

    Attributes:
        data: shapes, emoji, or a folder of pictures with .txt captions; the prior's.
        image_size: side in pixels of the pictures; the prior's.
        tokenizer: folder of `dalle tokenizer train`.
        vae: folder of a trained dVAE. Pictures are then also shown as it gives them back, which is
            what samples look like, and broken ones are made of its codes.
        out: folder for checkpoints, metrics, pictures and the model.
        preset: tiny, small or base.
        device: cpu, cuda or auto.
        seed: for everything random.
        resume: auto, none, or a checkpoint.
        accept_changes: go on from a checkpoint of other options, data, tokenizer or dVAE.
        log_every, checkpoint_every, picture_every: updates between records, checkpoints, pictures.
        deterministic: same bits on every run.
        recipe: the training recipe; 600 updates if nothing is said.
    """

    data: str
    image_size: int
    tokenizer: Path
    out: Path
    vae: Path | None = None
    preset: str = "tiny"
    device: str = "auto"
    seed: int = 0
    resume: str = "auto"
    accept_changes: bool = False
    log_every: int = 10
    checkpoint_every: int = 500
    picture_every: int = 500
    deterministic: bool = False
    recipe: RankerTrainConfig = field(default_factory=RankerTrainConfig)


def train_command(config: RankerTrainCommand) -> None:
    """Trains, saves, and says where."""
    alone("ranker train")
    device = pick_device(config.device)
    loop = loop_config(config, config.recipe.steps)
    check_model_target("ranker train", config.out / "model", ContrastiveRanker)
    tokenizer, vae = Tokenizer.from_pretrained(config.tokenizer), None
    if config.vae is not None:
        vae = DiscreteVAE.from_pretrained(config.vae).to(device)
        vae.grid(config.image_size)
    pairs = load_pairs(config.data, image_size=config.image_size, seed=config.seed)
    torch.manual_seed(start_seed(config.seed, "ranker"))
    ranker = ContrastiveRanker.from_preset(
        config.preset, tokenizer=tokenizer, image_size=config.image_size
    ).to(device)
    cut = tokenizer.truncated
    task = RankerTask(ranker, pairs, config.recipe, vae, seed=config.seed)
    if tokenizer.truncated > cut:
        count, slots = tokenizer.truncated - cut, ranker.config.text_len
        say(f"ranker train: {count} captions have more than {slots} tokens, the rest is cut off")
    result = train(task, loop)
    save_model("ranker train", task, config.out / "model")
    print(f"ranker train: {result.step} updates, model in {config.out / 'model'}{left_out(pairs)}")
