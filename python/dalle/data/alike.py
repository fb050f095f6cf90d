"""Pictures that are alike: the same file, nearly the same perceptual hash, or near features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle.errors import UsageError

BITS = 64
CHUNK = 2048


def difference_hash(image: np.ndarray) -> int:
    """64 bits: whether each of 8 x 8 grey cells is darker than the next one in its row.

    Stable under another size, compression and small changes of colour. A picture of one colour has
    no darker cells: 0.

    Args:
        image: (H, W, 3) uint8.
    """
    grey = Image.fromarray(image).convert("L").resize((9, 8), Image.Resampling.BOX)
    cells = np.asarray(grey, dtype=np.int16)
    bits = (cells[:, :-1] < cells[:, 1:]).flatten()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def thumbnail(image: np.ndarray) -> np.ndarray:
    """The mean colours of 8 x 8 cells, (192,) uint8: what `difference_hash` does not see.

    Args:
        image: (H, W, 3) uint8.
    """
    small = Image.fromarray(image).resize((8, 8), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.uint8).flatten()


def near_hashes(
    hashes: np.ndarray,
    distance: int,
    thumbnails: np.ndarray | None = None,
    colour: int = 255,
) -> list[tuple[int, int]]:
    """All pairs (i, j), i < j, whose hashes differ in at most `distance` bits, and the mean
    colour of each of 8 x 8 cells in at most `colour`.

    Hashes that differ in so few bits agree in one of `distance` + 1 bands of bits, so only those
    in one bucket are compared.

    Args:
        hashes: (n,) uint64.
        distance: 0 .. 15.
        thumbnails: (n, 192) uint8 of `thumbnail`; left out, colours are not compared.
        colour: 0 .. 255, the absolute difference of a cell, the mean of red, green and blue. The
            mean over all cells would let a small object have another colour (docs/log.md).

    Raises:
        UsageError: a distance or a colour out of range.
    """
    if not 0 <= distance <= 15:
        raise UsageError(f"data dedup: distance must be 0 .. 15 bits, got {distance}")
    if not 0 <= colour <= 255:
        raise UsageError(f"data dedup: colour must be 0 .. 255, got {colour}")
    found: set[tuple[int, int]] = set()
    if not len(hashes):
        return []
    edges = np.linspace(0, BITS, distance + 2).astype(int)
    for begin, end in zip(edges, edges[1:], strict=False):
        mask = np.uint64(((1 << int(end - begin)) - 1) << int(begin))
        keys = hashes & mask
        order = np.argsort(keys, kind="stable")
        changes = keys[order][1:] != keys[order][:-1]
        starts = np.flatnonzero(np.concatenate([[True], changes]))
        for first, last in zip(starts, [*starts[1:], len(order)], strict=True):
            if last - first > 1:
                for pairs in _near_in(hashes, order[first:last], distance):
                    found.update(_of_one_colour(pairs, thumbnails, colour))
    return sorted(found)


def _of_one_colour(
    pairs: np.ndarray, thumbnails: np.ndarray | None, colour: int
) -> Iterator[tuple[int, int]]:
    """Those of (m, 2) pairs whose thumbnails differ in at most `colour` in every cell."""
    for begin in range(0, len(pairs), CHUNK):
        part = pairs[begin : begin + CHUNK]
        if thumbnails is not None and colour < 255:
            left, right = (thumbnails[part[:, k]].astype(np.int16) for k in (0, 1))
            cells = np.abs(left - right).reshape(len(part), -1, 3).mean(2)
            part = part[cells.max(1) <= colour]
        yield from ((int(i), int(j)) for i, j in part)


def _near_in(hashes: np.ndarray, bucket: np.ndarray, distance: int) -> Iterator[np.ndarray]:
    """(m, 2) pairs of items of a bucket, the lower first, that are near."""
    for begin in range(0, len(bucket), CHUNK):
        rows = bucket[begin : begin + CHUNK]
        differ = np.bitwise_count(hashes[rows][:, None] ^ hashes[bucket][None])
        left, right = np.nonzero(differ <= distance)
        pairs = np.stack([rows[left], bucket[right]], 1)
        yield pairs[pairs[:, 0] < pairs[:, 1]]


def near_features(features: Tensor, cosine: float) -> list[tuple[int, int]]:
    """All pairs (i, j), i < j, of rows whose cosine is at least `cosine`; exact, in chunks.

    Args:
        features: (n, d).
        cosine: above 0, at most 1.

    Raises:
        UsageError: a cosine out of range.
    """
    if not 0 < cosine <= 1:
        raise UsageError(f"data dedup: cosine must be above 0 and at most 1, got {cosine}")
    unit = torch.nn.functional.normalize(features.float(), dim=1)
    found = []
    for begin in range(0, len(unit), CHUNK):
        products = unit[begin : begin + CHUNK] @ unit[begin:].T
        left, right = (products >= cosine).nonzero(as_tuple=True)
        pairs = zip((left + begin).tolist(), (right + begin).tolist(), strict=True)
        found += [(a, b) for a, b in pairs if a < b]
    return found


def groups_of(count: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The groups of two or more items that pairs connect, each ascending, by their first item."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    members: dict[int, list[int]] = {}
    for i in range(count):
        members.setdefault(root(i), []).append(i)
    return [group for group in members.values() if len(group) > 1]


def equal(values: Sequence[bytes]) -> list[tuple[int, int]]:
    """(first item, item) of each item whose value an earlier one has; b"" is equal to nothing."""
    first: dict[bytes, int] = {}
    found = []
    for i, value in enumerate(values):
        if value and first.setdefault(value, i) != i:
            found.append((first[value], i))
    return found
