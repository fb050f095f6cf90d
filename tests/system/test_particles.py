"""Redrawn tokens follow the model's distribution given all kept ones; plain priming is unchanged.

By enumeration of all completions of grids of 2 x 2 and 2 x 3 tokens of three codes.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from dalle.errors import NumericalError, UsageError
from dalle.prior.config import PAD
from dalle.prior.decode import generate
from dalle.prior.editing import Weighted, draw_edited, is_weighted
from dalle.prior.particles import Weights, effective_size, systematic
from dalle.prior.sampling import CHOOSING, RESAMPLING, DrawConfig, SamplingConfig, uniform_noise
from support.prior import make, sample


def small(columns=2, seed=0, std=0.3):
    """Three codes on 2 x columns tokens that depend much on each other."""
    model = make(seed, grid=(2, columns), image_vocab=3, num_layers=2)
    torch.nn.init.normal_(model.image_head.weight, std=std)
    torch.nn.init.normal_(model.image_embedding.weight, std=1.0)
    return model


def mask(marks):
    return torch.tensor([mark == "#" for mark in marks])


def run(model, text, given, keep, *, group=256, **options):
    """The last step of each group, side by side: tokens (S, N), log-weights (S,), resampled."""
    steps = draw_edited(model, text, given[0], keep, DrawConfig(**options), group=group)
    ends = [d for d in steps if d.done]
    tokens = torch.cat([end.tokens[0] for end in ends])
    weights = [end.log_weights[0] for end in ends if isinstance(end, Weighted)]
    return tokens, torch.cat(weights), sum(end.resampled for end in ends)


@torch.no_grad()
def exact(model, text, given, keep, sampling):
    """Completion -> its probability given the kept tokens, by the training's forward pass."""
    holes = [slot for slot, kept in enumerate(keep.tolist()) if not kept]
    fills = list(itertools.product(range(3), repeat=len(holes)))
    tokens = given.repeat(len(fills), 1)
    tokens[:, holes] = torch.tensor(fills)
    rows = text.expand(len(fills), -1)
    logits = model(rows, tokens).image_logits
    if sampling.cond_scale != 1:
        base = model(torch.full_like(rows, PAD), tokens).image_logits
        logits = base + sampling.cond_scale * (logits - base)
    each = (logits.double() / sampling.temperature).log_softmax(-1)
    total = each.gather(-1, tokens[..., None]).sum((1, 2)).softmax(0)
    return {tuple(row): p for row, p in zip(tokens.tolist(), total.tolist(), strict=True)}


def distance(wanted, tokens, log_weights):
    """Total variation between weighted candidates and a distribution."""
    found = dict.fromkeys(wanted, 0.0)
    for row, weight in zip(tokens.tolist(), log_weights.softmax(0).tolist(), strict=True):
        found[tuple(row)] += weight  # a KeyError: a kept token was changed
    return sum(abs(found[row] - wanted[row]) for row in wanted) / 2


