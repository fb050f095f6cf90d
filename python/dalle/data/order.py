"""The order of training, a pure function of (seed, epoch, position): nothing of it is saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import numpy as np

from dalle.configs import integer, seed_number
from dalle.errors import DataError, UsageError

LARGE = 1 << 24  # items above which an order is computed instead of kept, 8 bytes an item
BLOCK = 10_000  # positions in which each source of a mixture has its share
ROUNDS = 8
_MIX = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # of SplitMix64


class Permutation:
    """A permutation of 0 .. num_items - 1 that is computed where it is asked for.

    A Feistel network on the next power of four, walked until it ends below `num_items`; so it
    takes no memory, however many items there are.

    Args:
        num_items: at least 1.
        key: of the permutation, non-negative integers.
    """

    def __init__(self, num_items: int, key: Sequence[int]) -> None:
        self.num_items = num_items
        self.half = max(1, -(-(num_items - 1).bit_length() // 2))  # bits of each half
        rng = np.random.default_rng(tuple(key))
        self.keys = rng.integers(0, 2**64, ROUNDS, np.uint64, endpoint=False)

    def __getitem__(self, positions: slice) -> np.ndarray:
        """The items at a slice of positions, int64."""
        values = np.arange(*positions.indices(self.num_items), dtype=np.uint64)
        outside = np.arange(len(values))
        while len(outside):
            values[outside] = self._rounds(values[outside])
            outside = outside[values[outside] >= self.num_items]
        return values.astype(np.int64)

    def _rounds(self, values: np.ndarray) -> np.ndarray:
        bits, mask = np.uint64(self.half), np.uint64((1 << self.half) - 1)
        left, right = values >> bits, values & mask
        for key in self.keys:
            mixed = right + key
            for factor in _MIX:
                mixed = (mixed ^ (mixed >> np.uint64(30))) * factor
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        return left << bits | right


class _Epochs:
    """The orders of a set's epochs, of which at most two are kept."""

    def __init__(self, num_items: int, key: Sequence[int], last: Sequence[int] = ()) -> None:
        self.num_items, self.key, self.last = num_items, tuple(key), tuple(last)
        self.kept: dict[int, np.ndarray | Permutation] = {}

    def order(self, epoch: int) -> np.ndarray | Permutation:
        if epoch not in self.kept:
            key = (*self.key, epoch, *self.last)
            self.kept = {e: order for e, order in self.kept.items() if e == epoch - 1}
            if self.num_items > LARGE:
                self.kept[epoch] = Permutation(self.num_items, key)
            else:
                self.kept[epoch] = np.random.default_rng(key).permutation(self.num_items)
        return self.kept[epoch]


class Sampler(Protocol):
    """The order of training.

    Attributes:
        num_items: size of the set.
        batch_size: items a batch.
    """

    num_items: int
    batch_size: int

    def indices(self, step: int) -> np.ndarray:
        """The items of batch `step` >= 0, (batch_size,) int64."""

    def epochs(self, step: int) -> np.ndarray:
        """The epoch in which each item of batch `step` is, (batch_size,) int64."""


