"""Numbers and texts of a set of any size, counted in memory that is bounded."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable

import numpy as np

MAX_VALUES = 1 << 16  # different numbers that are counted apart
DIGITS = 3  # of a number, where there are more
MAX_HASHES = 1 << 18  # texts whose hashes are kept: beyond, 1 / sqrt of it is the error, .2 %


class Tally:
    """How often each number comes; in memory for `MAX_VALUES` different ones.

    Where there are more, they are counted by their first `DIGITS` digits; the mean and the ends
    stay exact, a quantile is off by .5 % at most.

    Attributes:
        count: of all numbers.
    """

    def __init__(self, values: Iterable[float] = ()) -> None:
        self.count, self._sum, self._rounded = 0, 0.0, False
        self._counts: Counter[float] = Counter()
        self._least, self._most = math.inf, -math.inf
        for value in values:
            self.add(value)

    def __len__(self) -> int:
        return self.count

    def add(self, value: float) -> None:
        """Counts a finite number."""
        self.count += 1
        self._sum += value
        self._least, self._most = min(self._least, value), max(self._most, value)
        self._counts[self._key(value)] += 1
        if len(self._counts) > MAX_VALUES and not self._rounded:
            self._rounded, before = True, self._counts
            self._counts = Counter()
            for key, count in before.items():
                self._counts[self._key(key)] += count

    def _key(self, value: float) -> float:
        return float(f"{value:.{DIGITS}g}") if self._rounded else value

    def mean(self) -> float:
        """The mean; 0 of none."""
        return self._sum / max(1, self.count)

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """The different numbers, ascending, float64, and how often each comes, int64."""
        order = sorted(self._counts)
        counts = np.array([self._counts[value] for value in order], np.int64)
        return np.array(order, np.float64), counts

    def quantile(self, q: float) -> float:
        """As np.quantile of all numbers, between the two next to it. There must be a number."""
        if q in (0, 1):
            return float(self._most if q else self._least)
        values, counts = self.values()
        place = q * (self.count - 1)
        low = int(place)
        ends, share = np.cumsum(counts), place - low
        first = float(values[np.searchsorted(ends, low, "right")])
        second = float(values[np.searchsorted(ends, min(low + 1, self.count - 1), "right")])
        if share < 0.5:
            return first + (second - first) * share
        return second - (second - first) * (1 - share)

    def above(self, limit: float) -> int:
        """How many numbers are larger."""
        values, counts = self.values()
        return int(counts[values > limit].sum())


def hash_of(text: str) -> int:
    """The hash of 64 bits by which texts are told apart."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class Distinct:
    """How many different texts there are: exact up to `MAX_HASHES`, beyond by the smallest hashes
    (Bar-Yossef et al., 2002), in memory for twice as many."""

    def __init__(self) -> None:
        self._hashes: set[int] = set()
        self._limit = 1 << 64  # only smaller hashes are kept

    def add(self, text: str) -> None:
        """Counts a text."""
        self.add_hash(hash_of(text))

    def add_hash(self, value: int) -> None:
        """Counts a text by its `hash_of`."""
        if value >= self._limit:
            return
        self._hashes.add(value)
        if len(self._hashes) > 2 * MAX_HASHES:
            self._cut()

    def _cut(self) -> None:
        kept = sorted(self._hashes)[:MAX_HASHES]
        self._hashes, self._limit = set(kept), kept[-1] + 1

    @property
    def exact(self) -> bool:
        """Whether `count` is exact."""
        return self._limit == 1 << 64 and len(self._hashes) <= MAX_HASHES

    def count(self) -> int:
        """The number of different texts, or an estimate."""
        if self.exact:
            return len(self._hashes)
        kept = sorted(self._hashes)[:MAX_HASHES]
        return round((len(kept) - 1) * (1 << 64) / kept[-1])
