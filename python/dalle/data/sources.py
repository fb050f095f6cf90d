"""The registry of data sources: what `--data` takes.

A new source is one file with a `Source` and one line in `SOURCES` (CONTRIBUTING.md).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dalle.console import say
from dalle.data import emoji, folder, shapes_pairs, shards
from dalle.data.pairs import Pairs, format_counts, number_of_captions
from dalle.data.source import Source
from dalle.errors import DataError, UsageError

SOURCES: tuple[Source, ...] = (  # of the forms, the first that fits is taken
    shapes_pairs.SOURCE,
    emoji.SOURCE,
    shards.SOURCE,
    folder.SOURCE,
)
# name -> function of (image_size, split, seed) that opens the set, and refuses an unknown split.
BUILT_IN: dict[str, Callable[[int, str, int], Pairs]] = {
    source.name: source for source in SOURCES if source.fits is None
}
CHOOSE_SET = "built-in:"  # before a name: the set, also where a folder has that name
# (whether a path has the form, what opens it); the first that fits is taken.
FOLDER_FORMATS: tuple[tuple[Callable[[Path], bool], Callable[[Path], Pairs]], ...] = tuple(
    (source.fits, source) for source in SOURCES if source.fits is not None
)


def load_pairs(spec: str, *, image_size: int, split: str = "train", seed: int = 0) -> Pairs:
    """Opens a data set by name.

    Args:
        spec: a name of `BUILT_IN`, or the path of a file or folder of a form of `SOURCES`, such as
            a folder of pictures with .txt captions, or of tar shards.
        image_size: side in pixels of the built-in sets; others keep their own sizes.
        split: "train", "test", "zero" for shapes; "train", "heldout" for emoji; a folder is all
            "train".
        seed: which pictures of the endless set `shapes`; unused elsewhere.

    Raises:
        UsageError: unknown split.
        DataError: no such folder, or nothing usable in it.
        EnvironmentProblem: a package that the source needs is not installed.
    """
    if spec in BUILT_IN:
        return BUILT_IN[spec](image_size, split, seed)
    opens = _opener(Path(spec))
    if opens is None:
        kind = "a file" if Path(spec).exists() else "no such folder"
        raise DataError(
            f"data: spec must be one of {', '.join(BUILT_IN)} or a folder, got {spec!r} ({kind})"
        )
    if split != "train":
        raise UsageError(f"data: split of a folder must be 'train', got {split!r}")
    pairs = opens(Path(spec))
    _report_skipped(pairs)
    return pairs


def held_out_split(spec: str) -> str:
    """The split of a set with a name that is held out for scores; "" where it has none."""
    return getattr(BUILT_IN.get(spec), "held_out", "")


def data_here(spec: str, *, folders: bool = True) -> str:
    """What `--data` stands for in the current directory, as `load_pairs` takes it.

    A folder that has the name of a built-in set is taken, as "./shapes"; the set is then
    "built-in:shapes". Where both are there, a line says which is taken and how to take the other.

    Args:
        spec: as typed.
        folders: whether the command takes folders at all; if not, the set is taken.
    """
    name = spec.removeprefix(CHOOSE_SET)
    if name not in BUILT_IN:
        return spec
    if not Path(name).is_dir():
        return name
    if not folders:
        say(f"data: {name} is the built-in set; for the folder: dalle train --data ./{name}")
    elif name == spec:
        say(
            f"data: {name} is the folder ./{name}, since it is here; "
            f"for the built-in set: --data {CHOOSE_SET}{name}"
        )
        return f"./{name}"
    return name


def open_folder(path: Path) -> Pairs:
    """A file or folder of any form of `SOURCES`, without a line on what was left out.

    Raises:
        DataError: nothing there, or nothing usable in it.
    """
    return (_opener(path) or folder.FolderPairs)(path)


def drawn_size(size: int) -> int:
    """The largest size up to `size`, but at least 24, that every built-in set can be drawn at."""
    return max(24, size // 8 * 8)


def _opener(path: Path) -> Callable[[Path], Pairs] | None:
    return next((opens for fits, opens in FOLDER_FORMATS if fits(path)), None)


def is_picture_folder(spec: str) -> bool:
    """Whether `spec` stands for plain picture files, which can be read without captions too.

    True also where nothing exists: reading it then fails with a clear message.
    """
    if spec in BUILT_IN:
        return False
    opens = _opener(Path(spec))
    return opens is None or bool(getattr(opens, "plain", False))


def _report_skipped(pairs: Pairs) -> None:
    """Reports files that a training leaves out, and captions of which it draws one each time."""
    if pairs.skipped:
        total = pairs.skipped.total()
        hint = " (`dalle data check` names them)" if hasattr(pairs, "problems") else ""
        say(
            f"data: {len(pairs)} pairs in {pairs.name}, left out {total}: "
            f"{format_counts(pairs.skipped)}{hint}"
        )
    several = getattr(pairs, "several", {})
    if len(several):
        say(
            f"data: {len(several)} caption files hold several lines, "
            f"{number_of_captions(pairs)} captions in all; one of a picture's is drawn each time"
        )