@pytest.mark.parametrize(
    ("marks", "options", "others"),  # others: how far candidates without weights are, at least
    [
        ("..#.", {}, 0.1),
        (".##.", {}, 0.2),
        ("#..#", {"temperature": 0.6, "cond_scale": 2.0}, 0.1),
        (".#.#", {"cond_scale": 0.0}, 0.1),
        ("..#..#", {}, 0.15),
        (".#.#.#", {"temperature": 0.6, "cond_scale": 2.0}, 0.3),
    ],
)
def test_candidates_follow_the_exact_conditional(marks, options, others):
    keep, sampling = mask(marks), SamplingConfig(**options)
    model = small(len(marks) // 2)
    text, given = sample(model, batch=1, seed=3)
    wanted = exact(model, text, given, keep, sampling)
    options = {"num_samples": 6000, "group": 6000, "sampling": sampling, "seed": 7}
    tokens, weights, _ = run(model, text, given, keep, **options)
    assert distance(wanted, tokens, weights) < 0.035
    assert distance(wanted, tokens, torch.zeros_like(weights)) > others
    # The last resampling leaves candidates of equal weight.
    taken = systematic(weights[None], uniform_noise(7, 0, range(1), 1, CHOOSING)[0])[0]
    assert distance(wanted, tokens[taken], torch.zeros(6000)) < 0.035


def test_groups_together_follow_it_as_well():
    """What a group lost in resampling stays in its weights, so groups can be put together."""
    model, keep = small(3, 2, 0.5), mask("..#..#")
    text, given = sample(model, batch=1, seed=3)
    wanted = exact(model, text, given, keep, SamplingConfig())
    tokens, weights, resampled = run(model, text, given, keep, num_samples=6000, group=100)
    assert resampled > 40 and distance(wanted, tokens, weights) < 0.035
    again = run(model, text, given, keep, num_samples=200, first_sample=300, group=100)
    assert torch.equal(again[0], tokens[300:500]) and torch.equal(again[1], weights[300:500])


@pytest.mark.parametrize("marks", ["#.......", "####....", "#######."])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 4, "cond_scale": 2.0}])
def test_without_kept_tokens_after_redrawn_ones_it_is_priming(marks, options):
    model, keep = make(grid=(2, 4)), mask(marks)
    text, given = sample(model, batch=1)
    how = {"num_samples": 9, "sampling": SamplingConfig(**options), "seed": 4, "first_sample": 2}
    ends = [d for d in draw_edited(model, text, given[0], keep, DrawConfig(**how)) if d.done]
    wanted = generate(model, text, prime=given[:, : int(keep.sum())], **how)
    assert not is_weighted(keep) and not any(isinstance(end, Weighted) for end in ends)
    assert torch.equal(torch.cat([end.tokens[0] for end in ends]), wanted.flatten(2)[0])


def test_redrawn_tokens_take_the_noise_of_their_candidate():
    """Up to the first resampling a candidate draws what it draws with a prime."""
    model, keep = make(grid=(3, 4)), mask("#..........#")
    text, given = sample(model, batch=1)
    tokens, weights, resampled = run(model, text, given, keep, num_samples=5, seed=4)
    wanted = generate(model, text, num_samples=5, prime=given[:, :1], seed=4).flatten(2)[0]
    assert resampled == 0 and torch.equal(tokens[:, :-1], wanted[:, :-1])
    assert (tokens[:, -1] == given[0, -1]).all() and weights.unique().numel() > 1


def test_what_is_not_kept_is_not_read():
    model, keep = make(grid=(2, 2)), mask(".#.#")
    text, given = sample(model, batch=1)
    found = run(model, text, given, keep, num_samples=5)
    given[0, 0], given[0, 2] = -7, 10**9
    again = run(model, text, given, keep, num_samples=5)
    assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])


def test_a_kept_token_that_may_not_be_drawn_still_weighs():
    """Behind top_k it has a likelihood; at temperature 0 that of temperature 1."""
    model = make(grid=(2, 2))
    text, given = sample(model, batch=1)
    for sampling in (SamplingConfig(top_k=1), SamplingConfig(temperature=0)):
        tokens, weights, _ = run(model, text, given, mask("..##"), num_samples=4, sampling=sampling)
        assert weights.isfinite().all() and (tokens == tokens[:1]).all()
        with torch.no_grad():
            each = model(text, tokens[:1]).image_logits.double().log_softmax(-1)
        wanted = each[0].gather(-1, tokens[0, :, None])[2:].sum()
        assert weights.tolist() == pytest.approx([float(wanted)] * 4, abs=1e-4)


