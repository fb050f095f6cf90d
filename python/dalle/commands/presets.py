"""What a training starts from: its recipe, and the sizes that the data suggest.

`quick` is the recipe of runs of minutes (`dalle.recipes`), whose numbers of updates follow from
`--steps`; `paper` is the paper's. Options of the training that are not given take the recipe's.
"""

from __future__ import annotations

import dataclasses
import statistics
import typing
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro

from dalle.console import say
from dalle.data.images import open_checked
from dalle.data.mixture import CaptionChoice, file_of
from dalle.data.pairs import Pairs, evenly_spaced
from dalle.data.sources import drawn_size, has_built_in, held_out_split, load_pairs
from dalle.data.split import TooFewPictures, hold_out
from dalle.demo.sizing import CUDA_TIERS, TIERS, fitted_dvae, num_codes
from dalle.devices import Precision, default_precision
from dalle.dvae.model import PRESETS as DVAE_PRESETS
from dalle.errors import DataError, UsageError
from dalle.recipes import DvaeRecipe
from dalle.train.config import LoopConfig

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
Recipe = Literal["quick", "paper"]
QUICK_PRESETS = ("tiny", "small")  # whose recipe is "quick" where nothing is said
LOOKED_AT = 256  # pictures of a folder whose sizes are read
VALIDATION = 0.1  # share held out by the quick recipe
PAPER_GRID = {"tiny": 8, "small": 16, "base": 32, "paper": 32}  # tokens along a side
# What `dalle train` takes for minutes, an hour, and a night on a GPU.
QUICK_SIZES = {
    "tiny": TIERS["quick"],
    "small": TIERS["hour"],
    "base": CUDA_TIERS["night"],
    "paper": CUDA_TIERS["night"],
}


def overrides(config_type: type[T], *leave_out: str) -> type[T]:
    """A dataclass of the same options, all optional: None takes the recipe's.

    Args:
        config_type: of a training recipe.
        leave_out: options that the command has itself.
    """
    hints = typing.get_type_hints(config_type, include_extras=True)
    recipe = tyro.conf.arg(help_behavior_hint="(default: the recipe's)")
    fields: list[Any] = [
        (f.name, Annotated[hints[f.name] | None, recipe], dataclasses.field(default=None))
        for f in dataclasses.fields(config_type)
        if f.name not in leave_out
    ]
    name = f"{config_type.__name__}Options"
    made = dataclasses.make_dataclass(name, fields, frozen=True, kw_only=True)
    made.__doc__ = config_type.__doc__
    return typing.cast("type[T]", made)


def given(options: Any) -> dict[str, Any]:
    """The options of `overrides` that are set."""
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    return {name: value for name, value in values.items() if value is not None}


def filled(options: T, config: Any) -> T:
    """`options` of `overrides` with the values of a whole recipe."""
    names = [f.name for f in dataclasses.fields(options)]
    return dataclasses.replace(options, **{name: getattr(config, name) for name in names})


def precision(asked: str, device: torch.device) -> Precision:
    """The precision asked for, "fp32" or "bf16"; of "auto" that of the device."""
    chosen = default_precision(device) if asked == "auto" else asked
    return "bf16" if chosen == "bf16" else "fp32"


def chosen_recipe(owner: str, recipe: Recipe | None, preset: str, processes: int) -> Recipe:
    """The recipe of a training: the one asked for, else quick for small presets on one process."""
    if recipe is not None:
        return recipe
    if preset not in QUICK_PRESETS:
        return "paper"
    if processes > 1:
        say(f"{owner}: recipe paper, as for all presets on several processes; or --recipe quick")
        return "paper"
    return "quick"


def one_process_only(recipe: str, processes: int) -> dict[str, Any]:
    """Changes to the quick recipe on several processes, which cut a batch themselves."""
    return {"parts": 1} if recipe == "quick" and processes > 1 else {}


def open_pairs(
    data: str,
    image_size: int,
    preset_size: int,
    seed: int,
    captions: CaptionChoice = "draw",
    *,
    report: bool = True,
) -> Pairs:
    """The data set; a built-in one at the size asked for, or about the preset's.

    Args:
        data: as `load_pairs` takes it.
        image_size: side of the pictures; 0 where it is not given.
        preset_size: the preset's.
        seed: of a set that is drawn.
        captions: which of a picture's captions are trained on.
        report: whether a line says what was left out.
    """
    size = image_size or preset_size
    if has_built_in(data):
        size = size_of_sets(data, image_size, preset_size)
    return load_pairs(data, image_size=size, seed=seed, captions=captions, report=report)


def size_of_sets(data: str, image_size: int, preset_size: int) -> int:
    """The size that `open_pairs` opens the built-in sets of `data` at; 0 where there are none."""
    return (image_size or drawn_size(preset_size)) if has_built_in(data) else 0


