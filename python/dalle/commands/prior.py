"""`dalle prior train`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from dalle.commands import presets
from dalle.commands.fits import require_prior_fits
from dalle.commands.notes import cluster_notes, loop_notes, prior_notes
from dalle.commands.report import (
    QUICK_TEMPERATURE,
    banner,
    end_block,
    newest_picture,
    next_command,
)
from dalle.commands.training import check_model_target, keep_options, require_recipe_of_run
from dalle.configs import did_you_mean
from dalle.console import is_main_process, number, say
from dalle.data.codes import stores_of
from dalle.data.mixture import CaptionChoice
from dalle.data.pairs import Pairs, each_caption, left_out
from dalle.devices import default_precision, pick_device
from dalle.distributed.config import ClusterConfig
from dalle.distributed.parallelize import parallelize
from dalle.distributed.world import World, join, shared_options
from dalle.dvae.model import DiscreteVAE
from dalle.dvae.picture_size import side_for, trained_size
from dalle.errors import UsageError
from dalle.pictures import default_scale, save_png, to_uint8
from dalle.pretrained import fingerprint, from_presets
from dalle.prior.config import PRESETS
from dalle.prior.model import Prior
from dalle.recipes import quick_prior
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
from dalle.train.held_out import save_better
from dalle.train.loop import train, write_pictures
from dalle.train.prior import PriorTask
from dalle.train.prior_recipe import PriorTrainConfig
from dalle.train.seeds import start_seed

NEAREST = Image.Resampling.NEAREST
MAX_CAPTIONS = 10_000  # looked at for their length

if TYPE_CHECKING:
    PriorOptions = PriorTrainConfig
else:
    PriorOptions = presets.overrides(PriorTrainConfig)

PAPER_STEPS = 430_000
QUICK_GAIN = 0.5  # of the first weights: a short run does not grow them


@dataclass(frozen=True, kw_only=True)
class PriorCommandConfig:
    """Trains the transformer on captions and the codes of their images; it goes to OUT/model: the
    averaged or the last weights, whichever are better on the held-out part.

    Attributes:
        data: shapes, emoji, a folder of pictures with .txt captions or of tar shards, a table
            (docs/data.md), or a folder of `dalle data encode`, whose codes are read in place of
            pictures; several by weights: --data a=0.7 --data b=0.3.
        tokenizer: folder of `dalle tokenizer train` (run/tokenizer).
        vae: model folder of `dalle dvae train` (run/dvae/model).
        preset: tiny, small, base, 1b or 12b; vocabularies and grid come from tokenizer and dVAE.
        recipe: quick (a start from the codebook, Muon, a cosine to zero that fits the run) or
            paper. Left out, quick for tiny and small on one process, paper else.
        image_size: side in pixels of the pictures, a multiple of the dVAE's factor; 0 takes that
            of the dVAE's training; where it is not known, the preset's grid.
        captions: which of a picture's captions are trained on: draw (one of them each epoch),
            first, or join (all, with spaces between).
        validation: share of the pairs held out for scores, by their hashes; 0 for none. Left out,
            0.1 with quick and 0 with paper.
        text_len: text positions, start-of-text included; 0 is the preset's, or with quick enough
            for nineteen of twenty captions, up to 32 for tiny.
        precision: inside the resblocks; fp16-scaled is the paper's, with a gradient scale for
            each resblock; auto is fp32 on the CPU, and on a GPU fp16-scaled, or bf16 with quick.
        half_weights: store the resblocks' matrices in 16 bits too, as the paper did.
        checkpointing: recompute each resblock in the backward pass.
        device: cpu, cuda or auto.
        loop: folder, updates (those of 40 epochs with quick and tiny, 430,000 in the paper),
            checkpoints, seed.
        training: the training; what is left out is the recipe's.
        start: a saved model to start from, and what stays frozen.
        cluster: how the processes of torchrun work together.
    """

    data: str
    tokenizer: Path
    vae: Path
    loop: LoopConfig = field(default_factory=partial(LoopConfig, out=Path("run/prior"), steps=0))
    preset: str = "tiny"
    recipe: presets.Recipe | None = None
    image_size: int = 0
    captions: CaptionChoice = "draw"
    validation: float | None = None
    text_len: int = 0
    precision: Literal["auto", "fp32", "bf16", "fp16-scaled"] = "auto"
    half_weights: bool = False
    checkpointing: bool = False
    device: str = "auto"
    training: PriorOptions = field(default_factory=PriorOptions)
    start: FineTuneConfig = field(default_factory=FineTuneConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            choices, hint = ", ".join(PRESETS), did_you_mean(self.preset, PRESETS)
            raise UsageError(
                f"prior train: preset must be one of {choices}, got {self.preset!r}{hint}"
            )


class Plan(NamedTuple):
    """What `dalle prior train` makes of its options and the data."""

    config: PriorCommandConfig  # with every value filled in
    train: PriorTrainConfig
    tokenizer: Tokenizer
    vae: DiscreteVAE
    pairs: Pairs
    validation: Pairs | None
    saved: Prior | None  # to start from


def train_command(config: PriorCommandConfig) -> None:
    """Trains, saves the better weights, and says how good they are, where, and what is next."""
    device = pick_device(config.device, deterministic=config.loop.deterministic)
    with join(config.cluster, device, shared_options(config)) as world:
        _train(config, world)


def plan(config: PriorCommandConfig, world: World) -> Plan:
    """Loads the parts, opens the data and chooses what is left open.

    Raises:
        UsageError: options that do not fit each other.
        DataError: no usable data.
    """
    owner, preset = "prior train", config.preset
    tokenizer = Tokenizer.from_pretrained(config.tokenizer)
    vae = DiscreteVAE.from_pretrained(config.vae).to(world.device)
    saved = None
    if config.start.init_from is not None:
        saved = load_start(Prior, config.start.init_from)
    recipe = presets.chosen_recipe(owner, config.recipe, preset, world.size)
    require_recipe_of_run(owner, recipe, config.loop, world.size)
    side = trained_size(vae, config.vae) or PRESETS[preset].grid[0] * vae.factor
    pairs = presets.open_pairs(
        config.data, config.image_size, side, config.loop.seed, config.captions
    )
    stores = stores_of(pairs)
    size = config.image_size or (stores[0].image_size if stores else 0)
    if not size:
        fitting = presets.fitting_size(side, pairs, vae.factor)
        size = side_for(owner, vae, config.vae, otherwise=fitting)
    pairs, validation, share = presets.split_pairs(
        owner, config.data, pairs, config.validation, recipe, size, config.loop.seed
    )
    asked = presets.given(config.training)
    batch_size = asked.get("batch_size", 16) * asked.get("accumulate", 1)
    steps = config.loop.steps or presets.prior_steps(preset, len(pairs), batch_size)
    if recipe == "paper":
        steps = config.loop.steps or PAPER_STEPS
        base = PriorTrainConfig()
    else:
        base = quick_prior(steps, lr=4e-3 * min(1.0, 128 / PRESETS[preset].d_model))
        if world.size > 1:  # Muon is of one process
            base = replace(base, parts=1, optimizer="auto", lr=base.lr / 4)
    changes = presets.given(config.training)
    if saved is not None:
        base = of_fine_tuning(base, steps)
    if changes.get("decay") == "cosine" and recipe == "paper":
        base = replace(base, decay_steps=steps)
    base = replace(base, **changes)
    precision = config.precision
    if precision == "auto":
        precision = default_precision(world.device, scaled=recipe == "paper")
    if precision == "fp16-scaled" and recipe == "quick" and "parts" not in changes:
        base = replace(base, parts=1)  # threads would share the scales
    if config.half_weights and recipe == "quick" and "optimizer" not in changes:
        base = replace(base, optimizer="auto", lr=changes.get("lr", base.lr / 4))
    text_len = config.text_len
    if saved is not None:
        text_len = text_len or saved.config.text_len
        if base.image_init != "random":
            want = "random with init-from, whose tables stay"
            raise UsageError(f"{owner}: image_init must be {want}, got {base.image_init}")
    elif recipe == "quick" and not text_len:
        limit = presets.QUICK_SIZES.get(preset, presets.QUICK_SIZES["base"]).text_len
        text_len = _text_len(tokenizer, [*islice(each_caption(pairs), MAX_CAPTIONS)], limit)
    resolved = replace(
        config,
        recipe=recipe,
        image_size=size,
        text_len=text_len,
        validation=share,
        precision=precision,
        loop=presets.length(config.loop, steps, validation is not None),
        training=presets.filled(config.training, base),
    )
    return Plan(resolved, base, tokenizer, vae, pairs, validation, saved)


def of_fine_tuning(recipe: PriorTrainConfig, steps: int) -> PriorTrainConfig:
    """A recipe for weights that are good already: a quarter of its step size, a warm-up over a
    tenth of the run at most, tables that stay."""
    warmup = min(recipe.warmup_steps, max(1, steps // 10))
    return replace(recipe, lr=LR_SHARE * recipe.lr, warmup_steps=warmup, image_init="random")


def _text_len(tokenizer: Tokenizer, captions: list[str], limit: int) -> int:
    """Text positions for nineteen of twenty captions, start-of-text included, a multiple of 4."""
    before = tokenizer.truncated
    ids = tokenizer.encode(captions, limit)
    tokenizer.truncated = before
    lengths = (ids != Tokenizer.PAD).sum(1).numpy()
    needed = int(np.quantile(lengths, 0.95, method="higher")) + 1
    return min(limit, -(-needed // 4) * 4)


def _new_prior(made: Plan, world: World) -> Prior:
    """A new prior on the CPU, with the sizes that tokenizer and dVAE ask for."""
    config = made.config
    sizes: dict[str, Any] = {
        "text_vocab": made.tokenizer.vocab_size,
        "image_vocab": made.vae.num_tokens,
        "grid": made.vae.grid(config.image_size),
        "precision": config.precision,
        "half_weights": config.half_weights,
    }
    if config.recipe == "quick":
        sizes["init_gain"] = QUICK_GAIN
    if config.text_len:
        sizes["text_len"] = config.text_len
    if config.checkpointing:
        sizes["checkpointing"] = True
    if made.saved is not None:
        say_sizes_stay("prior train", config.preset, PRESETS[config.preset], made.saved.config)
        shape = replace(made.saved.config, **sizes | {"text_vocab": made.saved.config.text_vocab})
    else:
        shape = from_presets("Prior", PRESETS, config.preset, **sizes)
    if world.size == 1:
        require_prior_fits("prior train", shape, made.train.batch_size, world.device)
    torch.manual_seed(start_seed(config.loop.seed, "prior"))
    return Prior(shape)


def _cut_captions(made: Plan, text_len: int) -> Iterator[str]:
    """A line where captions do not fit into the text positions."""
    captions = [*islice(each_caption(made.pairs), MAX_CAPTIONS)]
    before = made.tokenizer.truncated
    for begin in range(0, len(captions), 1024):
        made.tokenizer.encode(captions[begin : begin + 1024], text_len - 1)
    cut, made.tokenizer.truncated = made.tokenizer.truncated - before, before
    if cut:
        yield (
            f"{cut} of {len(captions)} captions have more than {text_len - 1} tokens, the rest is "
            "cut off; --text-len takes more"
        )


def _train(config: PriorCommandConfig, world: World) -> None:
    owner, out = "prior train", config.loop.out
    with world.raise_on_all():
        check_model_target(owner, out / "model", Prior)
        made = plan(config, world)
        prior, start = _new_prior(made, world), []
        if made.saved is not None:
            now = {"tokenizer": made.tokenizer.fingerprint(), "vae": fingerprint(made.vae)}
            start = start_from(owner, prior, made.saved, config.start, now)
        start += freeze(owner, prior, config.start.freeze)
    resolved, loop = made.config, made.config.loop
    parameters, shape = sum(p.numel() for p in prior.parameters()), prior.config
    blocks = prior.resblocks().values()
    parallelize(prior, world, blocks, owner=owner, compressible=True)
    parts = (prior, made.tokenizer, made.vae, made.pairs, made.train)
    task = PriorTask(
        *parts, seed=loop.seed, world=world, validation=made.validation, workers=loop.workers
    )
    banner(
        owner,
        made.pairs,
        made.validation,
        recipe=str(resolved.recipe),
        image_size=resolved.image_size,
        batch_size=made.train.total_batch,
        loop=loop,
        parameters=parameters,
        device=world.device,
        precision=shape.precision,
        enlarges=made.train.augment == "none",
        more=[
            f"{shape.text_len} text positions, {shape.grid[0]} x {shape.grid[1]} image tokens of "
            f"{shape.image_vocab:,} codes",
            *start,
            *_cut_captions(made, shape.text_len),
        ],
        notes=[
            *prior_notes(config.training, made.train, loop.steps, shape.half_weights),
            *loop_notes(config.loop, made.validation is not None),
            *cluster_notes(config.cluster, world.size),
        ],
    )
    result = train(task, loop, begun=keep_options(owner, resolved, out))
    scores = save_better(owner, task, out / "model", result.step)
    if world.size > 1 and loop.picture_every:  # the model may be too large for one process
        write_pictures(task, result.step, out / "pictures")
    for line in world.summary():
        say(f"{owner}: {line}")
    if is_main_process():
        lines = list(_saved(made, task, out, scores))
        known = {"tokenizer": config.tokenizer, "dvae": config.vae, "prior": out / "model"}
        then = next_command(config.data, config.preset, out.parent, **known)
        end_block(owner, result, out / "model", left_out(made.pairs), lines, then)


def _saved(made: Plan, task: PriorTask, out: Path, scores: Mapping[str, float]) -> Iterator[str]:
    """Lines on the model in OUT/model: held-out losses, and samples, drawn to OUT/pictures."""
    if scores:
        parts = ", ".join(f"{name} {number(value)}" for name, value in scores.items())
        yield f"held-out nats a token: {parts}"
    if task.world.size > 1 or not made.config.loop.picture_every:
        yield from newest_picture(out)
        return
    model = Prior.from_pretrained(out / "model").to(task.device).eval()
    quick = made.config.recipe == "quick"
    rows = task.samples(model, temperature=QUICK_TEMPERATURE if quick else 1.0)
    picture, scale = Image.fromarray(to_uint8(rows)), default_scale(task.image_size)
    picture = picture.resize((picture.width * scale, picture.height * scale), NEAREST)
    yield f"picture: {save_png(out / 'pictures' / 'saved.png', picture)}"
