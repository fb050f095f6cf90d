"""The registry of data sources: what `--data` takes.

A new source is one file with a `Source` and one line in `SOURCES` (CONTRIBUTING.md).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from dalle.console import say
from dalle.data import codes, emoji, folder, kept, shapes_pairs, shards, tables
from dalle.data.folder import walk
from dalle.data.mixture import CaptionChoice, MixedPairs, with_choice
from dalle.data.pairs import Pairs, format_counts, number_of_captions
from dalle.data.shard_files import is_shard_folder
from dalle.data.source import Source
from dalle.errors import DataError, UsageError
from dalle.files import real_path


def _open_kept(path: Path) -> Pairs:
    """What a filter has kept of a set that is opened again."""
    head, rows = kept.read_kept(path)
    source = head["source"]
    size, seed = int(source["image_size"]), int(source["seed"])
    pairs = load_pairs(str(source["data"]), image_size=size, seed=seed, report=False)
    return kept.apply_kept(path, head, rows, pairs)


SOURCES: tuple[Source, ...] = (  # of the forms, the first that fits is taken
    shapes_pairs.SOURCE,
    emoji.SOURCE,
    Source(name="a filtered set", fits=kept.is_kept_set, opens=_open_kept),
    codes.SOURCE,
    shards.SOURCE,
    tables.SOURCE,
    folder.SOURCE,
)
# name -> function of (image_size, split, seed) that opens the set, and refuses an unknown split.
BUILT_IN: dict[str, Callable[[int, str, int], Pairs]] = {
    source.name: source for source in SOURCES if source.fits is None
}
TAKEN = {
    "draw": "one of a picture's is drawn each time",
    "first": "the first of a picture's is taken",
    "join": "a picture's are one text, with spaces between",
}
CHOOSE_SET = "built-in:"  # before a name: the set, also where a folder has that name
# (whether a path has the form, what opens it); the first that fits is taken.
FOLDER_FORMATS: tuple[tuple[Callable[[Path], bool], Callable[[Path], Pairs]], ...] = tuple(
    (source.fits, source) for source in SOURCES if source.fits is not None
)


def load_pairs(
    spec: str,
    *,
    image_size: int,
    split: str = "train",
    seed: int = 0,
    report: bool = True,
    captions: CaptionChoice = "draw",
) -> Pairs:
    """Opens a data set by name.

    Args:
        spec: a name of `BUILT_IN`, also with a split (`shapes:test`), or the path of a file or
            folder of a form of `SOURCES`, such as a folder of pictures with .txt captions, or of
            tar shards; several are one a line, each with `=WEIGHT` behind it or none
            (`join_specs`).
        image_size: side in pixels of the built-in sets; others keep their own sizes.
        split: "train", "test", "zero" for shapes; "train", "heldout" for emoji; a folder is all
            "train". A split in `spec` counts instead.
        seed: which pictures of the endless set `shapes`; unused elsewhere.
        report: whether a line says what was left out.
        captions: which of a picture's several captions are trained on (`mixture.with_choice`).

    Raises:
        UsageError: unknown split, or weights that are given for some only.
        DataError: no such folder, or nothing usable in it.
        EnvironmentProblem: a package that the source needs is not installed.
    """
    specs = split_specs(spec)
    names, weights = [name for name, _ in specs], [weight for _, weight in specs]

    def load(name: str) -> Pairs:
        pairs = _load_one(name, image_size, split, seed)
        if report and built_in_of(name) is None:
            _report_skipped(pairs, captions)
        return with_choice(pairs, captions)

    if len(specs) == 1:
        return load(names[0])
    if weights.count(None) not in (0, len(weights)):
        lone = names[weights.index(None)]
        raise UsageError(f"data: weights must be given for all or for none, got none for {lone}")
    same = [_same_as(name) for name in names]
    if len(set(same)) < len(same):
        twice = next(name for name, key in zip(names, same, strict=True) if same.count(key) > 1)
        raise UsageError(f"data: sources must differ, got {twice} twice")
    parts = [load(name) for name in names]
    given = [weight for weight in weights if weight is not None]
    return MixedPairs(parts, given or None, names)


def _same_as(name: str) -> str:
    """What a source has in common with other names for it: ./a and a, shapes and shapes:train."""
    built_in = built_in_of(name)
    if built_in is None:
        return os.path.realpath(name)
    return f"{built_in[0]}:{built_in[1] or 'train'}"


def built_in_of(spec: str) -> tuple[str, str] | None:
    """The name and the split in NAME or NAME:SPLIT of a built-in set ("" without one); None for
    anything else. What exists under the whole name is a path, unless `CHOOSE_SET` is before it."""
    plain = spec.removeprefix(CHOOSE_SET)
    name, _, split = plain.partition(":")
    if name not in BUILT_IN or "=" in split or "\n" in split:  # with weights, or several
        return None
    if split and plain == spec and os.path.exists(spec):
        return None
    return name, split


def _load_one(spec: str, image_size: int, split: str, seed: int) -> Pairs:
    built_in = built_in_of(spec)
    if built_in is not None:
        return BUILT_IN[built_in[0]](image_size, built_in[1] or split, seed)
    opens = _opener(Path(spec))
    if opens is None:
        kind = "no such file" if _names_a_file(spec) else "no such folder"
        if Path(spec).exists():
            kind = f"a file; those that are taken are {', '.join((*tables.SUFFIXES, '.tar'))}"
        raise DataError(
            f"data: spec must be one of {', '.join(BUILT_IN)} or a folder, got {spec!r} ({kind})"
        )
    if split != "train":
        raise UsageError(f"data: split of a folder must be 'train', got {split!r}")
    return opens(Path(spec))


def join_specs(specs: Iterable[str]) -> str:
    """Several `--data` as one value, a line each."""
    return "\n".join(specs)


def split_specs(spec: str) -> list[tuple[str, float | None]]:
    """The sources in a value of `--data`, each with its weight; None where it has none.

    What exists under the whole name is a path, whatever stands in it.

    Raises:
        UsageError: a weight that is no number, or not positive and finite.
    """
    if built_in_of(spec) is not None or os.path.exists(spec):
        return [(spec, None)]
    specs: list[tuple[str, float | None]] = []
    for line in spec.split("\n"):
        name, equals, text = line.rpartition("=")
        if not name or built_in_of(line) is not None or os.path.exists(line):
            specs.append((line, None))
            continue
        try:
            weight = float(text)
        except ValueError:
            if built_in_of(name) is not None or os.path.exists(name):
                raise UsageError(
                    f"data: weight must be a number, got {text!r} for {name}"
                ) from None
            specs.append((line, None))
            continue
        if not 0 < weight < math.inf:
            raise UsageError(f"data: weight must be positive and finite, got {text} for {name}")
        specs.append((name, weight))
    return specs


def check_apart(owner: str, spec: str, out: Path) -> None:
    """Refuses a folder for results that is a source, or lies among the pictures or shards of one:
    the next run would read it. A filtered set has the sources that it was made of too.

    Raises:
        UsageError: in one line that begins with `owner`.
        DataError: a filtered set is damaged.
    """
    for name, _ in split_specs(spec):
        if built_in_of(name) is not None or not os.path.exists(name):
            continue
        if real_path(name) == real_path(out):
            raise UsageError(f"{owner}: out must be a new or empty folder, got that of data")
        for source in _made_of(name):
            if built_in_of(source) is not None:
                continue
            shards = is_shard_folder(Path(source))
            if (shards or is_picture_folder(source)) and _is_walked(Path(source), out):
                kind = "shards" if shards else "pictures"
                raise UsageError(f"{owner}: out must be a folder outside of the {kind}, got {out}")


def _made_of(name: str) -> list[str]:
    """A source; of a filtered set those that it was made of, as paths and names."""
    if built_in_of(name) is not None or not kept.is_kept_set(Path(name)):
        return [name]
    data = str(kept.read_kept(Path(name))[0]["source"]["data"])
    return [inner for spec, _ in split_specs(data) for inner in _made_of(spec)]


def _is_walked(source: Path, out: Path) -> bool:
    """Whether a walk through a folder, which follows links, comes to `out` or would once it is
    made."""
    target, places = real_path(out), set[tuple[int, int]]()
    if target.is_symlink():  # to itself: refused where it is made
        return False
    for parent in (target, *target.parents):
        with suppress(OSError):  # not there yet
            status = parent.stat()
            places.add((status.st_dev, status.st_ino))
    for entry in walk(source):
        if not isinstance(entry, str):
            with suppress(OSError):
                status = entry[0].stat()
                if (status.st_dev, status.st_ino) in places:
                    return True
    return False


def held_out_split(spec: str) -> str:
    """The split of a set with a name that is held out for scores; "" where it has none, or where
    another split than "train" is asked for."""
    name, split = built_in_of(spec) or ("", "")
    return getattr(BUILT_IN.get(name), "held_out", "") if split in ("", "train") else ""


def _suffix(weight: float | None) -> str:
    """A weight as it stands behind its source."""
    return "" if weight is None else f"={weight!r}".removesuffix(".0")


def data_here(spec: str, *, folders: bool = True) -> str:
    """What `--data` stands for in the current directory, as `load_pairs` takes it.

    A folder that has the name of a built-in set is taken, as "./shapes"; the set is then
    "built-in:shapes". Where both are there, a line says which is taken and how to take the other.

    Args:
        spec: as typed; several are one a line.
        folders: whether the command takes folders at all; if not, the set is taken.
    """
    return join_specs(_here(name, folders) + _suffix(weight) for name, weight in split_specs(spec))


def absolute(spec: str) -> str:
    """The same sources, whatever the current directory."""
    return join_specs(
        (str(real_path(name)) if built_in_of(name) is None else name) + _suffix(weight)
        for name, weight in split_specs(spec)
    )


def _here(spec: str, folders: bool) -> str:
    name = spec.removeprefix(CHOOSE_SET)
    built_in = built_in_of(spec)
    if built_in is None:
        return spec
    if built_in[1]:
        return spec if Path(name).exists() else name
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


def has_built_in(spec: str) -> bool:
    """Whether a built-in set is among the sources, so that a size must be chosen for it."""
    return any(built_in_of(name) is not None for name, _ in split_specs(spec))


def drawn_size(size: int) -> int:
    """The largest size up to `size`, but at least 24, that every built-in set can be drawn at."""
    return max(24, size // 8 * 8)


def _opener(path: Path) -> Callable[[Path], Pairs] | None:
    return next((opens for fits, opens in FOLDER_FORMATS if fits(path)), None)


def is_picture_folder(spec: str) -> bool:
    """Whether `spec` stands for plain picture files, which can be read without captions too.

    True also where nothing exists, unless the name is that of a table or a tar: reading it then
    fails with a clear message.
    """
    specs = split_specs(spec)
    if len(specs) > 1 or built_in_of(specs[0][0]) is not None:
        return False
    opens = _opener(Path(specs[0][0]))
    if opens is None:
        return not _names_a_file(specs[0][0])
    return bool(getattr(opens, "plain", False))


def _names_a_file(spec: str) -> bool:
    """Whether a path has the suffix of a table or a tar."""
    return Path(spec).suffix.lower() in (*tables.SUFFIXES, ".tar")


def _report_skipped(pairs: Pairs, captions: CaptionChoice) -> None:
    """Reports files that a training leaves out, and what it takes of several captions."""
    if pairs.skipped:
        total = pairs.skipped.total()
        named_by = getattr(pairs, "named_by", "")
        hint = f" (`{named_by}` names them)" if named_by else ""
        say(
            f"data: {len(pairs)} pairs in {pairs.name}, left out {total}: "
            f"{format_counts(pairs.skipped)}{hint}"
        )
    several = getattr(pairs, "several", {})
    if len(several):
        say(
            f"data: {len(several)} caption files hold several lines, "
            f"{number_of_captions(pairs)} captions in all; {TAKEN[captions]}"
        )
