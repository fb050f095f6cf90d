"""How much `dalle reproduce` computes: --quick, --full, and what a test takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of everything that takes time.

    Attributes:
        name: "quick", "full", or of a test.
        captions, candidates: held-out captions of the shared drawing, and samples of each.
        shown: captions, or pictures, that a figure of pictures shows.
        best_captions, best_candidates: of Figure 6.
        shapes_minutes: training of the small shapes pipeline that shows variable binding, where
            none is given. The preset "smoke" has no minutes.
        shapes_preset: of `dalle demo`.
    """

    name: str
    captions: int
    candidates: int
    shown: int
    best_captions: int
    best_candidates: int
    shapes_minutes: float
    shapes_preset: Literal["default", "smoke"] = "default"


QUICK = Sizes(
    name="quick",
    captions=96,
    candidates=64,
    shown=8,
    best_captions=2,
    best_candidates=512,
    shapes_minutes=2,
)
FULL = Sizes(
    name="full",
    captions=1000,
    candidates=512,
    shown=16,
    best_captions=8,
    best_candidates=512,
    shapes_minutes=30,
)
