"""A held-out part of a data set, chosen by the pictures' hashes."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from dalle.configs import integers
from dalle.data.pairs import (
    Pairs,
    captions_of,
    fingerprints,
    hashed_fingerprint,
    picture_hashes,
)
from dalle.errors import DataError, UsageError

LEAST = 2  # pictures held out of a small set, whatever the share
MOST = 606_000  # pictures held out of a large one: as many as the paper's (A.2)
CHUNK = 1 << 16


class TooFewPictures(DataError):
    """A set has too few different pictures for a held-out part."""


class Without(Sequence[int]):
    """The numbers 0 .. total - 1 without some, in order; keeps only those that are left out.

    Args:
        total: how many numbers there are.
        out: sorted, different numbers among them.
    """

    def __init__(self, total: int, out: np.ndarray) -> None:
        self.total, self.out = total, out.astype(np.int64)
        self._before = self.out - np.arange(len(out))  # numbers that stay below each one left out

    def __len__(self) -> int:
        return self.total - len(self.out)

    @overload
    def __getitem__(self, k: int) -> int: ...
    @overload
    def __getitem__(self, k: slice) -> list[int]: ...
    def __getitem__(self, k: int | slice) -> int | list[int]:
        if isinstance(k, slice):
            return [self[j] for j in range(*k.indices(len(self)))]
        k = k + len(self) if k < 0 else k
        if not 0 <= k < len(self):
            raise IndexError(f"items must be 0 .. {len(self) - 1}, got {k}")
        return int(k + np.searchsorted(self._before, k, "right"))

    def index(self, value: int, start: int = 0, stop: int | None = None) -> int:
        """The place of a number; ValueError where it is left out."""
        place = int(value - np.searchsorted(self.out, value))
        if not start <= place < (len(self) if stop is None else stop) or self[place] != value:
            raise ValueError(f"{value} is not among the items")
        return place


class Picked(Sequence[str]):
    """The captions of some items, read when they are asked for."""

    def __init__(self, captions: Sequence[str], items: Sequence[int]) -> None:
        self.captions, self.items = captions, items

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, k: int) -> str: ...
    @overload
    def __getitem__(self, k: slice) -> list[str]: ...
    def __getitem__(self, k: int | slice) -> str | list[str]:
        if isinstance(k, slice):
            return [self[j] for j in range(*k.indices(len(self)))]
        return self.captions[self.items[k]]


class PickedSeveral(Mapping[int, Sequence[str]]):
    """The items among some that have several captions, read when they are asked for."""

    def __init__(self, several: Mapping[int, Sequence[str]], items: Sequence[int]) -> None:
        self.several, self.chosen = several, items

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[int]:
        if not isinstance(self.chosen, Without):  # whose search is linear
            yield from (k for k, item in enumerate(self.chosen) if item in self.several)
            return
        for item in self.several:
            try:
                yield self.chosen.index(item)
            except ValueError:
                continue

    def __contains__(self, k: object) -> bool:
        return isinstance(k, int) and 0 <= k < len(self.chosen) and self.chosen[k] in self.several

    def __getitem__(self, k: int) -> Sequence[str]:
        return self.several[self.chosen[k]]


class Subset:
    """Some items of a set, in its order; everything else is the set's.

    Args:
        pairs: the set.
        items: which, sorted indices.
        name: in reports; the set's if left out.
    """

    def __init__(
        self, pairs: Pairs, items: Sequence[int] | np.ndarray | Without, name: str = ""
    ) -> None:
        self.pairs = pairs
        self.items: Sequence[int] = items if isinstance(items, Without) else []
        if not isinstance(items, Without):
            self.items = integers("Subset", "items", items, 0)
        self.name, self.image_size = name or pairs.name, pairs.image_size
        self.indexed = is_indexed(pairs)
        several: Mapping[int, Sequence[str]] = getattr(pairs, "several", {})
        self.captions: Sequence[str] = Picked(pairs.captions, self.items)
        self.several: Mapping[int, Sequence[str]] = PickedSeveral(several, self.items)
        if not is_indexed(pairs):
            self.captions = list(self.captions)
            self.several = {k: several[i] for k, i in enumerate(self.items) if i in several}
        self.skipped: Counter[str] = Counter(pairs.skipped)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def paths(self) -> list[Path]:
        """The file of each picture; AttributeError where the set has none, as `Pairs` says."""
        reader: Any = self.pairs
        paths: Sequence[Path] = reader.paths
        return [paths[i] for i in self.items]

    @property
    def files(self) -> list[Path]:
        """The files that the set reads, besides `paths`."""
        return list(getattr(self.pairs, "files", ()))

    def mixture(self) -> tuple[list[int], list[float]] | None:
        """The ends of the set's parts among the items, and their weights; None without parts."""
        read: Any = getattr(self.pairs, "mixture", lambda: None)
        mixture: tuple[list[int], list[float]] | None = read()
        if mixture is None:
            return None
        if isinstance(self.items, Without):
            ends = [end - int(np.searchsorted(self.items.out, end)) for end in mixture[0]]
        else:
            ends = [bisect_left(self.items, end) for end in mixture[0]]
        return ends, mixture[1]

    def captions_at(self, i: int) -> Sequence[str]:
        """All captions of item i."""
        return captions_of(self.pairs, self.items[i])

    def digests(self) -> Iterator[bytes]:
        """The hash of each picture; b"" of one that cannot be read."""
        hashes = list(picture_hashes(self.pairs))
        return (hashes[i] for i in self.items)

    def hold_hashes(self) -> Iterator[np.ndarray]:
        """`hold_hashes` of the items."""
        first, items = 0, self.items
        for hashes in hold_hashes(self.pairs):
            end = first + len(hashes)
            if isinstance(items, Without):
                keep = np.ones(len(hashes), bool)
                keep[items.out[slice(*np.searchsorted(items.out, (first, end)))] - first] = False
                yield hashes[keep]
            else:
                begin, stop = bisect_left(items, first), bisect_left(items, end)
                yield hashes[np.array(items[begin:stop], np.int64) - first]
            first = end

    def fingerprint(self) -> dict[str, str]:
        """Hashes of "captions" and "pictures"; of a set with an index, its own and "items"."""
        if not is_indexed(self.pairs):
            return hashed_fingerprint(self)
        out = isinstance(self.items, Without)
        items = self.items.out if isinstance(self.items, Without) else np.array(self.items)
        content = items.astype("<i8").tobytes() + (b"out" if out else b"in")
        return fingerprints(self.pairs) | {
            "items": f"SHA-256 {hashlib.sha256(content).hexdigest()[:16]}"
        }

    def parts(self) -> dict[str, str]:
        """Those of the set."""
        parts: Any = getattr(self.pairs, "parts", dict)
        return dict(parts())

    def read_bytes(self, i: int) -> tuple[bytes, str]:
        """The file of picture i, and its name for messages. Raises DataError where it has gone."""
        reader: Any = self.pairs
        content: tuple[bytes, str] = reader.read_bytes(self.items[i])
        return content

    def load(self, i: int) -> np.ndarray:
        """Picture i, (H, W, 3) uint8. Raises DataError where it does not decode."""
        return self.pairs.load(self.items[i])


