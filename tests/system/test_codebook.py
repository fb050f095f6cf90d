"""The codebook: how many codes are used, warnings, and k-means that uses every code."""

from __future__ import annotations

import math

import pytest
import torch

from dalle.dvae.codebook import codebook_health, init_codebook, kmeans
from dalle.dvae.likelihood import map_pixels
from dalle.dvae.model import DiscreteVAE
from dalle.errors import UsageError

PATCH = {"stem": "patch", "patch": 4, "n_hid": 16, "n_blk_per_group": 1, "n_init": 8}


def patch_vae(vocab_size=12, seed=0):
    torch.manual_seed(seed)
    return DiscreteVAE.from_preset("tiny", **PATCH, vocab_size=vocab_size).eval()


def test_health_of_a_uniform_and_of_a_single_code():
    even = codebook_health(torch.full((64,), 5))
    assert (even.used, even.size) == (64, 64)
    assert even.perplexity == pytest.approx(64)
    counts = torch.zeros(64, dtype=torch.int64)
    counts[3] = 999
    one = codebook_health(counts)
    assert (one.used, one.perplexity) == (1, pytest.approx(1))


def test_perplexity_is_exp_of_the_entropy():
    counts = torch.tensor([1, 2, 5, 0])
    p = counts.double() / 8
    entropy = -sum(float(q) * math.log(float(q)) for q in p if q > 0)
    assert codebook_health(counts).perplexity == pytest.approx(math.exp(entropy))


def test_collapse_is_judged_only_on_enough_tokens_and_said_in_words():
    counts = torch.zeros(100, dtype=torch.int64)
    counts[:4] = 100
    health = codebook_health(counts)
    assert health.collapsed(400) and not health.collapsed(399)
    assert not codebook_health(torch.full((100,), 4)).collapsed(400)
    assert health.in_words() == "4 of 100 codes used (4 %), perplexity 4"


def test_kmeans_ends_where_each_centre_is_the_mean_of_its_points():
    generator = torch.Generator().manual_seed(1)
    planted = 20 * torch.randn(6, 5, generator=generator)
    points = planted.repeat_interleave(50, 0) + torch.randn(300, 5, generator=generator)
    centers, spread = kmeans(points, 6, iterations=50, seed=0)
    distance, nearest = torch.cdist(points, centers).square().min(1)
    for i, center in enumerate(centers):
        torch.testing.assert_close(points[nearest == i].mean(0), center, atol=1e-3, rtol=1e-3)
    assert spread == pytest.approx(float(distance.mean()), rel=1e-3)
    assert spread < 0.5 * float((points - points.mean(0)).square().sum(1).mean())


def test_kmeans_does_not_get_worse_and_repeats_itself():
    points = torch.randn(500, 4, generator=torch.Generator().manual_seed(2))
    spreads = [kmeans(points, 20, iterations=n, seed=3)[1] for n in (0, 2, 10)]
    assert spreads[0] > spreads[1] > spreads[2]
    again = kmeans(points, 20, iterations=10, seed=3)
    assert torch.equal(again[0], kmeans(points, 20, iterations=10, seed=3)[0])


def test_kmeans_fills_empty_clusters():
    points = torch.cat([torch.zeros(50, 2), torch.tensor([[9.0, 9.0], [-9.0, 4.0]])])
    centers, spread = kmeans(points, 3, iterations=5, seed=0)
    assert len({tuple(c) for c in centers.tolist()}) == 3
    assert spread == pytest.approx(0, abs=1e-6)


def test_kmeans_wants_as_many_points_as_centres():
    with pytest.raises(UsageError, match="kmeans: points must be at least 4, got 3"):
        kmeans(torch.zeros(3, 2), 4, iterations=1, seed=0)


def test_init_makes_logits_the_negative_distance():
    vae, images = patch_vae(), torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    spread = init_codebook(vae, images, sharpness=2.0, iterations=5, max_points=100, seed=0)
    with torch.no_grad():
        features = vae.encoder.features(map_pixels(images)).permute(0, 2, 3, 1).flatten(0, 2)
        logits = vae.logits(images).permute(0, 2, 3, 1).flatten(0, 2)
    distance = torch.cdist(features.double(), vae.codebook().double()).square()
    want = -2.0 / spread * distance
    shift = (logits - want).mean(1, keepdim=True)  # |feature|^2, equal for all codes
    torch.testing.assert_close(logits.double(), want + shift, atol=2e-3, rtol=1e-3)
    assert torch.equal(vae.encode(images).flatten(), distance.argmin(1))


def test_init_uses_every_code():
    vae, images = patch_vae(), torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    init_codebook(vae, images, sharpness=4.0, iterations=8, max_points=10_000, seed=0)
    assert len(vae.encode(images).unique()) == 12


def test_init_needs_the_patch_stem():
    vae = DiscreteVAE.from_preset("tiny", n_hid=8, n_init=8, vocab_size=8)
    with pytest.raises(UsageError, match="init_codebook: stem must be 'patch', got 'released'"):
        init_codebook(vae, torch.rand(2, 3, 8, 8), sharpness=1, iterations=1, max_points=9, seed=0)


def test_kmeans_starts_better_than_from_random_points(monkeypatch):
    generator = torch.Generator().manual_seed(6)
    planted = 10 * torch.randn(64, 8, generator=generator)
    points = planted[torch.randint(64, (2000,), generator=generator)]
    points = points + torch.randn(2000, 8, generator=generator)
    spread = [kmeans(points, 64, iterations=5, seed=seed)[1] for seed in range(5)]
    monkeypatch.setattr("dalle.dvae.codebook._plus_plus", lambda points, k, _: points[:k].clone())
    random = [kmeans(points, 64, iterations=5, seed=seed)[1] for seed in range(5)]
    assert max(spread) < 0.7 * min(random)
