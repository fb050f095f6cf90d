"""`dalle ranker train`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from PIL import Image

from dalle.commands import presets
from dalle.commands.notes import loop_notes, ranker_notes
from dalle.commands.report import banner, end_block, next_command
from dalle.commands.training import (
    check_model_target,
    keep_options,
    require_one_process,
    require_recipe_of_run,
)
from dalle.configs import did_you_mean
from dalle.data.augment import to_tensor
from dalle.data.codes import require_pictures
from dalle.data.mixture import CaptionChoice
from dalle.data.pairs import Pairs, left_out
from dalle.demo.sizing import ranker_grid
from dalle.devices import pick_device
from dalle.dvae.model import DiscreteVAE
from dalle.dvae.picture_size import side_for, trained_size
from dalle.errors import UsageError
from dalle.pictures import default_scale, grid, save_png
from dalle.ranker.blocks import PRESETS
from dalle.ranker.model import ContrastiveRanker
from dalle.recipes import quick_ranker
from dalle.tokenizer import Tokenizer
from dalle.train.config import LoopConfig
from dalle.train.fine_tune import (
    LR_SHARE,
    FineTuneConfig,
    freeze,
    load_start,
    say_sizes_stay,
    start_from,
)
from dalle.train.held_out import held_out_pictures, save_better
from dalle.train.loop import train
from dalle.train.ranker import RankerTask, RankerTrainConfig
from dalle.train.seeds import start_seed

STEPS = 600
SHOWN, CHOICES = 8, 4  # captions in the picture, and pictures of each

if TYPE_CHECKING:
    RankerOptions = RankerTrainConfig
else:
    RankerOptions = presets.overrides(RankerTrainConfig)


@dataclass(frozen=True, kw_only=True)
class RankerCommandConfig:
    """Trains the model that chooses the best of many samples; it goes to OUT/model.

    Attributes:
        data: shapes, emoji, a folder of pictures with .txt captions or of tar shards, or a table
            (docs/data.md); the prior's.
        tokenizer: folder of `dalle tokenizer train` (run/tokenizer).
        vae: model folder of `dalle dvae train` (run/dvae/model). Pictures are then also shown as it
            gives them back, which is what samples look like, and broken ones are made of its codes.
        preset: tiny, small or base.
        recipe: quick (a warm-up that fits the run, two halves of a batch side by side) or paper
            (a warm-up of 50; the paper itself takes a ready CLIP). Left out, quick for tiny and
            small, paper for base.
        image_size: side in pixels of the pictures, the prior's; 0 takes that of the dVAE's
            training; without one, or where that is not known, the preset's.
        captions: which of a picture's captions are trained on: draw (one of them each epoch),
            first, or join (all, with spaces between).
        validation: share of the pairs held out for scores, by their hashes; 0 for none. Left out,
            0.1 with quick and 0 with paper.
        precision: of the products in the forward and backward pass: fp32, bf16, or auto, which is
            bf16 on a GPU. Weights are fp32, and so are tokens and scores.
        device: cpu, cuda or auto.
        loop: folder, updates (600 if nothing is said), checkpoints, seed.
        training: the training; what is left out is the recipe's.
        start: a saved model to start from, and what stays frozen.
    """

    data: str
    tokenizer: Path
    vae: Path | None = None
    preset: str = "tiny"
    recipe: presets.Recipe | None = None
    image_size: int = 0
    captions: CaptionChoice = "draw"
    validation: float | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    loop: LoopConfig = field(default_factory=partial(LoopConfig, out=Path("run/ranker"), steps=0))
    training: RankerOptions = field(default_factory=RankerOptions)
    start: FineTuneConfig = field(default_factory=FineTuneConfig)


def train_command(config: RankerCommandConfig) -> None:
    """Trains, saves, and says how good it is, where, and what is next."""
    owner, out = "ranker train", config.loop.out
    require_one_process(owner)
    device = pick_device(config.device, deterministic=config.loop.deterministic)
    loop = replace(config.loop, steps=config.loop.steps or STEPS)
    check_model_target(owner, out / "model", ContrastiveRanker)
    tokenizer, vae, saved = Tokenizer.from_pretrained(config.tokenizer), None, None
    if config.start.init_from is not None:
        saved = load_start(ContrastiveRanker, config.start.init_from)
        saved.trained_on["tokenizer"] = saved.tokenizer.fingerprint()
    if config.vae is not None:
        vae = DiscreteVAE.from_pretrained(config.vae).to(device)
    recipe = presets.chosen_recipe(owner, config.recipe, config.preset, 1)
    require_recipe_of_run(owner, recipe, loop, 1)
    if config.preset not in PRESETS:
        names, hint = ", ".join(PRESETS), did_you_mean(config.preset, PRESETS)
        raise UsageError(f"{owner}: preset must be one of {names}, got {config.preset!r}{hint}")
    of_vae = 0 if vae is None else trained_size(vae, config.vae)
    of_vae = of_vae if saved is None else saved.config.image_size
    side = of_vae or presets.QUICK_SIZES[config.preset].side
    pairs = presets.open_pairs(config.data, config.image_size, side, loop.seed, config.captions)
    require_pictures("ranker train", pairs)
    size = config.image_size or of_vae
    if vae is not None and (config.image_size or not of_vae):
        fitting = presets.fitting_size(side, pairs, vae.factor)
        size = side_for(owner, vae, config.vae, asked=config.image_size, otherwise=fitting)
    size = size or presets.quick_size(config.preset, pairs)
    pairs, validation, share = presets.split_pairs(
        owner, config.data, pairs, config.validation, recipe, size, loop.seed
    )
    loop = presets.length(loop, loop.steps, validation is not None)
    base = quick_ranker(loop.steps) if recipe == "quick" else RankerTrainConfig()
    if saved is not None:
        base = replace(base, learning_rate=LR_SHARE * base.learning_rate)
    train_config = replace(base, **presets.given(config.training))
    torch.manual_seed(start_seed(loop.seed, "ranker"))
    sizes: dict[str, int] = {}
    if recipe == "quick" and size % PRESETS[config.preset].grid and not size % 2:
        sizes["grid"] = ranker_grid(size)
    lines = []
    if saved is None:
        ranker = ContrastiveRanker.from_preset(
            config.preset, tokenizer=tokenizer, image_size=size, **sizes
        )
    else:
        say_sizes_stay(owner, config.preset, PRESETS[config.preset], saved.config)
        ranker = ContrastiveRanker(replace(saved.config, image_size=size), tokenizer)
        now = {"tokenizer": tokenizer.fingerprint()}
        lines += start_from(owner, ranker, saved, config.start, now)
    lines += freeze(owner, ranker, config.start.freeze)
    ranker = ranker.to(device)
    ranker.train_precision = presets.precision(config.precision, device)
    cut = tokenizer.truncated
    task = RankerTask(
        ranker,
        pairs,
        train_config,
        vae,
        steps=loop.steps,
        seed=loop.seed,
        validation=validation,
        workers=loop.workers,
    )
    if tokenizer.truncated > cut:
        count, slots = tokenizer.truncated - cut, ranker.config.text_len
        lines += [f"{count} captions have more than {slots} tokens, the rest is cut off"]
    banner(
        owner,
        pairs,
        validation,
        recipe=recipe,
        image_size=size,
        batch_size=train_config.total_batch,
        loop=loop,
        parameters=sum(p.numel() for p in ranker.parameters()),
        device=device,
        precision=ranker.train_precision,
        enlarges=True,
        more=lines,
        notes=[
            *ranker_notes(config.training, train_config, loop.steps, vae is not None),
            *loop_notes(config.loop, validation is not None),
        ],
    )
    resolved = replace(
        config,
        recipe=recipe,
        image_size=size,
        validation=share,
        loop=loop,
        training=presets.filled(config.training, train_config),
    )
    result = train(task, loop, begun=keep_options(owner, resolved, out))
    scores = save_better(owner, task, out / "model", result.step)
    known = {"tokenizer": config.tokenizer, "dvae": config.vae, "ranker": out / "model"}
    then = next_command(config.data, config.preset, out.parent, **known)
    lines = list(_scores(scores))
    if loop.picture_every:
        sheet = choices_sheet(ranker, validation or pairs)
        lines.append(f"picture: {save_png(out / 'pictures' / 'saved.png', sheet)}")
    end_block(owner, result, out / "model", left_out(pairs), lines, then)


@torch.no_grad()
def choices_sheet(ranker: ContrastiveRanker, pairs: Pairs) -> Image.Image:
    """Eight captions in rows: a caption's own picture, then the four that the ranker puts first
    among all, with their scores."""
    crops, items = held_out_pictures(pairs, ranker.config.image_size)
    captions = [pairs.captions[item] for item in items][:SHOWN]
    device = ranker.log_scale.device
    ranker.eval()
    images = to_tensor(crops)
    features = torch.cat([ranker.encode_images(part.to(device)) for part in images.split(64)])
    text = ranker.tokenizer.encode(captions, ranker.config.text_len).to(device)
    scores = (ranker.encode_text(text) @ features.T).cpu()
    cells, labels = [], []
    for row, caption in enumerate(captions):
        best = scores[row].topk(min(CHOICES, len(images)))
        cells += [images[row], *images[best.indices]]
        labels += [caption, *(f"{number}. {score:.2f}" for number, score in enumerate(best[0], 1))]
    columns, scale = 1 + min(CHOICES, len(images)), default_scale(ranker.config.image_size)
    return grid(torch.stack(cells), columns=columns, scale=scale, labels=labels)


def _scores(scores: Mapping[str, float]) -> Iterator[str]:
    """A line on the held-out pairs."""
    if scores:
        yield (
            f"{scores['accuracy']:.0%} of the held-out captions find their picture among "
            f"{scores['choices']:.0f}, {1 / scores['choices']:.0%} would by chance"
        )
