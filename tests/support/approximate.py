"""How far CUDA's approximate logarithms and exponentials may take gumbel_softmax from exactness.

By the PTX ISA lg2.approx is off by at most 2^-22 between 1/2 and 2 and 2^-22 of the result
elsewhere, ex2.approx by 2^-22 of the result. csrc/gumbel_softmax says how that reaches the noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dalle_ext import testing
from dalle_ext.reference import gumbel_softmax as reference

UNIT = 2.0**-22
ROUNDING = 2.0**-24  # of a float


def noisy_error(seed: int, logits: Tensor, dim: int) -> float:
    """Largest absolute error of a noisy logit."""
    rows = logits.movedim(dim, -1)
    noise = reference.gumbel_noise(torch.tensor(seed), rows.shape[:-1].numel(), rows.shape[-1])
    largest = float(noise.abs().max())
    approximate = 2 * UNIT + UNIT * max(math.log(2), largest)
    return approximate + 4 * ROUNDING * (largest + float(logits.double().abs().max()))


def sample_error(seed: int, logits: Tensor, dim: int, tau: float) -> float:
    """Largest error of a sample's element, relative to it."""
    return math.expm1(2 * noisy_error(seed, logits, dim) / tau) + 8 * UNIT


def kl_error(num_codes: int) -> float:
    """Largest absolute error of the KL: exponentials, weighted with logarithms of at most ln K."""
    return 4 * UNIT * (1 + math.log(num_codes))


def gradient_error(
    seed: int, logits: Tensor, dim: int, tau: float, weight: Tensor, kl_weight: float
) -> Tensor:
    """Largest absolute error of each element of the gradient of sum(sample * weight) and kl.

    y (g - <g, y>) / tau: y is off by its error twice, g - <g, y> is at most twice the largest g.
    """
    exact = torch.tensor(tau, dtype=torch.float64, device=logits.device)
    draw = torch.tensor(seed, device=logits.device)
    y = reference.gumbel_softmax(logits.double(), exact, dim=dim, hard=False, seed=draw)[0]
    largest = float(weight.double().abs().max())
    num_codes = logits.size(dim)
    kl = kl_weight * logits.double().softmax(dim) * 4 * kl_error(num_codes)
    return 3 * sample_error(seed, logits, dim, tau) * largest / tau * y + kl


def assert_as_accurate(
    backend: str, got: Tensor, same: Tensor, exact: Tensor, allowed: Tensor | float, **keywords: int
) -> None:
    """`testing.assert_as_accurate`; a CUDA kernel may have the error `allowed` as well."""
    if backend != "cpu":
        bound = torch.as_tensor(allowed, dtype=torch.float64)
        if testing.rms_error(got, exact) <= float(bound.square().mean().sqrt()):
            return
    testing.assert_as_accurate(got, same, exact, **keywords)