class BatchSampler:
    """The order of training: each item once an epoch, batches run across epoch ends.

    Batch `step` is a slice of the concatenated permutations of epochs 0, 1, 2, ..., so it is a pure
    function of (seed, step) and a resumed run needs no state.

    Args:
        num_items: size of the set, at least 1.
        batch_size: items a batch, at least 1; need not divide num_items and may exceed it.
        seed: which order.

    Raises:
        UsageError: a size below 1, or a seed that is not 0 .. 2^63 - 1.
    """

    def __init__(self, num_items: int, batch_size: int, seed: int) -> None:
        for label, value in (("num_items", num_items), ("batch_size", batch_size)):
            if integer("BatchSampler", label, value) < 1:
                raise UsageError(f"BatchSampler: {label} must be at least 1, got {value}")
        self.num_items, self.batch_size = int(num_items), int(batch_size)
        self.seed = seed_number("BatchSampler", seed)
        self._epochs = _Epochs(self.num_items, (self.seed,))

    @property
    def _orders(self) -> dict[int, np.ndarray | Permutation]:
        return self._epochs.kept

    def _positions(self, step: int) -> tuple[int, int]:
        step = integer("BatchSampler", "step", step)
        if step < 0:
            raise UsageError(f"BatchSampler: step must be at least 0, got {step}")
        return step * self.batch_size, (step + 1) * self.batch_size

    def indices(self, step: int) -> np.ndarray:
        """The items of batch `step` >= 0, (batch_size,) int64."""
        position, end = self._positions(step)
        pieces = []
        while position < end:
            epoch, offset = divmod(position, self.num_items)
            piece = self._epochs.order(epoch)[offset : offset + end - position]
            pieces.append(piece)
            position += len(piece)
        return np.concatenate(pieces).astype(np.int64, copy=False)

    def epochs(self, step: int) -> np.ndarray:
        """The epoch in which each item of batch `step` is, (batch_size,) int64."""
        begin, end = self._positions(step)
        return np.array([position // self.num_items for position in range(begin, end)], np.int64)


class MixtureSampler:
    """The order of training on several sets by weights.

    Of each 10,000 positions, every set has its share, rounded, at places drawn for that block;
    so the n-th item of a set is where (seed, position) say, and each set is gone through in its own
    epochs, each item once.

    Args:
        sizes: of the sets, whose items follow each other; each at least 1.
        weights: of the sets, positive.
        batch_size: items a batch, at least 1.
        seed: which order.

    Raises:
        UsageError: a size or a weight out of range.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float], batch_size: int, seed: int
    ) -> None:
        if len(sizes) != len(weights) or min(sizes, default=0) < 1:
            raise UsageError(f"MixtureSampler: sizes must be 1 or more each, got {list(sizes)}")
        if integer("MixtureSampler", "batch_size", batch_size) < 1:
            raise UsageError(f"MixtureSampler: batch_size must be at least 1, got {batch_size}")
        self.num_items, self.batch_size = int(sum(sizes)), int(batch_size)
        self.seed = seed_number("MixtureSampler", seed)
        self.counts = shares(weights, BLOCK)
        self.sizes = np.array(sizes, np.int64)
        self.firsts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        self._epochs = [
            _Epochs(int(size), (self.seed,), (1 + number,)) for number, size in enumerate(sizes)
        ]
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The set of each position of a block, and how many of its items came before there."""
        if block not in self._blocks:
            rng = np.random.default_rng((self.seed, block, len(self.counts), BLOCK))
            sets = rng.permutation(np.repeat(np.arange(len(self.counts)), self.counts))
            before = np.empty(BLOCK, np.int64)
            for number, count in enumerate(self.counts):
                before[sets == number] = np.arange(count)
            self._blocks = {b: kept for b, kept in self._blocks.items() if b == block - 1}
            self._blocks[block] = sets, before
        return self._blocks[block]

    def _places(self, step: int) -> list[tuple[int, int, int]]:
        """(set, epoch of the set, place in it) of each position of a batch."""
        step = integer("MixtureSampler", "step", step)
        if step < 0:
            raise UsageError(f"MixtureSampler: step must be at least 0, got {step}")
        places = []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            block, offset = divmod(position, BLOCK)
            sets, before = self._block(block)
            number = int(sets[offset])
            nth = block * int(self.counts[number]) + int(before[offset])
            places.append((number, *divmod(nth, self._epochs[number].num_items)))
        return places

    def indices(self, step: int) -> np.ndarray:
        """The items of batch `step` >= 0, (batch_size,) int64."""
        items = [
            self.firsts[number] + self._epochs[number].order(epoch)[place : place + 1][0]
            for number, epoch, place in self._places(step)
        ]
        return np.array(items, np.int64)

    def epochs(self, step: int) -> np.ndarray:
        """The epoch of its set in which each item of batch `step` is, (batch_size,) int64."""
        return np.array([epoch for _, epoch, _ in self._places(step)], np.int64)


def shares(weights: Sequence[float], total: int) -> np.ndarray:
    """`total` shared out by weights, at least 1 each: the largest remainders are rounded up."""
    values = np.array(weights, np.float64)
    if not len(values) or not (np.isfinite(values) & (values > 0)).all():
        raise UsageError(f"data: weights must be positive and finite, got {list(weights)}")
    exact = values / values.sum() * total
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    order = np.argsort(-(exact - np.floor(exact)), kind="stable")
    np.add.at(counts, np.resize(order, max(0, total - int(counts.sum()))), 1)
    while counts.sum() > total:  # where the least weights were raised to 1
        counts[np.argmax(counts)] -= 1
    result: np.ndarray = counts
    return result


def sampler_for(
    pairs: Any, batch_size: int, seed: int, usable: np.ndarray | None = None
) -> BatchSampler | MixtureSampler:
    """The order of training on a set.

    Args:
        pairs: the set; one whose `mixture()` gives the ends of its parts and their weights is drawn
            by these.
        batch_size: items a batch.
        seed: which order.
        usable: the items that are trained on, ascending; the sampler gives places in it. All if
            left out.

    Raises:
        DataError: a part with a weight has no item that can be used.
    """
    num_items = len(pairs) if usable is None else len(usable)
    read = getattr(pairs, "mixture", lambda: None)
    mixture = cast(tuple[list[int], list[float]] | None, read())
    if mixture is None:
        return BatchSampler(num_items, batch_size, seed)
    ends = np.array(mixture[0], np.int64)
    if usable is not None:
        ends = np.searchsorted(usable, ends)
    sizes = np.diff(ends, prepend=0)
    if not sizes.all():
        empty = int(np.flatnonzero(sizes == 0)[0]) + 1
        raise DataError(
            f"{pairs.name}: part {empty} must hold a usable picture, got none: all of it is held "
            "out (--validation) or cannot be used; leave it out"
        )
    return MixtureSampler(sizes.tolist(), mixture[1], batch_size, seed)
