"""A folder of pictures, each with a .txt of the same name that holds its captions, one a line.

Pictures are JPEG, PNG or WebP by content; the suffix only says which files to look at. A broken or
incomplete pair is counted by reason and left out, never fatal. Nothing is decoded before `load`
unless verification is asked for.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dalle.data.containers import AVIF
from dalle.data.images import DECODERS, BadPicture, decode, open_checked, read_bytes
from dalle.data.pairs import format_counts, hashed_fingerprint
from dalle.data.progress import rows_in_blocks, state_of
from dalle.data.source import Source
from dalle.data.texts import MAX_CAPTION_BYTES as MAX_CAPTION_BYTES
from dalle.data.texts import read_captions
from dalle.errors import DataError, UsageError

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", *[".avif"] * (AVIF in DECODERS))
OTHER_SUFFIXES = (
    *[".avif"] * (AVIF not in DECODERS),
    *(".bmp", ".gif", ".heic", ".heif", ".ico", ".jp2", ".jxl", ".pbm", ".pgm", ".pnm"),
    *(".ppm", ".psd", ".svg", ".tga", ".tif", ".tiff"),
)

VERIFIED = "verified"  # the pass whose results are kept


def digest_of(content: bytes) -> bytes:
    """The hash of a picture's file, 16 bytes."""
    return hashlib.blake2b(content, digest_size=16).digest()


def walk(folder: Path) -> Iterator[tuple[Path, list[str]] | str]:
    """Every folder from this one down, with the names of its files; links are followed.

    A folder that several paths lead to is visited once, by a path without links where it has one
    below `folder`; so cycles of links end. Hidden files and folders are skipped.

    Yields:
        (folder, sorted names), or the reason why one was skipped.
    """
    visited: set[tuple[int, int]] = set()
    links = [folder]
    while links:
        level, links = sorted(links), []
        for start in level:
            stack = [start]
            while stack:
                parent = stack.pop()
                try:
                    status = parent.stat()
                    entries = sorted(os.scandir(parent), key=lambda entry: entry.name)
                except OSError:
                    yield "folder is not readable"
                    continue
                if (status.st_dev, status.st_ino) in visited:
                    yield "link to a folder that is there already"
                    continue
                visited.add((status.st_dev, status.st_ino))
                names, subfolders = [], []
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if not _is_folder(entry):
                        names.append(entry.name)
                    elif entry.is_symlink():
                        links.append(parent / entry.name)
                    else:
                        subfolders.append(parent / entry.name)
                stack += reversed(subfolders)
                yield parent, names


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def find_files(folder: Path) -> tuple[dict[str, list[Path]], dict[str, Path], Counter[str]]:
    """Pictures and captions below a folder by stem (path without suffix), and counts of the rest.

    Stems are compared in Unicode's composed form, in which file systems and archives differ.
    """
    pictures: dict[str, list[Path]] = {}
    texts: dict[str, Path] = {}
    skipped: Counter[str] = Counter()
    for entry in walk(folder):
        if isinstance(entry, str):
            skipped[entry] += 1
            continue
        parent, names = entry
        for name in sorted(names, key=lambda name: (not name.endswith(".txt"), name)):
            path = parent / name
            stem, suffix = os.path.splitext(name)
            stem = os.path.join(parent, unicodedata.normalize("NFC", stem))
            suffix = suffix.lower()
            if suffix in SUFFIXES:
                pictures.setdefault(stem, []).append(path)
            elif suffix == ".txt":
                skipped["second caption file of a picture"] += stem in texts
                texts.setdefault(stem, path)
            elif suffix in OTHER_SUFFIXES:
                skipped["picture of another format"] += 1
            elif path.is_symlink() and not os.path.exists(path):  # where exists() raises nothing
                skipped["link to nothing"] += 1
            else:
                skipped["neither picture nor caption"] += 1
    return pictures, texts, skipped


def find_pictures(folder: Path) -> list[Path]:
    """The files below a folder with a picture's suffix, with or without captions, sorted."""
    folders = [part for part in walk(folder) if not isinstance(part, str)]
    paths = (parent / name for parent, names in folders for name in names)
    return sorted(path for path in paths if path.suffix.lower() in SUFFIXES)


