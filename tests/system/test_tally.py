"""Counts of a set of any size are NumPy's, in memory that does not grow with the set."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from dalle.data import tally
from dalle.data.tally import Distinct, Tally


@pytest.mark.parametrize("count", [1, 2, 5, 101, 1000])
def test_quantiles_and_means_are_those_of_numpy(count):
    rng = np.random.default_rng(count)
    for numbers in (
        rng.integers(0, 9, count).tolist(),
        rng.integers(1, 99, (2, count)).astype(float).prod(0).tolist(),
        (rng.integers(1, 400, count) / rng.integers(1, 400, count)).tolist(),
    ):
        counted = Tally(numbers)
        for q in (0.0, 0.05, 0.33, 0.5, 0.95, 0.99, 1.0):
            assert counted.quantile(q) == np.quantile(numbers, q)
        assert counted.mean() == pytest.approx(np.mean(numbers), rel=1e-12)
        assert len(counted) == count and counted.above(3) == sum(n > 3 for n in numbers)
        values, counts = counted.values()
        assert np.repeat(values, counts).tolist() == sorted(numbers)


def test_many_different_numbers_take_little_memory_and_stay_near(monkeypatch):
    monkeypatch.setattr(tally, "MAX_VALUES", 1000)
    numbers = np.exp(np.random.default_rng(0).normal(0, 1.5, 30_000))
    counted = Tally(numbers.tolist())
    assert len(counted.values()[0]) < 4000
    for q in (0.05, 0.5, 0.95):
        assert counted.quantile(q) == pytest.approx(np.quantile(numbers, q), rel=5e-3)
    assert (counted.quantile(0), counted.quantile(1)) == (numbers.min(), numbers.max())
    assert counted.mean() == pytest.approx(numbers.mean(), rel=1e-12)


def test_different_texts_are_counted_exactly_and_then_nearly(monkeypatch):
    monkeypatch.setattr(tally, "MAX_HASHES", 2000)
    texts = Distinct()
    for i in range(6000):
        texts.add(f"caption {i % 1999}\ud800")  # a lone surrogate, as file names may have
    assert texts.exact and texts.count() == 1999
    for i in range(40_000):
        texts.add(f"a caption {i}")
        assert len(texts._hashes) <= 4000
    for i in range(40_000):  # once more: they are the same ones
        texts.add(f"a caption {i}")
    assert not texts.exact
    assert texts.count() == pytest.approx(41_999, rel=5 / 2000**0.5)
    assert sys.getsizeof(texts._hashes) < 1 << 19