@pytest.mark.parametrize("noise", [0.0, 0.3, 1 - 2**-53])
def test_systematic_resampling_takes_as_often_as_the_weight_says(noise):
    rng = np.random.default_rng(0)
    for weights in (rng.random(64) ** 9, np.r_[np.zeros(30), rng.random(34)], np.eye(64)[63]):
        log = torch.from_numpy(weights).log()[None]
        index = systematic(log, torch.tensor([noise], dtype=torch.float64))[0]
        counts = np.bincount(index.numpy(), minlength=64)
        wanted = 64 * weights / weights.sum()
        assert (np.abs(counts - wanted) < 1 + 1e-9).all() and not counts[weights == 0].any()
        assert (index.diff() >= 0).all()
    equal = torch.full((2, 49), -3e5, dtype=torch.float64)
    own = torch.arange(49).expand(2, -1)
    assert torch.equal(systematic(equal, torch.tensor([noise, 0.5], dtype=torch.float64)), own)
    with pytest.raises(UsageError, match="weights must be numbers"):
        systematic(torch.full((1, 3), -math.inf), torch.zeros(1))


def test_resampling_is_unbiased_and_keeps_the_evidence():
    log = torch.tensor([[0.1, 0.2, 0.7, 1.0]], dtype=torch.float64).log()
    noise = uniform_noise(1, 2, range(4000), 1, RESAMPLING)[:, 0]
    counts = Counter(systematic(log.expand(4000, -1), noise).flatten().tolist())
    assert [counts[i] / 16000 for i in range(4)] == pytest.approx([0.05, 0.1, 0.35, 0.5], abs=0.01)
    weights = Weights(2, 4, torch.zeros(2, 3, dtype=torch.float64), torch.device("cpu"))
    sharp = torch.tensor([[0.0, -50.0, -50.0, -50.0], [0.0, -0.1, 0.0, 0.0]], dtype=torch.float64)
    assert weights.observe(sharp, 0, resample=False) is None
    index = weights.observe(torch.zeros(2, 4), 1, resample=True)
    assert index.tolist() == [[0, 0, 0, 0], [0, 1, 2, 3]] and weights.resampled == 1
    assert weights.log[0].tolist() == pytest.approx([-math.log(4)] * 4)
    assert torch.equal(weights.log[1], sharp[1])
    assert effective_size(sharp).tolist() == pytest.approx([1.0, 4.0], abs=0.02)


def test_noise_for_resampling_is_another_than_for_drawing():
    streams = [uniform_noise(5, 6, range(3), 8, purpose) for purpose in (0, RESAMPLING, CHOOSING)]
    assert torch.cat(streams).flatten().unique().numel() == 3 * 3 * 8
    assert torch.equal(streams[1][2:], uniform_noise(5, 6, range(2, 3), 8, RESAMPLING))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": torch.ones(12, dtype=torch.bool)}, "keep must keep 1 to 11 tokens, got 12"),
        ({"keep": torch.zeros(12, dtype=torch.bool)}, "keep must keep 1 to 11 tokens, got 0"),
        ({"keep": torch.ones(3, 4, dtype=torch.bool)}, r"keep must be \(12,\) bool, got \(3, 4\)"),
        ({"num_samples": 0}, "num_samples must be 1 or more, got 0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"group": 0}, "group must be 1 or more, got 0"),
        ({"first_sample": -1}, "first_sample must be 0 or more, got -1"),
    ],
)
def test_refused_before_anything_is_drawn(changes, message):
    model = make()
    text, given = sample(model, batch=1)
    keep, group = changes.get("keep", mask(".#.#.#######")), changes.get("group", 256)
    how = {name: changes[name] for name in changes.keys() - {"keep", "group"}}
    with pytest.raises(UsageError, match=f"^(edit|generate): {message}"):
        draw_edited(model, text, given[0], keep, DrawConfig(**how), group=group)


def test_logits_that_are_no_numbers_are_refused():
    model = make(grid=(2, 2))
    torch.nn.init.constant_(model.image_head.bias, math.nan)
    text, given = sample(model, batch=1)
    with pytest.raises(NumericalError, match="logits must be finite"):
        run(model, text, given, mask(".#.#"), num_samples=3)
    assert not model.training
