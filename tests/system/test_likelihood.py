"""The logit-Laplace likelihood of the paper: a density, its pixel map, PSNR."""

from __future__ import annotations

import math

import pytest
import torch

from dalle.dvae.likelihood import (
    EPS,
    expected_pixels,
    logit_laplace_log_prob,
    map_pixels,
    psnr,
    unmap_pixels,
)


@pytest.mark.parametrize(("mu", "ln_b"), [(0.0, 0.0), (1.5, -0.7), (-2.0, -2.0), (0.3, -0.05)])
def test_density_integrates_to_one(mu, ln_b):
    # Substitution x = sigmoid(u) resolves both tails: dx = x (1 - x) du.
    u = torch.linspace(mu - 60, mu + 60, 400_001, dtype=torch.float64)
    u = u[(u > -30) & (u < 30)]
    x = torch.sigmoid(u)
    log_f = logit_laplace_log_prob(x, torch.full_like(x, mu), torch.full_like(x, ln_b))
    total = torch.trapezoid(log_f.exp() * x * (1 - x), u)
    assert float(total) == pytest.approx(1, abs=1e-6)


def test_log_density_is_that_of_a_transformed_laplace():
    x = torch.tensor([0.1, 0.35, 0.5, 0.9], dtype=torch.float64)
    mu = torch.tensor([0.2, -1.0, 0.0, 3.0], dtype=torch.float64)
    ln_b = torch.tensor([0.0, -1.0, 0.5, -3.0], dtype=torch.float64)
    laplace = torch.distributions.Laplace(mu, ln_b.exp())
    sigmoid = torch.distributions.SigmoidTransform()
    want = torch.distributions.TransformedDistribution(laplace, [sigmoid]).log_prob(x)
    torch.testing.assert_close(logit_laplace_log_prob(x, mu, ln_b), want)


def test_log_density_by_hand():
    # x = 1/2 and mu = 0: f = 1 / (2 b / 4) = 2 / b.
    one = torch.tensor(0.5)
    got = logit_laplace_log_prob(one, torch.tensor(0.0), torch.tensor(math.log(0.25)))
    assert float(got) == pytest.approx(math.log(8), abs=1e-6)


def test_likeliest_location_is_the_pixel_itself():
    x = torch.tensor([0.2, 0.7])
    mu = torch.logit(x).requires_grad_()
    best = logit_laplace_log_prob(x, mu, torch.zeros(2)).sum()
    for move in (-0.1, 0.1):
        assert logit_laplace_log_prob(x, mu + move, torch.zeros(2)).sum() < best


def test_pixel_map_is_affine_and_inverted():
    x = torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(map_pixels(x), torch.tensor([EPS, 0.3, 1 - EPS]))
    torch.testing.assert_close(unmap_pixels(map_pixels(x)), x)
    assert unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]


def test_expected_pixels_ignores_the_scale_and_stays_in_range():
    x = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(expected_pixels(torch.logit(map_pixels(x))), x, atol=1e-5, rtol=0)
    wild = expected_pixels(torch.tensor([-50.0, 50.0]))
    assert wild.tolist() == [0.0, 1.0]


def test_psnr_of_a_known_error():
    images = torch.full((2, 3, 5, 5), 0.5)
    other = images + torch.tensor([0.1, 0.01])[:, None, None, None]
    torch.testing.assert_close(psnr(images, other), torch.tensor([20.0, 40.0]), atol=1e-3, rtol=0)
