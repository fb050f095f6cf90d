"""Data sets by name: the built-in ones, and folders of pictures with captions."""

from __future__ import annotations

from pathlib import Path

from dalle.console import say
from dalle.data.emoji import load_emoji
from dalle.data.folder import FolderPairs
from dalle.data.pairs import Pairs, counted, every_caption
from dalle.data.shapes_pairs import ShapesPairs
from dalle.errors import DataError, UsageError

BUILT_IN = ("shapes", "emoji")


def load_pairs(spec: str, *, image_size: int, split: str = "train", seed: int = 0) -> Pairs:
    """Opens a data set by name.

    Args:
        spec: "shapes", "emoji", or the path of a folder of pictures and .txt captions.
        image_size: side in pixels of the built-in sets; folders keep their own sizes.
        split: "train", "test", "zero" for shapes; "train", "heldout" for emoji; a folder is all
            "train".
        seed: which pictures of the endless set `shapes`; unused elsewhere.

    Raises:
        UsageError: unknown split.
        DataError: no such folder, or nothing usable in it.
        EnvironmentProblem: the emoji packages are not installed.
    """
    if spec == "shapes":
        return ShapesPairs(split, image_size=image_size, seed=seed)
    if spec == "emoji":
        return load_emoji(image_size, split)
    if not Path(spec).is_dir():
        found = "a file" if Path(spec).exists() else "no such folder"
        raise DataError(
            f"data: spec must be one of {', '.join(BUILT_IN)} or a folder, got {spec!r} ({found})"
        )
    if split != "train":
        raise UsageError(f"data: split of a folder must be 'train', got {split!r}")
    pairs = FolderPairs(Path(spec))
    _say_what_is_there(pairs)
    return pairs


def _say_what_is_there(pairs: FolderPairs) -> None:
    """What a training does not see of a folder, or sees in parts."""
    if pairs.skipped:
        total = pairs.skipped.total()
        say(
            f"data: {len(pairs)} pairs in {pairs.name}, left out {total}: "
            f"{counted(pairs.skipped)} (`dalle data check` names them)"
        )
    if pairs.several:
        say(
            f"data: {len(pairs.several)} caption files hold several lines, "
            f"{len(every_caption(pairs))} captions in all; one of a picture's is drawn each time"
        )
