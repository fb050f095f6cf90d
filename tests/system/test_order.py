"""The order of training is a pure function of (seed, epoch, position), for one set and several."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from dalle.data import order
from dalle.data.mixture import MixedPairs
from dalle.data.order import BLOCK, BatchSampler, MixtureSampler, Permutation, sampler_for, shares
from dalle.data.pairs import ArrayPairs
from dalle.data.split import hold_out
from dalle.errors import DataError, UsageError


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_a_computed_permutation_has_every_item_once(size):
    whole = Permutation(size, (3, 1))[0:size]
    assert sorted(whole) == list(range(size)) and whole.dtype == np.int64
    for begin in range(0, size, max(1, size // 3)):
        np.testing.assert_array_equal(
            Permutation(size, (3, 1))[begin : begin + 5], whole[begin:][:5]
        )
    if size > 100:
        other = Permutation(size, (3, 2))[0:size]
        assert (whole == other).mean() < 0.02 and (whole == np.arange(size)).mean() < 0.02
        assert abs(np.corrcoef(whole[:-1], whole[1:])[0, 1]) < 0.1


def test_large_sets_take_no_memory(monkeypatch):
    far = BatchSampler(250_000_000, 1024, 5)
    first = far.indices(10**6)
    assert len(set(first.tolist())) == 1024 and first.max() > 200_000_000
    assert far.epochs(10**6).tolist() == [1024 * 10**6 // 250_000_000] * 1024
    monkeypatch.setattr(order, "LARGE", 10)
    sampler = BatchSampler(50, 7, 0)
    items = np.concatenate([sampler.indices(step) for step in range(50)])
    assert all(sorted(items[50 * e : 50 * e + 50]) == list(range(50)) for e in range(7))
    assert len({tuple(items[50 * e : 50 * e + 50]) for e in range(7)}) == 7


def test_epochs_of_a_batch_that_runs_across_their_ends():
    assert BatchSampler(5, 4, 0).epochs(1).tolist() == [0, 1, 1, 1]
    assert BatchSampler(3, 8, 0).epochs(1).tolist() == [2, 3, 3, 3, 4, 4, 4, 5]


def test_a_mixture_keeps_its_weights_and_goes_through_each_set_in_epochs():
    sampler = MixtureSampler([100, 30, 7], [0.7, 0.29, 0.01], 64, 3)
    items = np.concatenate([sampler.indices(step) for step in range(313)])[: 2 * BLOCK]
    epochs = np.concatenate([sampler.epochs(step) for step in range(313)])[: 2 * BLOCK]
    sets = np.searchsorted([99, 129, 136], items)
    assert [Counter(sets.tolist())[k] for k in range(3)] == [14_000, 5_800, 200]
    assert 40 < (sets[:80] == 0).sum() < 75  # the sets are mixed, not one after the other
    for number, (first, size) in enumerate([(0, 100), (100, 30), (130, 7)]):
        mine, of_epoch = items[sets == number] - first, epochs[sets == number]
        for epoch in range(3):
            assert sorted(mine[of_epoch == epoch]) == list(range(size))
        assert not (mine[:size] == mine[size : 2 * size]).all()
    again = MixtureSampler([100, 30, 7], [0.7, 0.29, 0.01], 64, 3)
    np.testing.assert_array_equal(again.indices(200), items[200 * 64 : 201 * 64])  # from anywhere
    halves = MixtureSampler([100, 30, 7], [0.7, 0.29, 0.01], 32, 3)
    both = np.concatenate([halves.indices(400), halves.indices(401)])
    np.testing.assert_array_equal(both, again.indices(200))


def test_shares_are_exact():
    assert shares([1, 1, 1], 10).tolist() == [4, 3, 3]
    assert shares([1e9, 1e-9, 1], 100).tolist() == [98, 1, 1]
    assert shares([2.0], 7).tolist() == [7]
    for bad in ([0.0, 1], [-1.0, 1], [float("nan"), 1], [float("inf"), 1], []):
        with pytest.raises(UsageError, match="weights must be positive and finite"):
            shares(bad, 10)


def squares(count, first, name):
    images = np.zeros((count, 4, 4, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(first, first + count)
    return ArrayPairs(name, images, [f"{name} {i}" for i in range(count)])


def test_several_sets_are_one():
    a, b = squares(60, 0, "a"), squares(40, 100, "b")
    b.several = {1: ("b 1", "b one")}
    pairs = MixedPairs([a, b], [3, 1])
    assert (len(pairs), pairs.name, pairs.image_size) == (100, "a + b", 4)
    assert [pairs.captions[i] for i in (0, 59, 60, -1)] == ["a 0", "a 59", "b 0", "b 39"]
    assert dict(pairs.several) == {61: ("b 1", "b one")} and pairs.number_of_captions() == 101
    assert [int(pairs.load(i)[0, 0, 0]) for i in (0, 59, 60, 99)] == [0, 59, 100, 139]
    train, held = hold_out(pairs, 0.2)
    whole = ArrayPairs("both", np.concatenate([a.images, b.images]), [*a.captions, *b.captions])
    assert held.items == hold_out(whole, 0.2)[1].items
    (first, last), weights = train.mixture()
    assert last == len(train) and weights == [3, 1]
    assert first == sum(item < 60 for item in train.items)
    sampler = sampler_for(train, 8, 0)
    drawn = [train.items[i] for step in range(250) for i in sampler.indices(step)]
    assert 0.7 < np.mean(np.array(drawn) < 60) < 0.8
    assert isinstance(sampler_for(MixedPairs([a, b]), 8, 0), BatchSampler)
    prints = [MixedPairs([a, b], w).fingerprint() for w in ([3, 1], [1, 3], None)]
    assert len({p["weights"] for p in prints}) == 3 and len({p["pictures"] for p in prints}) == 1
    usable = np.array([0, 5, 99])
    assert sampler_for(pairs, 8, 0, usable).indices(0).max() == 2
    with pytest.raises(DataError, match="a \\+ b: part 2 must hold a usable picture, got none"):
        sampler_for(pairs, 8, 0, usable[:2])
