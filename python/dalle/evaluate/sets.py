"""SOURCE: what a measure takes pictures from, whatever holds them.

A folder of pictures with or without captions, any format that `dalle.data.sources` knows, a
built-in set (`shapes`, `shapes:test`), the output of `dalle sample`, or a pipeline, which draws
(`drawings`).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dalle.captions import caption_lines
from dalle.configs import integer
from dalle.console import say
from dalle.data.codes import stores_of
from dalle.data.folder import find_pictures
from dalle.data.images import BadPicture, decode, read_bytes
from dalle.data.pairs import Pairs, evenly_spaced, fingerprints, hashed_fingerprint
from dalle.data.sources import (
    BUILT_IN,
    built_in_of,
    is_picture_folder,
    load_pairs,
    open_folder,
)
from dalle.data.split import Subset
from dalle.errors import CheckpointError, DataError, UsageError
from dalle.files import json_sha256, read_json
from dalle.files import read_bytes as read_file
from dalle.pipeline import Pipeline

RECORD = "samples.json"  # of `dalle sample`
SINGLE = re.compile(r"[0-9]+-[a-z0-9-]+/[0-9]+\.png")  # a picture that it names
DRAWN_SIDE = 64  # pixels of a built-in set's pictures, where nothing says otherwise


class Pictures:
    """Picture files as `Pairs`, with captions where there are some ("" elsewhere).

    Args:
        name: of the set.
        paths: the files.
        captions: one for each.
    """

    image_size = 0

    def __init__(self, name: str, paths: Sequence[Path], captions: Sequence[str]) -> None:
        self.name, self.paths = name, list(paths)
        self.captions: Sequence[str] = list(captions)
        self.skipped: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, i: int) -> np.ndarray:
        """Picture i, (H, W, 3) uint8. Raises DataError where it does not decode."""
        return decode(read_bytes(self.paths[i]), self.paths[i])

    def digests(self) -> Iterator[bytes]:
        """A hash of each file's bytes; b"" of one that cannot be read."""
        for path in self.paths:
            try:
                yield hashlib.blake2b(read_bytes(path), digest_size=16).digest()
            except BadPicture:
                yield b""

    def fingerprint(self) -> dict[str, str]:
        """Hashes of "captions" and "pictures"."""
        return hashed_fingerprint(self)


@dataclass(frozen=True)
class Source:
    """A set of pictures that was opened.

    Attributes:
        spec: as it was asked for.
        kind: "folder", "samples", "pipeline", "built-in" or "pairs".
        pairs: the pictures.
        details: what else a record should say, e.g. how they were drawn.
    """

    spec: str
    kind: str
    pairs: Pairs
    details: dict[str, Any]

    def __len__(self) -> int:
        return len(self.pairs)


def is_pipeline(source: object) -> bool:
    """Whether a set is a pipeline that draws: the object, or the path of its folder."""
    if not isinstance(source, (str, Path)):
        return isinstance(source, Pipeline)
    file = Path(source) / "config.json"
    if built_in_of(str(source)) is not None or not file.is_file():
        return False
    try:
        head = read_json(file, CheckpointError)
    except CheckpointError:
        return False
    return isinstance(head, dict) and head.get("class") == "Pipeline"


def open_samples(owner: str, folder: Path, *, first_only: bool = False) -> Pictures:
    """The pictures that `dalle sample` left in a folder, with their captions.

    Args:
        owner: begins the line of an error.
        folder: with samples.json.
        first_only: only the best of each caption.

    Raises:
        DataError: samples.json names none.
    """
    content = read_json(folder / RECORD, CheckpointError)
    records = content.get("records") if isinstance(content, dict) else content
    paths, captions = [], []
    for entry in records if isinstance(records, list) else ():
        names = entry.get("files") if isinstance(entry, dict) else None
        if not isinstance(names, list):
            continue
        good = [n for n in names if isinstance(n, str) and SINGLE.fullmatch(n)]
        good = good[:1] if first_only else good
        paths += [folder / name for name in good]
        captions += [str(entry.get("caption", ""))] * len(good)
    if not paths:
        raise DataError(f"{owner}: {folder / RECORD} must name pictures, got none")
    return Pictures(folder.name or str(folder), paths, captions)


