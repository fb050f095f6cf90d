"""The logit-Laplace likelihood and the pixel map around it (paper A.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dalle.errors import UsageError

EPS = 0.1  # pixels in [0, 1] go to [EPS, 1 - EPS], where the density is well behaved


def map_pixels(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> [0.1, 0.9], the encoder's input and the likelihood's target."""
    return (1 - 2 * EPS) * images + EPS


def unmap_pixels(images: Tensor) -> Tensor:
    """The inverse of `map_pixels`, clamped to [0, 1]."""
    return ((images - EPS) / (1 - 2 * EPS)).clamp(0, 1)


def logit_laplace_log_prob(mapped: Tensor, mu: Tensor, ln_b: Tensor) -> Tensor:
    """ln f(x | mu, b), the law of sigmoid(Laplace(mu, b)), elementwise, in nats (a density).

    f = 1 / (2 b x (1 - x)) exp(-|logit(x) - mu| / b).

    Args:
        mapped: x in (0, 1), as `map_pixels` gives it.
        mu: location on the logit scale, the shape of x.
        ln_b: logarithm of the scale, the shape of x.
    """
    logit = torch.logit(mapped)
    distance = (logit - mu).abs() * torch.exp(-ln_b)
    return -math.log(2) - ln_b - torch.log(mapped) - torch.log1p(-mapped) - distance


def expected_pixels(mu: Tensor) -> Tensor:
    """The reconstruction: ln b is ignored, x = unmap(sigmoid(mu)); values in [0, 1]."""
    return unmap_pixels(torch.sigmoid(mu))


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, peak 1: (B, ...) twice -> (B,)."""
    error = (images - reconstructions).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp_min(1e-10))


def set_psnr(images: Tensor, reconstructions: Tensor) -> float:
    """PSNR in dB of the mean squared error over a whole set, at most 99 (equal pictures).

    Raises:
        UsageError: shapes that differ.
    """
    shapes = tuple(images.shape), tuple(reconstructions.shape)
    if shapes[0] != shapes[1]:
        raise UsageError(f"psnr: both sets must have one shape, got {shapes[0]}, {shapes[1]}")
    pooled = psnr(images.double().reshape(1, -1), reconstructions.double().reshape(1, -1))
    return min(99.0, float(pooled))
