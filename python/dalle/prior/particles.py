"""Sequential importance resampling over the candidates of an edit (Gordon et al. 1993).

A raster model cannot see a kept token that comes after a redrawn one. So candidates are drawn
forwards, each is weighted by the probability that the model gives a kept token once it is reached,
and where few candidates carry most of the weight, all are drawn anew from them. With many
candidates those that are left follow the distribution of the redrawn tokens given all kept ones.

Letters: B captions, S samples (candidates) of each, which are weighted against each other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dalle.errors import UsageError


def normalized(log_weights: Tensor) -> Tensor:
    """(B, S) log-weights -> weights that sum to one for each caption."""
    return log_weights.softmax(-1)


def effective_size(log_weights: Tensor) -> Tensor:
    """(B,) how many equally weighted candidates (B, S) weighted ones are worth: 1 / sum w^2."""
    return 1 / normalized(log_weights).square().sum(-1)


def systematic(log_weights: Tensor, noise: Tensor) -> Tensor:
    """Systematic resampling: S candidates in place of S weighted ones, of equal weight.

    Candidate s is taken floor or ceil of S w_s times. The result is sorted, and with equal weights
    it is 0 .. S - 1.

    Args:
        log_weights: (B, S) float64.
        noise: (B,) float64 in [0, 1).

    Returns:
        (B, S) int64: which candidate each becomes a copy of.

    Raises:
        UsageError: weights that are no numbers.
    """
    if not bool(log_weights.isfinite().any(-1).all()) or bool(log_weights.isnan().any()):
        raise UsageError("edit: weights must be numbers, and one above zero, got others")
    samples = log_weights.shape[-1]
    weights = normalized(log_weights)
    equal = (log_weights == log_weights[:, :1]).all(-1, keepdim=True)
    steps = torch.arange(samples, dtype=torch.float64, device=weights.device)
    edges = torch.where(equal, (steps + 1) / samples, weights.cumsum(-1))
    points = (steps + noise[:, None].to(weights.device)) / samples * edges[:, -1:]
    index = torch.searchsorted(edges, points, right=True)
    # Rounding must not reach a candidate behind the last one with a weight.
    last = samples - 1 - (weights > 0).flip(-1).int().argmax(-1, keepdim=True)
    index = torch.minimum(index, last)
    return torch.where(equal, steps.long().expand_as(index), index)


class Weights:
    """The log-weights of the candidates of B captions, and the evidence lost in resampling.

    Args:
        batch, samples: B and S.
        noise: (B, steps) float64 in [0, 1), one number for each slot at which may be resampled.
        device: where the weights are kept.

    Attributes:
        log: (B, S) float64. Also comparable between groups of candidates: resampling leaves the
            mean weight of the group to each of its candidates.
        resampled: how many times a caption's candidates were drawn anew.
    """

    def __init__(self, batch: int, samples: int, noise: Tensor, device: torch.device) -> None:
        self.log = torch.zeros(batch, samples, dtype=torch.float64, device=device)
        self.noise, self.resampled = noise, 0

    def observe(self, log_likelihood: Tensor, slot: int, *, resample: bool) -> Tensor | None:
        """Takes in a kept token.

        Args:
            log_likelihood: (B, S) of the token at `slot`.
            slot: chooses the noise.
            resample: whether candidates may be drawn anew here.

        Returns:
            (B, S) int64, what each candidate becomes a copy of; None where all stay.
        """
        self.log += log_likelihood
        samples = self.log.shape[1]
        poor = effective_size(self.log) < samples / 2
        if not resample or not bool(poor.any()):
            return None
        self.resampled += int(poor.sum())
        own = torch.arange(samples, dtype=torch.int64, device=self.log.device)
        index = torch.where(poor[:, None], systematic(self.log, self.noise[:, slot]), own)
        mean = self.log.logsumexp(-1, keepdim=True) - math.log(samples)
        self.log = torch.where(poor[:, None], mean, self.log)
        return index
