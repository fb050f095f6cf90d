"""From logits to tokens: temperature, top-k, top-p, and noise that does not depend on the batch."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dalle.errors import UsageError


def check_options(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises UsageError for sampling options out of range."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UsageError(f"generate: temperature must be 0 or more, got {temperature}")
    if top_k is not None and (isinstance(top_k, bool) or top_k != int(top_k) or top_k < 1):
        raise UsageError(f"generate: top_k must be a whole number of at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"generate: top_p must be in (0, 1], got {top_p}")


def filter_logits(
    logits: Tensor, *, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Sets the logits of tokens that must not be drawn to -inf.

    Args:
        logits: (..., K).
        top_k: keep the k largest; ties with the k-th are kept.
        top_p: then keep the fewest largest whose probability together is at least top_p, one at
            least.

    Returns:
        (..., K), a new tensor unless nothing is asked for.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        chances = ordered.softmax(-1)
        before = chances.cumsum(-1) - chances
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, index, before >= top_p)
        logits = logits.masked_fill(drop, -math.inf)
    return logits


def draw(
    logits: Tensor,
    noise: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Draws one token per row by inverting the cumulative distribution.

    Equivalent to `torch.multinomial(filter_logits(logits / temperature).softmax(-1), 1)` with the
    randomness given; temperature 0 takes the largest logit.

    Args:
        logits: (B, K).
        noise: (B,) float64, uniform in [0, 1).
        temperature, top_k, top_p: see `check_options` and `filter_logits`.

    Returns:
        (B,) int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    kept = filter_logits(logits.float() / temperature, top_k=top_k, top_p=top_p)
    reach = kept.softmax(-1).cumsum(-1, dtype=torch.float64)
    wanted = noise[:, None].to(reach.device) * reach[:, -1:]
    found = torch.searchsorted(reach, wanted, right=True)[:, 0]
    last = kept.shape[-1] - 1 - torch.isfinite(kept).flip(-1).int().argmax(-1)  # rounding's guard
    return torch.minimum(found, last)


def uniform_noise(seed: int, samples: range, steps: int) -> Tensor:
    """(len(samples), steps) float64 in [0, 1): a pure function of (seed, sample index, step)."""
    rows = [np.random.default_rng((seed, sample)).random(steps) for sample in samples]
    return torch.from_numpy(np.stack(rows))