def is_indexed(pairs: Pairs) -> bool:
    """Whether hashes and captions of a set are read from files when they are asked for."""
    return bool(getattr(pairs, "indexed", False))


def hold_hashes(pairs: Pairs) -> Iterator[np.ndarray]:
    """A number below 2^64 for each picture, of its hash: uint64, some at a time."""
    known: Any = getattr(pairs, "hold_hashes", None)
    if known is not None:
        yield from known()
        return
    chunk: list[int] = []
    for digest in picture_hashes(pairs):
        chunk.append(int.from_bytes(hashlib.blake2b(digest, digest_size=8).digest(), "big"))
        if len(chunk) == CHUNK:
            yield np.array(chunk, np.uint64)
            chunk = []
    if chunk:
        yield np.array(chunk, np.uint64)


def hold_out(pairs: Pairs, share: float) -> tuple[Subset, Subset]:
    """The training part and the held-out part of a set.

    A picture is held out where its hash, as a fraction of the largest, is below `share`. So a
    picture stays on its side when others are added or renamed, and copies of a picture are on one
    side. Where fewer than two different pictures are, those of the lowest hashes are held out;
    where more than 606,000 are, the 606,000 of the lowest.

    Args:
        pairs: at least four different pictures.
        share: of the pictures to hold out, above 0 and at most .5.

    Raises:
        UsageError: a share out of range.
        TooFewPictures: fewer than four different ones.
        DataError: the hashes cannot be read, as those of a shard that has gone.
    """
    if not 0 < share <= 0.5:
        raise UsageError(f"hold_out: share must be above 0 and at most 0.5, got {share}")
    bound, lowest = int(share * 2**64), np.empty(0, np.uint64)
    held, numbers, first = [np.empty(0, np.int64)], [np.empty(0, np.uint64)], 0
    for hashes in hold_hashes(pairs):
        lowest = np.unique(np.concatenate([lowest, np.unique(hashes)[: 2 * LEAST]]))[: 2 * LEAST]
        # The lowest ones, as far as they may be needed, come along whatever the share.
        limit = np.uint64(max(bound, int(lowest[-1])))
        rows = np.flatnonzero(hashes <= limit)
        held.append(first + rows)
        numbers.append(np.asarray(hashes[rows]))
        first += len(hashes)
        if sum(map(len, held)) > 2 * MOST + CHUNK:
            held, numbers = _lowest(held, numbers)
    if len(lowest) < 2 * LEAST:
        raise TooFewPictures(
            f"{pairs.name}: different pictures must be at least {2 * LEAST} for a held-out part, "
            f"got {len(lowest)}"
        )
    held, numbers = _lowest(held, numbers)
    bound = max(bound, int(lowest[LEAST]))
    if len(numbers[0]) > MOST:
        bound = min(bound, int(np.sort(numbers[0])[MOST]))
    validation = held[0][numbers[0] < np.uint64(bound)]
    whole: Sequence[int] | np.ndarray | Without = Without(len(pairs), validation)
    if not is_indexed(pairs):
        whole = list(whole)
    return Subset(pairs, whole), Subset(pairs, validation, f"{pairs.name} (held out)")


def _lowest(
    held: Iterable[np.ndarray], numbers: Iterable[np.ndarray]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The items of the `MOST` + 1 lowest numbers, with all that are equal to the last of them."""
    items, values = np.concatenate([*held]), np.concatenate([*numbers])
    if len(values) > MOST + 1:
        keep = values <= np.partition(values, MOST)[MOST]
        items, values = items[keep], values[keep]
    return [items], [values]
