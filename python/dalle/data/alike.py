"""Pictures that are alike: the same file, nearly the same perceptual hash, or near features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle.errors import UsageError

BITS = 64
CHUNK, WIDTH = 512, 1 << 13  # items that are compared with each other at once
HELD = 1 << 18  # pairs that are joined at a time


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
    found = near_hash_pairs(hashes, distance, thumbnails, colour)
    return sorted({(int(i), int(j)) for part in found for i, j in part})


def near_hash_pairs(
    hashes: np.ndarray,
    distance: int,
    thumbnails: np.ndarray | None = None,
    colour: int = 255,
) -> Iterator[np.ndarray]:
    """The pairs of `near_hashes` in parts of (m, 2), some of them several times. Of pictures that
    are all alike the pairs would not fit into memory."""
    check_near_hashes(distance, colour)
    return _near_hash_pairs(hashes, distance, thumbnails, colour)


def hash_links(
    hashes: np.ndarray, distance: int, thumbnails: np.ndarray, colour: int
) -> Iterator[np.ndarray]:
    """Pairs in parts of (m, 2) that connect what all pairs of `near_hashes` connect. Of items
    with the same hash and thumbnail only the first is compared with others."""
    check_near_hashes(distance, colour)
    content = np.concatenate([hashes[:, None].view(np.uint8), thumbnails], axis=1)
    rows = np.ascontiguousarray(content).view(np.dtype((np.void, content.shape[1])))[:, 0]
    _, firsts, group = np.unique(rows, return_index=True, return_inverse=True)
    yield np.stack([firsts[group.reshape(-1)], np.arange(len(rows))], 1)
    for part in _near_hash_pairs(hashes[firsts], distance, thumbnails[firsts], colour):
        yield firsts[part]


def check_near_hashes(distance: int, colour: int) -> None:
    """Raises UsageError for a distance or a colour out of range."""
    if not 0 <= distance <= 15:
        raise UsageError(f"data dedup: distance must be 0 .. 15 bits, got {distance}")
    if not 0 <= colour <= 255:
        raise UsageError(f"data dedup: colour must be 0 .. 255, got {colour}")


def _near_hash_pairs(
    hashes: np.ndarray, distance: int, thumbnails: np.ndarray | None, colour: int
) -> Iterator[np.ndarray]:
    if not len(hashes):
        return
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
                    yield from _of_one_colour(pairs, thumbnails, colour)


def _of_one_colour(
    pairs: np.ndarray, thumbnails: np.ndarray | None, colour: int
) -> Iterator[np.ndarray]:
    """Those of (m, 2) pairs whose thumbnails differ in at most `colour` in every cell."""
    for begin in range(0, len(pairs), CHUNK):
        part = pairs[begin : begin + CHUNK]
        if thumbnails is not None and colour < 255:
            left, right = (thumbnails[part[:, k]].astype(np.int16) for k in (0, 1))
            cells = np.abs(left - right).reshape(len(part), -1, 3).mean(2)
            part = part[cells.max(1) <= colour]
        yield part


def _near_in(hashes: np.ndarray, bucket: np.ndarray, distance: int) -> Iterator[np.ndarray]:
    """(m, 2) pairs of items of a bucket, the lower first, that are near."""
    for begin in range(0, len(bucket), CHUNK):
        rows = bucket[begin : begin + CHUNK]
        for start in range(begin, len(bucket), WIDTH):
            columns = bucket[start : start + WIDTH]
            differ = np.bitwise_count(hashes[rows][:, None] ^ hashes[columns][None])
            left, right = np.nonzero(differ <= distance)
            pairs = np.stack([rows[left], columns[right]], 1)
            yield pairs[pairs[:, 0] < pairs[:, 1]]


def near_features(features: Tensor, cosine: float) -> list[tuple[int, int]]:
    """All pairs (i, j), i < j, of rows whose cosine is at least `cosine`; exact, in chunks.

    Args:
        features: (n, d).
        cosine: above 0, at most 1.

    Raises:
        UsageError: a cosine out of range.
    """
    return [(a, b) for part in near_feature_pairs(features, cosine) for a, b in part.tolist()]


def near_feature_pairs(features: Tensor, cosine: float) -> Iterator[np.ndarray]:
    """The pairs of `near_features` in parts of (m, 2)."""
    check_near_features(cosine)
    return _near_feature_pairs(features, cosine)


def check_near_features(cosine: float) -> None:
    """Raises UsageError for a cosine out of range."""
    if not 0 < cosine <= 1:
        raise UsageError(f"data dedup: cosine must be above 0 and at most 1, got {cosine}")


def _near_feature_pairs(features: Tensor, cosine: float) -> Iterator[np.ndarray]:
    unit = torch.nn.functional.normalize(features.float(), dim=1)
    for begin in range(0, len(unit), CHUNK):
        for start in range(begin, len(unit), WIDTH):
            products = unit[begin : begin + CHUNK] @ unit[start : start + WIDTH].T
            pairs = (products >= cosine).nonzero().numpy() + (begin, start)
            yield pairs[pairs[:, 0] < pairs[:, 1]]


def groups_of(count: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The groups of two or more items that pairs connect, each ascending, by their first item."""
    return groups_in(count, [np.array(list(pairs), np.int64).reshape(-1, 2)])


def groups_in(count: int, parts: Iterable[np.ndarray]) -> list[list[int]]:
    """`groups_of` pairs that come in parts of (m, 2), of which about `HELD` are in memory."""
    first = np.arange(count)  # the first known item that each is connected with
    held: list[np.ndarray] = []
    for part in parts:
        for begin in range(0, len(part), HELD):
            pairs = first[part[begin : begin + HELD]]
            # Of a group that is known, further pairs say nothing.
            held.append(pairs[pairs[:, 0] != pairs[:, 1]])
            if sum(map(len, held)) >= HELD:
                first, held = _joined(first, held), []
    first = _joined(first, held)
    order = np.argsort(first, kind="stable")
    starts = np.flatnonzero(np.diff(first[order], prepend=-1))
    ends = [*starts[1:].tolist(), count]
    return [
        order[begin:end].tolist()
        for begin, end in zip(starts.tolist(), ends, strict=False)
        if end - begin > 1
    ]


def _joined(first: np.ndarray, held: Sequence[np.ndarray]) -> np.ndarray:
    """`first` with the pairs of its values that are held."""
    parent: dict[int, int] = {}

    def root(i: int) -> int:
        while i in parent:
            parent[i] = parent.get(parent[i], parent[i])
            i = parent[i]
        return i

    for part in held:
        for a, b in part.tolist():
            low, high = sorted((root(a), root(b)))
            if low != high:
                parent[high] = low
    now = np.arange(len(first))
    now[list(parent)] = [root(i) for i in list(parent)]
    joined: np.ndarray = now[first]
    return joined


def equal(values: Sequence[bytes]) -> list[tuple[int, int]]:
    """(first item, item) of each item whose value an earlier one has; b"" is equal to nothing."""
    first: dict[bytes, int] = {}
    found = []
    for i, value in enumerate(values):
        if value and first.setdefault(value, i) != i:
            found.append((first[value], i))
    return found
