"""A held-out part of a data set, chosen by the pictures' hashes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from dalle.configs import integers
from dalle.data.pairs import Pairs
from dalle.errors import DataError, UsageError

LEAST = 2  # pictures held out of a small set, whatever the share


class _Hashed(Protocol):
    def digests(self) -> Iterator[bytes]: ...


class Subset:
    """Some items of a set, in its order; everything else is the set's.

    Args:
        pairs: the set.
        items: which, sorted indices.
        name: in reports; the set's if left out.
    """

    def __init__(self, pairs: Pairs, items: Sequence[int] | np.ndarray, name: str = "") -> None:
        self.pairs = pairs
        self.items = integers("Subset", "items", items, 0)
        self.name, self.image_size = name or pairs.name, pairs.image_size
        self.captions: Sequence[str] = [pairs.captions[i] for i in self.items]
        several: Mapping[int, Sequence[str]] = getattr(pairs, "several", {})
        self.several = {k: several[i] for k, i in enumerate(self.items) if i in several}
        self.skipped: Counter[str] = Counter(pairs.skipped)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def paths(self) -> list[Path]:
        """The file of each picture; none where the set has no files."""
        paths = getattr(self.pairs, "paths", None)
        return [] if paths is None else [paths[i] for i in self.items]

    def digests(self) -> Iterator[bytes]:
        """The hash of each picture; b"" of one that cannot be read."""
        hashes = list(picture_hashes(self.pairs))
        return (hashes[i] for i in self.items)

    def load(self, i: int) -> np.ndarray:
        """Picture i, (H, W, 3) uint8. Raises DataError where it does not decode."""
        return self.pairs.load(self.items[i])


def picture_hashes(pairs: Pairs) -> Iterator[bytes]:
    """A hash of each picture: of its file where the set knows it, else of its pixels; b"" of one
    that cannot be read."""
    if hasattr(pairs, "digests"):
        yield from cast(_Hashed, pairs).digests()
        return
    for i in range(len(pairs)):
        try:
            pixels = np.ascontiguousarray(pairs.load(i)).data
        except DataError:
            yield b""
        else:
            yield hashlib.blake2b(pixels, digest_size=16).digest()


def hold_out(pairs: Pairs, share: float) -> tuple[Subset, Subset]:
    """The training part and the held-out part of a set.

    A picture is held out where its hash, as a fraction of the largest, is below `share`. So a
    picture stays on its side when others are added or renamed, and copies of a picture are on one
    side. Where fewer than two different pictures are, those of the lowest hashes are held out.

    Args:
        pairs: at least four different pictures.
        share: of the pictures to hold out, above 0 and at most .5.

    Raises:
        UsageError: a share out of range.
        DataError: too few different pictures.
    """
    if not 0 < share <= 0.5:
        raise UsageError(f"hold_out: share must be above 0 and at most 0.5, got {share}")
    hashes = [hashlib.blake2b(digest, digest_size=8).digest() for digest in picture_hashes(pairs)]
    different = sorted(set(hashes))
    if len(different) < 2 * LEAST:
        raise DataError(
            f"{pairs.name}: different pictures must be at least {2 * LEAST} for a held-out part, "
            f"got {len(different)}"
        )
    bound = max(int(share * 2**64).to_bytes(8, "big"), different[LEAST])
    held = np.array([digest < bound for digest in hashes])
    train, validation = np.flatnonzero(~held), np.flatnonzero(held)
    return Subset(pairs, train), Subset(pairs, validation, f"{pairs.name} (held out)")
