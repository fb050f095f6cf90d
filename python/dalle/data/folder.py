"""A folder of pictures, each with a .txt caption of the same stem.

Pictures are JPEG, PNG or WebP by content; the suffix only says which files to look at. A broken or
incomplete pair is counted by reason and left out, never fatal. Nothing is decoded before `load`
unless verification is asked for.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dalle import files as limited
from dalle.data.images import BadPicture, decode, open_checked, read_bytes
from dalle.errors import DataError, UsageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_CAPTION_BYTES = 64 << 10


def read_caption(path: Path) -> str:
    """A caption with runs of white space as single spaces.

    Raises:
        BadPicture: above 64 KiB, not UTF-8, empty, or unreadable.
    """
    try:
        if not path.is_file():
            raise BadPicture(path, "caption is not a file", "have a plain caption file")
        content = limited.read_bytes(path, MAX_CAPTION_BYTES)
    except OSError as error:
        if error.errno == errno.EFBIG:
            limit = f"have at most {MAX_CAPTION_BYTES} bytes"
            raise BadPicture(path, "caption too long", limit) from error
        raise BadPicture(path, "caption is not readable", "have a readable caption") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadPicture(path, "caption is not UTF-8", "have a caption in UTF-8") from error
    text = " ".join(text.replace("\0", " ").split())
    if not text:
        raise BadPicture(path, "caption is empty", "have a caption")
    return text


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def find_files(folder: Path) -> tuple[dict[str, list[Path]], dict[str, Path], Counter[str]]:
    """Pictures and captions below a folder by stem (path without suffix), and what was passed over.

    Hidden files and folders are passed over without a count; links to folders are not followed.
    """
    pictures: dict[str, list[Path]] = {}
    texts: dict[str, Path] = {}
    skipped: Counter[str] = Counter()

    def unreadable(_: OSError) -> None:
        skipped["folder is not readable"] += 1

    for parent, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.startswith("."):
                continue
            path = Path(parent) / name
            stem, suffix = os.path.splitext(path)
            if suffix.lower() in SUFFIXES:
                pictures.setdefault(stem, []).append(path)
            elif suffix.lower() == ".txt" and stem not in texts:
                texts[stem] = path
            else:
                skipped["neither picture nor caption"] += 1
    return pictures, texts, skipped


class FolderPairs:
    """Pairs of a folder, in the order of their paths.

    Args:
        folder: searched recursively.
        verify: "header" opens every picture and checks format and size; "full" decodes every one,
            so that `load` does not fail afterwards; "none" trusts the suffix.

    Attributes:
        paths: the pictures.
        image_size: 0, pictures have sizes of their own.
        skipped: reason -> count of what was left out.

    Raises:
        UsageError: unknown verify.
        DataError: no such folder, or no usable pair in it (the reasons are in the message).
    """

    image_size = 0

    def __init__(self, folder: Path | str, *, verify: str = "header") -> None:
        folder = Path(folder)
        if verify not in ("none", "header", "full"):
            raise UsageError(f"data: verify must be none, header or full, got {verify!r}")
        if not folder.is_dir():
            found = "a file" if folder.exists() else "no such folder"
            raise DataError(f"data: {folder} must be a folder, got {found}")
        self.name = folder.name or str(folder)
        pictures, texts, self.skipped = find_files(folder)
        self.skipped["caption without picture"] += len(texts.keys() - pictures.keys())
        self.paths: list[Path] = []
        captions: list[str] = []
        self._digests: list[bytes] = []  # of the files as they were verified
        self.problems: list[str] = []  # the first hundred, in words
        stems = tqdm(sorted(pictures), "verify", disable=None if verify == "full" else True)
        for stem in stems:
            first, *others = pictures[stem]
            if stem not in texts:
                self._skip(BadPicture(first, "picture without caption", "have a caption"))
                continue
            digest = b""
            try:
                caption = read_caption(texts[stem])
                if verify != "none":
                    content = read_bytes(first)
                    digest = _digest(content)
                    (decode if verify == "full" else open_checked)(content, first)
            except BadPicture as problem:
                self._skip(problem)
                continue
            self.skipped["second picture of a caption"] += len(others)
            self.paths.append(first)
            self._digests.append(digest)
            captions.append(caption)
        self.captions: Sequence[str] = captions
        self.skipped = +self.skipped  # without the zeros
        if not self.paths:
            why = ", ".join(f"{count} x {reason}" for reason, count in self.skipped.items())
            raise DataError(
                f"data: {folder} must hold pictures with .txt captions of the same name, "
                f"got no usable pair ({why or 'the folder is empty'})"
            )

    def _skip(self, problem: BadPicture) -> None:
        self.skipped[problem.reason] += 1
        if len(self.problems) < 100:
            self.problems.append(str(problem))

    def __len__(self) -> int:
        return len(self.paths)

    def digests(self) -> Iterator[bytes]:
        """A hash of each picture's file as it was verified; b"" of one that has gone since."""
        for path, digest in zip(self.paths, self._digests, strict=True):
            try:
                yield digest or _digest(read_bytes(path))
            except BadPicture:
                yield b""

    def load(self, i: int) -> np.ndarray:
        """Picture i, (H, W, 3) uint8.

        Raises:
            DataError: the file has gone or does not decode.
        """
        return decode(read_bytes(self.paths[i]), self.paths[i])
