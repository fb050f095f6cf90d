"""How much `dalle reproduce` computes: --quick, --full, and what a test takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ScaleSizes:
    """The fp16 trainings of Figures 4 and 12.

    Attributes:
        updates, width, layers: of the run of Figure 12.
        deep_updates, deep_width, deep_layers, deep_gain: of the deep model of Figure 4, whose
            weights start so large that its gradients spread.
    """

    updates: int
    width: int
    layers: int
    deep_updates: int
    deep_width: int
    deep_layers: int
    deep_gain: float = 16.0


@dataclass(frozen=True, kw_only=True)
class ExchangeSizes:
    """The two processes of Figure 5, Tables 1 and 2.

    Attributes:
        width, layers, rank: of the timeline.
        rank_width, ranks, updates: of the trainings of Table 1; rank 0 is uncompressed.
        pairs: whose captions and codes are trained on.
    """

    width: int
    layers: int
    rank: int
    rank_width: int
    ranks: tuple[int, ...]
    updates: int
    pairs: int


@dataclass(frozen=True, kw_only=True)
class ScoreSizes:
    """The measures of Figures 7 and 9, and of the overlap.

    Attributes:
        real: held-out pictures at most.
        zero, zero_candidates: captions of Figure 9 b, and samples of each.
        seen, steps, batch: of the overlap: training pictures that are searched, the detector's
            training.
        bootstrap: resamples of each interval.
    """

    real: int
    zero: int
    zero_candidates: int
    seen: int
    steps: int
    batch: int
    bootstrap: int


@dataclass(frozen=True, kw_only=True)
class QuantizerSizes:
    """The trainings that compare two quantizers of the dVAE.

    Attributes:
        seeds: of each quantizer.
        preset: of the recipe of shapes.
        scale, prior_scale: factor of the recipe's updates, and of the prior's beside it.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    preset: Literal["default", "smoke"] = "default"
    scale: float = 1.0
    prior_scale: float = 0.4


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of everything that takes time. A run has one of these, and nothing else says more.

    Attributes:
        name: "quick", "full", or of a test.
        captions, candidates: held-out captions of the shared drawing, and samples of each.
        shown: captions, or pictures, that a figure of pictures shows.
        best_captions, best_candidates: of Figure 6.
        shapes_minutes: training of the small shapes pipeline that shows variable binding, where
            none is given. The preset "smoke" has no minutes.
        shapes_preset: of `dalle demo`.
        scales, exchange, scores: of these figures.
        quantizers: trained here; None shows the table that was recorded with this version.
    """

    name: str
    captions: int
    candidates: int
    shown: int
    best_captions: int
    best_candidates: int
    shapes_minutes: float
    shapes_preset: Literal["default", "smoke"] = "default"
    scales: ScaleSizes
    exchange: ExchangeSizes
    scores: ScoreSizes
    quantizers: QuantizerSizes | None = None


QUICK = Sizes(
    name="quick",
    captions=96,
    candidates=64,
    shown=8,
    best_captions=2,
    best_candidates=512,
    shapes_minutes=2,
    scales=ScaleSizes(
        updates=300, width=64, layers=8, deep_updates=20, deep_width=32, deep_layers=64
    ),
    exchange=ExchangeSizes(
        width=256, layers=4, rank=32, rank_width=128, ranks=(0, 8, 16, 32), updates=150, pairs=1024
    ),
    scores=ScoreSizes(
        real=500, zero=64, zero_candidates=16, seen=2000, steps=60, batch=64, bootstrap=50
    ),
)
FULL = Sizes(
    name="full",
    captions=1000,
    candidates=512,
    shown=16,
    best_captions=8,
    best_candidates=512,
    shapes_minutes=30,
    scales=ScaleSizes(
        updates=2000, width=256, layers=16, deep_updates=40, deep_width=32, deep_layers=64
    ),
    exchange=ExchangeSizes(
        width=512,
        layers=8,
        rank=64,
        rank_width=256,
        ranks=(0, 8, 16, 32, 64),
        updates=2000,
        pairs=8192,
    ),
    scores=ScoreSizes(
        real=10_000,
        zero=1000,
        zero_candidates=64,
        seen=10_000,
        steps=650,
        batch=128,
        bootstrap=200,
    ),
    quantizers=QuantizerSizes(),
)
