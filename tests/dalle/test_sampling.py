"""Filters and draws against distributions made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dalle.errors import UsageError
from dalle.sampling import check_options, draw, filter_logits, uniform_noise

CHANCES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
LOGITS = CHANCES.log()[None]


def kept(**options) -> list[int]:
    return torch.isfinite(filter_logits(LOGITS, **options))[0].nonzero()[:, 0].tolist()


def test_top_k_by_hand():
    assert kept(top_k=1) == [1]
    assert kept(top_k=3) == [1, 3, 4]
    assert kept(top_k=5) == kept(top_k=99) == [0, 1, 2, 3, 4]


def test_top_p_by_hand():
    assert kept(top_p=0.01) == [1]
    assert kept(top_p=0.39) == [1]
    assert kept(top_p=0.41) == [1, 3]
    assert kept(top_p=0.84) == [1, 3, 4]
    assert kept(top_p=1.0) == [0, 1, 2, 3, 4]


def test_top_p_acts_on_what_top_k_left():
    # of .4, .3 the first has 4/7 of the mass
    assert kept(top_k=2, top_p=0.5) == [1]
    assert kept(top_k=2, top_p=0.6) == [1, 3]


def test_ties_with_the_last_are_kept():
    logits = torch.tensor([[1.0, 1.0, 0.0]])
    assert torch.isfinite(filter_logits(logits, top_k=1)).tolist() == [[True, True, False]]


def test_filters_leave_the_callers_logits():
    before = LOGITS.clone()
    filter_logits(LOGITS, top_k=2, top_p=0.5)
    assert torch.equal(LOGITS, before)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, CHANCES),
        ({"temperature": 0.5}, CHANCES.square() / CHANCES.square().sum()),
        ({"top_k": 2}, torch.tensor([0, 4 / 7, 0, 3 / 7, 0])),
        ({"top_p": 0.8}, torch.tensor([0, 0.4, 0, 0.3, 0.15]) / 0.85),
        ({"temperature": 0}, torch.tensor([0.0, 1, 0, 0, 0])),
    ],
)
def test_draws_follow_the_distribution(options, wanted):
    count = 20_000
    noise = (torch.arange(count, dtype=torch.float64) + 0.5) / count  # even, so no sampling error
    found = draw(LOGITS.expand(count, -1), noise, **options)
    shares = torch.bincount(found, minlength=5) / count
    torch.testing.assert_close(shares, wanted.float(), atol=1e-4, rtol=0)


def test_extreme_noise_stays_among_the_kept():
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]]).expand(2, -1)
    assert draw(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [0, 2]


def test_noise_is_a_function_of_seed_sample_and_step():
    noise = uniform_noise(3, range(4), 6)
    assert torch.equal(noise[2:], uniform_noise(3, range(2, 4), 6))
    assert torch.equal(noise[:, :5], uniform_noise(3, range(4), 5))
    assert not torch.equal(noise, uniform_noise(4, range(4), 6))
    assert len(noise.unique()) == noise.numel()
    assert bool(((noise >= 0) & (noise < 1)).all())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ((-1.0, None, None), "generate: temperature must be 0 or more, got -1.0"),
        ((math.nan, None, None), "generate: temperature must be 0 or more, got nan"),
        ((1.0, 0, None), "generate: top_k must be a whole number of at least 1, got 0"),
        ((1.0, 0.9, None), "generate: top_k must be a whole number of at least 1, got 0.9"),
        ((1.0, None, 0.0), r"generate: top_p must be in \(0, 1\], got 0.0"),
        ((1.0, None, 1.5), r"generate: top_p must be in \(0, 1\], got 1.5"),
    ],
)
def test_bad_options(options, line):
    with pytest.raises(UsageError, match=line):
        check_options(*options)