def sides(pairs: Pairs) -> list[int]:
    """The shorter sides of up to 256 pictures, evenly spaced, where they differ; else of one."""
    if pairs.image_size:
        return [pairs.image_size]
    lengths = []
    for item in evenly_spaced(len(pairs), LOOKED_AT):
        try:
            lengths.append(min(open_checked(*file_of(pairs, int(item))).size))
        except (DataError, OSError):
            continue  # left out, and said, where it is loaded
    return lengths


def fitting_size(preset_size: int, pairs: Pairs, multiple: int) -> int:
    """The preset's size, or that of the median picture where most are smaller: a multiple."""
    known = sides(pairs)
    size = min([preset_size, *([int(statistics.median(known))] if known else [])])
    return max(multiple, size // multiple * multiple)


def quick_size(preset: str, pairs: Pairs) -> int:
    """The size of pictures for a preset with the quick recipe, an even number of patches."""
    tier = QUICK_SIZES[preset]
    side = fitting_size(tier.side, pairs, 2)
    patch = -(-side // tier.grid)
    return max(2, min(tier.grid, side // patch) // 2 * 2) * patch


def quick_patch(owner: str, image_size: int, grid: int) -> int:
    """Pixels a token covers along a side: the divisor of a size that gives about `grid` tokens, an
    even number.

    Raises:
        UsageError: no divisor gives half to twice as many.
    """
    fits = [p for p in range(1, image_size + 1) if image_size % (2 * p) == 0]
    best = min(fits, key=lambda p: (abs(image_size / p - grid), -p), default=0)
    if not best or not grid / 2 <= image_size // best <= 2 * grid:
        near = max(grid, round(image_size / grid) * grid)
        raise UsageError(
            f"{owner}: image_size must be a multiple of an even number near {grid} for the recipe "
            f"quick, such as {near}, got {image_size}"
        )
    return best


def quick_model(
    owner: str,
    preset: str,
    image_size: int,
    pictures: int,
    codes: int,
    steps: int,
    warm: int | None = None,
) -> DvaeRecipe:
    """The quick recipe of a dVAE: as many codes as the pictures can fill, unless it is said."""
    tier = QUICK_SIZES[preset]
    patch = quick_patch(owner, image_size, tier.grid)
    points = pictures * (image_size // patch) ** 2
    return fitted_dvae(
        steps,
        image_size=image_size,
        patch=patch,
        width=tier.dvae_width,
        codes=codes or num_codes(points, tier, 16),
        warm=warm,
    )


def length(loop: LoopConfig, steps: int, held_out: bool) -> LoopConfig:
    """The loop's options with the number of updates; where a part is held out, with ten scores on
    it, and one at least every 2,000 updates."""
    every = loop.validate_every
    if held_out and not every:
        every = max(1, min(2000, steps // 10))
    return dataclasses.replace(loop, steps=steps, validate_every=every)


def prior_steps(preset: str, pairs: int, batch_size: int) -> int:
    """Updates of the prior with the quick recipe: the epochs of the tier, at least 500 updates, at
    most 10,000 for tiny and 100,000 for others."""
    epochs = QUICK_SIZES.get(preset, QUICK_SIZES["base"]).epochs
    return min(max(500, epochs * pairs // batch_size), 10_000 if preset == "tiny" else 100_000)


def paper_side(preset: str) -> int:
    """The side of a picture that a preset is made for, in pixels, with the paper's recipe."""
    return PAPER_GRID[preset] * DVAE_PRESETS[preset].factor


def split_pairs(
    owner: str, data: str, pairs: Pairs, share: float | None, recipe: str, size: int, seed: int
) -> tuple[Pairs, Pairs | None, float]:
    """The training part, the held-out part or None, and the share held out.

    The built-in sets have a split of their own for this; a folder is divided by the pictures'
    hashes, so that all trainings on it hold out the same ones.

    Raises:
        UsageError: a share out of range.
        DataError: a share was asked for, and the pictures are too few.
    """
    if share is not None and not 0 <= share <= 0.5:
        raise UsageError(f"{owner}: validation must be 0 to 0.5, got {share}")
    wanted = (VALIDATION if recipe == "quick" else 0.0) if share is None else share
    if not wanted:
        return pairs, None, 0.0
    if split := held_out_split(data):
        if share is not None:
            say(f"{owner}: note: the split {split} of {data} is held out, whole")
        held = load_pairs(data, image_size=size, split=split, seed=seed)
        return pairs, held, wanted
    try:
        train, validation = hold_out(pairs, wanted)
    except TooFewPictures as problem:
        if share is not None:
            raise
        say(f"{owner}: no picture is held out: {problem}")
        return pairs, None, 0.0
    return train, validation, wanted
