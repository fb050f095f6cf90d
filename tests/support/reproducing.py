"""The least sizes of `dalle reproduce` that go through all of its code."""

from __future__ import annotations

from dalle.reproduce.sizes import (
    ExchangeSizes,
    ScaleSizes,
    ScoreSizes,
    Sizes,
)

TINY = Sizes(
    name="test",
    captions=3,
    candidates=2,
    shown=2,
    best_captions=1,
    best_candidates=8,
    shapes_minutes=0,
    shapes_preset="smoke",
    scales=ScaleSizes(updates=12, width=16, layers=2, deep_updates=2, deep_width=16, deep_layers=3),
    exchange=ExchangeSizes(
        width=64, layers=2, rank=4, rank_width=64, ranks=(0, 4), updates=2, pairs=16
    ),
    scores=ScoreSizes(real=8, zero=2, zero_candidates=2, seen=8, steps=2, batch=4, bootstrap=2),
)
