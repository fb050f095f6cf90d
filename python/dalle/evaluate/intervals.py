"""Intervals by the bootstrap: how far a value would move with other pictures of the same kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle.configs import integer, seed_number

SHARE = 0.95
MOST = 10_000  # resamples; more tell nothing new


def resamples(dimensions: int) -> int:
    """How many where nobody says: the Fréchet distance of 2048 columns takes seconds each time."""
    return 200 if dimensions <= 512 else 20


def bootstrap(
    statistic: Callable[..., float],
    sets: Sequence[Tensor],
    *,
    count: int,
    seed: int = 0,
    value: float | None = None,
    lowest: float = -np.inf,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """A 95 % interval of a statistic of sets whose rows are drawn again with replacement.

    Repeated rows bias a distance upwards. So the percentiles of the resamples are shifted by the
    difference between `value` and the mean of the resamples.

    Args:
        statistic: of as many tensors as there are sets.
        sets: tensors, each with its pictures along the first axis.
        count: resamples; 0 gives no interval.
        seed: of the draws.
        value: of the statistic on the sets themselves; computed where it is left out.
        lowest: that the statistic can be.
        progress: called with (resamples done, in all).

    Returns:
        "interval" [low, high] or None, "confidence", "resamples", "method".
    """
    count, seed = integer("bootstrap", "bootstrap", count, 0, MOST), seed_number("bootstrap", seed)
    if count < 2:
        return {"interval": None, "confidence": SHARE, "resamples": count, "method": "none"}
    centre = statistic(*sets) if value is None else value
    rng, values = np.random.default_rng(seed), []
    for done in range(count):
        drawn = [x[torch.from_numpy(rng.integers(len(x), size=len(x))).to(x.device)] for x in sets]
        values.append(statistic(*drawn))
        if progress is not None:
            progress(done + 1, count)
    tail = (1 - SHARE) / 2
    low, high = np.quantile(values, (tail, 1 - tail)) - np.mean(values) + centre
    return {
        "interval": [max(lowest, float(low)), max(lowest, float(high))],
        "confidence": SHARE,
        "resamples": count,
        "method": "bootstrap over pictures, percentiles shifted by the bootstrap bias",
    }


def wilson(right: int, count: int) -> list[float]:
    """The 95 % interval of Wilson for a share of `right` among `count` >= 1: [low, high]."""
    z = 1.959963984540054
    share = right / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + (z / (2 * count)) ** 2) ** 0.5
    # Of none and of all the bounds are exact: rounding would leave 1e-17 in place of 0.
    low = max(0.0, centre - half) if right else 0.0
    return [low, min(1.0, centre + half) if right < count else 1.0]


# Student's t at 97.5 %, for 1 to 30 degrees of freedom.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def over_seeds(shares: Sequence[float]) -> list[float]:
    """The 95 % interval of the mean of two or more shares by Student's t, within [0, 1]."""
    count = len(shares)
    t = _T[count - 2] if count - 2 < len(_T) else 1.96
    mean, half = float(np.mean(shares)), t * float(np.std(shares, ddof=1)) / count**0.5
    return [max(0.0, mean - half), min(1.0, mean + half)]
