"""The held-out part of a data set."""

import numpy as np
import pytest

from dalle.data.pairs import ArrayPairs, fingerprints
from dalle.data.split import LEAST, Subset, Without, hold_out
from dalle.errors import DataError, UsageError


def _pairs(count: int, first: int = 0) -> ArrayPairs:
    images = np.zeros((count, 4, 4, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(first, first + count) % 256
    images[:, 0, 0, 1] = np.arange(first, first + count) // 256
    pairs = ArrayPairs("squares", images, [f"square {i}" for i in range(first, first + count)])
    pairs.several = {0: ("square 0", "zero"), count - 1: ("last", "end")}
    return pairs


def test_each_picture_is_in_one_part_and_the_share_is_about_right():
    pairs = _pairs(1000)
    train, held = hold_out(pairs, 0.1)
    assert sorted(train.items + held.items) == list(range(1000))
    assert 70 < len(held) < 130
    assert train.captions == [f"square {i}" for i in train.items]
    for part in (train, held):
        for position in (0, len(part) - 1):
            np.testing.assert_array_equal(part.load(position), pairs.images[part.items[position]])
    several = {part.items[k]: c for part in (train, held) for k, c in part.several.items()}
    assert several == pairs.several


def test_a_picture_stays_on_its_side_when_others_are_added_and_copies_are_on_one_side():
    def held(pairs: ArrayPairs) -> set[bytes]:
        return {pairs.images[i].tobytes() for i in hold_out(pairs, 0.2)[1].items}

    few, more = _pairs(100), _pairs(150)
    assert held(few) == held(more) & {image.tobytes() for image in few.images}
    twice = ArrayPairs("twice", np.concatenate([few.images] * 2), [*few.captions] * 2)
    _, part = hold_out(twice, 0.2)
    assert {i % 100 for i in part.items if i < 100} == {i % 100 for i in part.items if i >= 100}
    assert held(twice) == held(few)


def test_a_small_set_holds_out_two_pictures_and_the_fingerprints_follow_the_items():
    train, held = hold_out(_pairs(10), 1e-6)
    assert (len(train), len(held)) == (10 - LEAST, LEAST)
    assert fingerprints(train) != fingerprints(held)
    assert (
        fingerprints(Subset(_pairs(10), range(10)))["captions"]
        == (fingerprints(_pairs(10))["captions"])
    )


@pytest.mark.parametrize("share", [0.0, 0.6, -1.0, float("nan")])
def test_bad_shares(share):
    with pytest.raises(UsageError, match="share must be above 0 and at most 0.5"):
        hold_out(_pairs(10), share)


def test_too_few_different_pictures():
    same = ArrayPairs("same", np.zeros((20, 4, 4, 3), np.uint8), ["a"] * 20)
    with pytest.raises(DataError, match="different pictures must be at least 4.*got 1"):
        hold_out(same, 0.1)


def test_at_most_so_many_are_held_out_those_of_the_lowest_hashes(monkeypatch):
    pairs = _pairs(400)
    fewer = [hold_out(pairs, share)[1].items for share in (0.05, 0.5)]
    assert set(fewer[0]) < set(fewer[1])
    monkeypatch.setattr("dalle.data.split.MOST", 9)
    monkeypatch.setattr("dalle.data.split.CHUNK", 30)
    train, held = hold_out(pairs, 0.5)
    assert len(held) == 9 and set(held.items) <= set(fewer[0]) and len(train) == 391
    twice = ArrayPairs("twice", np.concatenate([pairs.images] * 2), [*pairs.captions] * 2)
    assert len(hold_out(twice, 0.5)[1]) == 8  # copies stay on one side


@pytest.mark.parametrize("out", [[], [0], [3, 4, 9], list(range(1, 10)), [0, 2, 4, 6, 8]])
def test_the_numbers_without_some(out):
    left = [number for number in range(10) if number not in out]
    found = Without(10, np.array(out, np.int64))
    assert list(found) == left and len(found) == len(left)
    assert [found[k] for k in range(-len(left), 0)] == left and found[1:] == left[1:]
    assert [found.index(number) for number in left] == list(range(len(left)))
    for number in out:
        with pytest.raises(ValueError, match="is not among the items"):
            found.index(number)
    with pytest.raises(IndexError):
        found[len(left)]