class FolderPairs:
    """Pairs of a folder, in the order of their paths.

    Args:
        folder: searched recursively.
        verify: "header" opens every picture and checks format and size; "full" decodes every one,
            so that `load` does not fail afterwards; "none" trusts the suffix.
        keep: an existing folder where what was verified is kept (`progress`), so that the same call
            goes on after a stop; `progress.finish(keep, VERIFIED)` removes it.

    Attributes:
        paths: the pictures.
        captions: the first caption of each.
        several: item -> all its captions, where it has more than one; training draws one of them.
        image_size: 0, as sizes differ.
        skipped: reason -> number of files left out.

    Raises:
        UsageError: unknown verify.
        DataError: no such folder, or no usable pair in it (the reasons are in the message).
    """

    image_size = 0
    named_by = "dalle data check"  # the command that names what was left out

    def __init__(
        self, folder: Path | str, *, verify: str = "header", keep: Path | None = None
    ) -> None:
        folder = Path(folder)
        if verify not in ("none", "header", "full"):
            raise UsageError(f"data: verify must be none, header or full, got {verify!r}")
        if not folder.is_dir():
            kind = "a file" if folder.exists() else "no such folder"
            raise DataError(f"data: {folder} must be a folder, got {kind}")
        self.name = folder.name or str(folder)
        pictures, texts, self.skipped = find_files(folder)
        self.skipped["caption without picture"] += len(texts.keys() - pictures.keys())
        self.paths: list[Path] = []
        captions: list[str] = []
        several: dict[int, Sequence[str]] = {}
        self._digests: list[bytes] = []  # hashes of the verified files
        self.problems: list[str] = []  # messages of the first hundred files left out
        stems = sorted(pictures)

        def look(stem: str) -> list[Any]:
            return _look(pictures[stem], texts.get(stem), verify)

        rows: Iterable[Any]
        if keep is None:
            rows = map(look, tqdm(stems, "verify", disable=None if verify == "full" else True))
        else:
            files = state_of(path for stem in stems for path in (*pictures[stem], texts.get(stem)))
            rows = rows_in_blocks(
                "data check",
                keep,
                {"pass": "verify", "how": verify, "files": files},
                len(stems),
                lambda items: [look(stem) for stem in stems[items.start : items.stop]],
                " pictures",
                name=VERIFIED,
            )
        for stem, (lines, place, digest, left_out) in zip(stems, rows, strict=True):
            for reason, line in left_out:
                self.skipped[reason] += 1
                if len(self.problems) < 100:
                    self.problems.append(line)
            if not lines:
                continue
            if len(lines) > 1:
                several[len(captions)] = tuple(lines)
            self.skipped["second picture of a caption"] += len(pictures[stem]) - place - 1
            self.paths.append(pictures[stem][place])
            self._digests.append(bytes.fromhex(digest))
            captions.append(lines[0])
        self.captions: Sequence[str] = captions
        self.several: Mapping[int, Sequence[str]] = several
        self.skipped = +self.skipped  # without the zeros
        if not self.paths:
            why = format_counts(self.skipped)
            raise DataError(
                f"data: {folder} must hold pictures with .txt captions of the same name, "
                f"got no usable pair ({why or 'the folder is empty'})"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def digests(self) -> Iterator[bytes]:
        """Hash of each picture's file when it was verified; b"" of one that has gone since."""
        for path, digest in zip(self.paths, self._digests, strict=True):
            try:
                yield digest or digest_of(read_bytes(path))
            except BadPicture:
                yield b""

    def fingerprint(self) -> dict[str, str]:
        """Hashes of "captions" and "pictures"; every file that was not verified is read."""
        return hashed_fingerprint(self)

    def read_bytes(self, i: int) -> tuple[bytes, str]:
        """The file of picture i, and its name for messages. Raises DataError where it has gone."""
        return read_bytes(self.paths[i]), str(self.paths[i])

    def load(self, i: int) -> np.ndarray:
        """Picture i, (H, W, 3) uint8.

        Raises:
            DataError: the file has gone or does not decode.
        """
        return decode(read_bytes(self.paths[i]), self.paths[i])


def _look(paths: Sequence[Path], text: Path | None, verify: str) -> list[Any]:
    """The captions of a stem, the place of its first valid picture, the hash of that file ("" of
    one that was not read), and (reason, line) of what is left out; no captions where there is no
    pair."""
    left_out: list[tuple[str, str]] = []

    def leave_out(problem: BadPicture) -> None:
        left_out.append((problem.reason, str(problem)))

    try:
        if text is None:
            raise BadPicture(paths[0], "picture without caption", "have a caption")
        lines = read_captions(text)
    except BadPicture as problem:
        leave_out(problem)
        return [[], 0, "", left_out]
    for place, path in enumerate(paths):
        try:
            content = b"" if verify == "none" else read_bytes(path)
            if content:
                (decode if verify == "full" else open_checked)(content, path)
        except BadPicture as problem:
            leave_out(problem)
            continue
        return [lines, place, digest_of(content).hex() if content else "", left_out]
    return [[], 0, "", left_out]


SOURCE = Source(
    name="a folder of pictures with .txt captions", fits=Path.is_dir, opens=FolderPairs, plain=True
)
