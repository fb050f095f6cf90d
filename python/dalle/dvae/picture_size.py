"""The side of the pictures for a dVAE: one rule for all commands that take one and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dalle.config_files import value_of_run
from dalle.console import say
from dalle.dvae.model import DiscreteVAE
from dalle.errors import CheckpointError, UsageError
from dalle.files import read_object, real_path
from dalle.pretrained import CONFIG_FILE

IMAGE_SIZE = "image_size"  # key of `Pretrained.trained_on`
DEFAULT_SIDE = 256  # pixels, the paper's


def remember_size(vae: DiscreteVAE, size: int) -> None:
    """Makes the model folder say on pictures of which side, in pixels, a dVAE is trained."""
    vae.trained_on = {**vae.trained_on, IMAGE_SIZE: str(size)}


def trained_size(vae: DiscreteVAE, folder: Path | None = None) -> int:
    """The side in pixels of the pictures that a dVAE was trained on; 0 if unknown.

    Args:
        vae: knows it where it was saved with it.
        folder: it was loaded from. If the dVAE does not know it, RUN/config.yaml beside RUN/model
            does, or the grid of the prior in the same pipeline.
    """
    found = [_number(vae.trained_on.get(IMAGE_SIZE))]
    if folder is not None and not found[0]:
        found.append(_number(value_of_run(folder, "image-size")))
        found.append(_grid_of_pipeline(real_path(folder).parent) * vae.factor)
    return next((size for size in found if size and size % vae.factor == 0), 0)


def side_for(
    owner: str,
    vae: DiscreteVAE,
    folder: Path | None = None,
    *,
    asked: int = 0,
    otherwise: int = DEFAULT_SIDE,
    option: str = "--image-size",
) -> int:
    """The side in pixels that pictures are cropped to: the one asked for, else that of the dVAE's
    training; where that is not known, `otherwise`, and a line says so.

    Args:
        owner: begins the line.
        vae, folder: as of `trained_size`.
        asked: 0 where nothing was.
        otherwise: taken to the nearest multiple of the dVAE's factor.
        option: of the command, by which another one is asked for.

    Raises:
        UsageError: one was asked for that is no multiple of the factor.
    """
    if asked:
        if asked < 0 or asked % vae.factor:
            raise UsageError(f"{owner}: image_size must be a multiple of {vae.factor}, got {asked}")
        return asked
    known = trained_size(vae, folder)
    if known:
        return known
    side = max(1, round(otherwise / vae.factor)) * vae.factor
    say(
        f"{owner}: {folder or 'the dVAE'} does not say on which size it was trained; pictures are "
        f"of {side} x {side} pixels, {option} takes another size"
    )
    return side


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() and text.isascii() and len(text) < 6 else 0


def _grid_of_pipeline(folder: Path) -> int:
    """The image tokens along a side of a pipeline's prior; 0 where the folder is none."""
    try:
        if read_object(folder / CONFIG_FILE, CheckpointError).get("class") != "Pipeline":
            return 0
        head = read_object(folder / "prior" / CONFIG_FILE, CheckpointError)
    except CheckpointError:
        return 0
    config: Any = head.get("config")
    grid = config.get("grid") if isinstance(config, dict) else None
    first = grid[0] if isinstance(grid, list) and grid else 0
    return first if type(first) is int and 0 < first < 10_000 else 0