def open_source(
    owner: str,
    name: str,
    source: str | Path | Pairs,
    *,
    count: int | None = None,
    image_size: int = DRAWN_SIDE,
    seed: int = 0,
    first_only: bool = False,
) -> Source:
    """Opens a SOURCE that holds pictures; a pipeline is opened by `drawings.draw_source`.

    Args:
        owner, name: of the command and the option, which begin the line of an error.
        source: a folder of pictures, of `dalle sample` or of a format of `dalle.data.sources`, a
            built-in set as NAME or NAME:SPLIT, or a `Pairs` object.
        count: pictures at most, evenly spaced; None takes all.
        image_size: side of a built-in set's pictures in pixels.
        seed: of a built-in set that is drawn.
        first_only: of samples, only the best of each caption.

    Raises:
        DataError: no such folder, no picture in it, or a code store.
        UsageError: something else than a set.
    """
    if count is not None:
        count = integer(owner, "count", count, 1)
    if not isinstance(source, (str, Path)):
        if not all(hasattr(source, part) for part in ("load", "captions", "__len__")):
            got = type(source).__name__
            raise UsageError(f"{owner}: {name} must be a path, a Pairs or a Pipeline, got {got}")
        kind, pairs, spec = "pairs", source, source.name
    else:
        spec = str(source)
        if not spec:
            raise UsageError(f"{owner}: {name} must be a path or a name, got an empty one")
        kind, pairs = _opened(owner, name, spec, image_size, seed, first_only)
    for store in stores_of(pairs):
        raise DataError(
            f"{owner}: {name} must hold pictures, got the codes of pictures in {store.folder}; "
            "take the set that they were made from"
        )
    if not len(pairs):
        raise DataError(f"{owner}: {name} must hold pictures, got none in {spec}")
    if count is not None and count < len(pairs):
        pairs = Subset(pairs, evenly_spaced(len(pairs), count))
    return Source(spec, kind, pairs, {})


def _opened(
    owner: str, name: str, spec: str, image_size: int, seed: int, first_only: bool
) -> tuple[str, Pairs]:
    if built_in_of(spec) is not None:
        return "built-in", load_pairs(spec, image_size=image_size, seed=seed)
    folder = Path(spec)
    if not folder.is_dir():
        if not is_picture_folder(spec):
            return "pairs", load_pairs(spec, image_size=image_size)
        kind = "a file" if folder.exists() else "no such folder"
        raise DataError(
            f"{owner}: {name} must be a folder of pictures, of dalle sample or of a pipeline, or "
            f"one of {', '.join(BUILT_IN)}, got {spec} ({kind})"
        )
    if (folder / RECORD).is_file():
        return "samples", open_samples(owner, folder, first_only=first_only)
    if not is_picture_folder(spec):
        return "pairs", open_folder(folder)
    try:
        return "folder", load_pairs(spec, image_size=image_size)
    except DataError:
        paths = find_pictures(folder)
        if not paths:
            raise DataError(f"{owner}: {name} must hold pictures, got none in {spec}") from None
        say(f"{owner}: {name}: {len(paths)} pictures, none with a caption")
        return "folder", Pictures(folder.name or spec, paths, [""] * len(paths))


def picture_hash(pairs: Pairs) -> str:
    """A hash of a set's pictures in their order, whatever their captions."""
    prints = {name: value for name, value in fingerprints(pairs).items() if name != "captions"}
    return prints["pictures"] if set(prints) == {"pictures"} else json_sha256(prints)[:16]


def describe(source: Source, used: int) -> dict[str, Any]:
    """What a record says of a set: where from, hashes, pictures used and left out."""
    return {
        "source": source.spec,
        "kind": source.kind,
        "pictures": used,
        "fingerprint": picture_hash(source.pairs),
        "captions_fingerprint": fingerprints(source.pairs).get("captions"),
        "skipped": dict(source.pairs.skipped),
        **source.details,
    }


def captions_of_file(owner: str, path: Path) -> list[str]:
    """The captions of a text file, one a line.

    Raises:
        DataError: it cannot be read, or holds none.
    """
    try:
        lines = caption_lines(read_file(path).decode())
    except OSError as error:
        reason = error.strerror
        raise DataError(f"{owner}: captions must be readable text, got {path}: {reason}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{owner}: captions must be readable text, got {path}: byte {error.start} is not UTF-8"
        ) from error
    if not lines:
        raise DataError(f"{owner}: captions must hold a line of text, got none in {path}")
    return lines
