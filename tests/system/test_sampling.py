"""Filters and draws against distributions computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dalle.configs import integer
from dalle.errors import UsageError
from dalle.prior.sampling import (
    SamplingConfig,
    all_finite,
    caption_key,
    draw,
    filter_logits,
    first_numbers,
    log_likelihood,
    uniform_noise,
)

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_top_p_against_its_definition(dtype):
    """Many ties, among them with the last that is kept: those of smaller index are."""
    draw_from = torch.Generator().manual_seed(5)
    logits = torch.randint(-4, 5, (40, 37), generator=draw_from).to(dtype)
    logits[1] = 0.0
    logits[2, 3:] = -math.inf
    logits[3] = float("nan")  # of one row, and stays there
    for top_p in (1e-9, 0.1, 0.5, 0.9, 0.999):
        found = torch.isfinite(filter_logits(logits, top_p=top_p))
        for row, chances in zip(found, logits.double().softmax(-1), strict=True):
            if chances.isnan().any():
                continue
            order = sorted(range(37), key=lambda i: (-float(chances[i]), i))
            wanted, mass = [False] * 37, 0.0
            for i in order:
                if mass and mass >= top_p - 1e-7:  # no sum of these is nearer
                    break
                wanted[i], mass = bool(chances[i] > 0), mass + float(chances[i])
            assert row.tolist() == wanted, (top_p, mass)


def test_a_rows_filter_does_not_depend_on_others():
    draw_from = torch.Generator().manual_seed(6)
    logits = 3 * torch.randn(65, 517, generator=draw_from)
    whole = filter_logits(logits, top_k=300, top_p=0.9)
    for first, last in ((0, 1), (3, 17), (64, 65)):
        assert torch.equal(
            filter_logits(logits[first:last], top_k=300, top_p=0.9), whole[first:last]
        )


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.7}])
def test_logits_that_are_nan_draw_some_token(options):
    """The caller raises; until then a token of the vocabulary stands there."""
    logits = torch.tensor([[float("nan")] * 5, [0.0, math.inf, 0.0, 0.0, 0.0], [0.0] * 5])
    assert not all_finite(logits) and not all_finite(logits[1:2]) and all_finite(logits[2:])
    found = draw(logits, torch.full((3,), 0.5, dtype=torch.float64), SamplingConfig(**options))
    assert 0 <= int(found.min()) <= int(found.max()) < 5


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
    found = draw(LOGITS.expand(count, -1), noise, SamplingConfig(**options))
    shares = torch.bincount(found, minlength=5) / count
    torch.testing.assert_close(shares, wanted.float(), atol=1e-4, rtol=0)


def test_log_likelihood_is_that_of_the_draw():
    tokens = torch.tensor([1, 3, 4])
    logits = LOGITS.expand(3, -1)
    for options, wanted in (
        ({}, [0.4, 0.3, 0.15]),
        ({"temperature": 0.5}, (torch.tensor([0.4, 0.3, 0.15]) ** 2 / CHANCES.square().sum())),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0]),
        ({"temperature": 0}, [0.4, 0.3, 0.15]),
    ):
        found = log_likelihood(logits, tokens, SamplingConfig(**options))
        assert found.dtype == torch.float64
        torch.testing.assert_close(found.exp(), torch.as_tensor(wanted).double())


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 1e-300, np.float64(5e-324)])
def test_low_temperatures_take_the_likeliest(temperature):
    logits = torch.tensor([[300.0, 299.0, -1e30], [-2e5, -1e5, -2e5], [0.0, 1e-3, 1e38]])
    cold = SamplingConfig(temperature=temperature)
    found = draw(logits, torch.full((3,), 0.99, dtype=torch.float64), cold)
    assert found.tolist() == [0, 1, 2]
    tie = draw(torch.zeros(2, 2), torch.tensor([0.49, 0.51]).double(), cold)
    assert tie.tolist() == [0, 1]


def test_extreme_noise_stays_among_the_kept():
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]]).expand(2, -1)
    assert draw(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [0, 2]


def philox_4x64(counter, key, rounds=10):
    """Philox4x64-10 by its paper (Salmon et al. 2011), in whole numbers."""
    mask, c, k = 2**64 - 1, list(counter), list(key)
    for _ in range(rounds):
        p, q = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [q >> 64 ^ c[1] ^ k[0], q & mask, p >> 64 ^ c[3] ^ k[1], p & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return c


def test_noise_is_philox_of_seed_caption_sample_and_step():
    # the published answer to counter 0 and key 0
    assert philox_4x64([0] * 4, [0] * 2)[0] == 0x16554D9ECA36314C
    for seed, caption, sample in ((0, 0, 0), (2**63 - 1, 2**64 - 1, 2**63 + 5)):
        words = [
            word for call in (1, 2) for word in philox_4x64([call, 0, sample, 0], [seed, caption])
        ]
        found = uniform_noise(seed, caption, range(sample, sample + 1), 7)
        assert found.dtype == torch.float64
        assert found[0].tolist() == [(word >> 11) * 2.0**-53 for word in words[:7]]


def test_no_two_streams_share_a_number():
    noise = torch.stack(
        [uniform_noise(seed, caption, range(600), 4) for seed in (0, 1) for caption in (7, 8)]
    )
    assert len(noise.unique()) == noise.numel()
    assert bool(((noise >= 0) & (noise < 1)).all())
    assert abs(float(noise.mean()) - 0.5) < 4 * (12 * noise.numel()) ** -0.5
    assert torch.equal(noise[0, 256:, :3], uniform_noise(0, 7, range(256, 600), 3))


def test_a_captions_key_is_of_its_tokens_and_not_of_the_padding():
    key = caption_key(torch.tensor([5, 0, 7]))
    assert key == caption_key(torch.tensor([5, 0, 7, -1, -1]))
    others = ([5, 7], [5, 0, 7, 0], [0, 5, 7], [5, -1, 7], [-1, -1], [0])
    assert len({key, *(caption_key(torch.tensor(other)) for other in others)}) == 7
    assert caption_key(torch.tensor([-1])) == caption_key(torch.tensor([], dtype=torch.int64))


def test_whole_numbers_of_any_kind():
    for value in (3, np.int8(3), np.uint64(3), torch.tensor(3)):
        found = integer("x", "n", value, 0)
        assert found == 3 and type(found) is int
        assert first_numbers("x", "n", value, 2) == [3, 3]
    for given in ([3, 4], np.array([3, 4]), torch.tensor([3, 4])):
        assert first_numbers("x", "n", given, 2) == [3, 4]
    for value, line in (
        (3.0, "x: n must be a whole number, got 3.0"),
        (True, "x: n must be a whole number, got True"),
        ("3", "x: n must be a whole number, got '3'"),
        (-1, "x: n must be 0 or more, got -1"),
        (9, "x: n must be at most 8, got 9"),
    ):
        with pytest.raises(UsageError, match=line):
            integer("x", "n", value, 0, 8)
    with pytest.raises(UsageError, match="one number or one for each of 3 captions, got 2"):
        first_numbers("x", "n", [1, 2], 3)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ((-1.0, None, None), "generate: temperature must be 0 or more, got -1.0"),
        (("warm", None, None), "generate: temperature must be 0 or more, got warm"),
        ((math.nan, None, None), "generate: temperature must be 0 or more, got nan"),
        ((1.0, 0, None), "generate: top_k must be a whole number of at least 1, got 0"),
        ((1.0, 0.9, None), "generate: top_k must be a whole number of at least 1, got 0.9"),
        ((1.0, None, 0.0), r"generate: top_p must be in \(0, 1\], got 0.0"),
        ((1.0, None, 1.5), r"generate: top_p must be in \(0, 1\], got 1.5"),
    ],
)
def test_bad_options(options, line):
    with pytest.raises(UsageError, match=line):
        SamplingConfig(**dict(zip(("temperature", "top_k", "top_p"), options, strict=True)))
