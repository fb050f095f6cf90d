"""Which set a pipeline was trained on, and its held-out part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dalle.data.shapes import scenes
from dalle.data.sources import drawn_size
from dalle.demo.config import DEMO_SETS
from dalle.demo.run import check_extras
from dalle.demo.sets import DataSet, EmojiSet, FolderSet, ShapesSet, open_parts
from dalle.errors import DataError, UsageError
from dalle.files import read_object
from dalle.pipeline import Pipeline
from dalle.prior.config import PAD
from dalle.recipes import load_recipe

LONGEST = 128  # tokens of such a caption
GUESS = 64  # captions by which the tokenizer is recognised


def open_set(
    owner: str, folder: Path, pipeline: Pipeline, given: str | None, seed: int
) -> tuple[DataSet, str]:
    """The set of a pipeline, at its size.

    Args:
        owner: begins the line of an error.
        folder: of the pipeline; the run that made it may lie around it.
        pipeline: loaded.
        given: "emoji", "shapes" or a folder of pictures; None: looked for.
        seed: of a set that is drawn.

    Returns:
        The set, and by what it is known: "given", "run" or "tokenizer".

    Raises:
        UsageError, DataError: there is no such set.
        EnvironmentProblem: a package of it is missing.
    """
    record = run_record(folder)
    name, known = given, "given"
    if name is None and isinstance(record.get("data"), str):
        name, known = str(record["data"]), "run"
    if name is None:
        name, known = guess(owner, pipeline), "tokenizer"
    side = drawn_size(pipeline.image_size)
    if name == "emoji":
        check_extras(owner, EmojiSet.packages)
        return EmojiSet(side), known
    if name == "shapes":
        recipe = load_recipe("shapes", "default")
        return ShapesSet(side, seed, recipe.items, recipe.unseen_items), known
    share = record.get("validation") if known == "run" else None
    share = share if isinstance(share, float) and 0 < share <= 0.5 else 0.1
    try:
        return FolderSet(*open_parts(name, share, side, seed), pipeline.image_size), known
    except (DataError, UsageError) as problem:
        reason = str(problem).removeprefix("data: ").removeprefix("data ")
        hint = "" if known == "given" else "; give the set by --data"
        raise type(problem)(f"{owner}: data: {reason}{hint}") from problem


def run_record(folder: Path) -> dict[str, Any]:
    """What the run around a pipeline says about itself; empty where there is none."""
    for name in ("demo.json", "train.json"):
        path = folder.absolute().parent / "work" / name
        if path.is_file():
            try:
                return read_object(path, DataError)
            except DataError:
                return {}
    return {}


def guess(owner: str, pipeline: Pipeline) -> str:
    """The set of `DEMO_SETS` whose captions take the fewest tokens a letter.

    A tokenizer learns the words of its set, and spells others.
    """
    some = {"shapes": [scene.caption for scene in scenes()[:GUESS]]}
    try:
        check_extras(owner, EmojiSet.packages)
        some["emoji"] = list(EmojiSet(16).unseen[0].captions[:GUESS])
    except (DataError, OSError):
        pass

    def tokens(name: str) -> float:
        captions = some[name]
        count = int((pipeline.tokenizer.encode(captions, LONGEST) != PAD).sum())
        return count / sum(map(len, captions))

    return min((name for name in DEMO_SETS if name in some), key=tokens)
