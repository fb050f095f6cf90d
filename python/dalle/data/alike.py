"""Pictures that are alike: the same file, nearly the same perceptual hash, or near features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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


def near_hashes(hashes: np.ndarray, distance: int) -> list[tuple[int, int]]:
    """All pairs (i, j), i < j, whose hashes differ in at most `distance` bits.

    Hashes that differ in so few bits agree in one of `distance` + 1 bands of bits, so only those
    in one bucket are compared.

    Args:
        hashes: (n,) uint64.
        distance: 0 .. 15.

    Raises:
        UsageError: a distance out of range.
    """
    if not 0 <= distance <= 15:
        raise UsageError(f"data dedup: distance must be 0 .. 15 bits, got {distance}")
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
                found.update(_near_in(hashes, order[first:last], distance))
    return sorted(found)


def _near_in(hashes: np.ndarray, bucket: np.ndarray, distance: int) -> Iterable[tuple[int, int]]:
    for begin in range(0, len(bucket), CHUNK):
        rows = bucket[begin : begin + CHUNK]
        differ = np.bitwise_count(hashes[rows][:, None] ^ hashes[bucket][None])
        left, right = np.nonzero(differ <= distance)
        for a, b in zip(rows[left].tolist(), bucket[right].tolist(), strict=True):
            if a < b:
                yield a, b


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
