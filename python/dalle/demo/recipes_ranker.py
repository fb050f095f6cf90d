"""How the demo trains its ranker; the numbers and what was tried are in docs/log.md."""

from __future__ import annotations

from dataclasses import dataclass, field

from dalle.demo.parts import PARTS
from dalle.train.ranker import RankerTrainConfig


@dataclass(frozen=True, kw_only=True)
class RankerRecipe:
    """Sizes (overrides of the preset "tiny") and training.

    Seconds on two idle cores with AVX-512; `fixed` of them send the pictures through the dVAE.
    """

    model: dict[str, int] = field(default_factory=dict)
    train: RankerTrainConfig = field(default_factory=RankerTrainConfig)
    seconds: float = 40.0
    fixed: float = 4.0


RANKER_RECIPES: dict[tuple[str, str], RankerRecipe] = {
    ("emoji", "default"): RankerRecipe(train=RankerTrainConfig(steps=500, parts=PARTS)),
    ("shapes", "default"): RankerRecipe(
        train=RankerTrainConfig(steps=600, parts=PARTS), seconds=44.0, fixed=10.0
    ),
    ("emoji", "smoke"): RankerRecipe(
        model={"width": 32, "depth": 1, "embed_dim": 32},
        train=RankerTrainConfig(steps=12, batch_size=16, num_spliced=4, warmup=2, parts=PARTS),
        seconds=1.0,
        fixed=0.0,
    ),
    ("shapes", "smoke"): RankerRecipe(
        model={"width": 32, "depth": 1, "embed_dim": 32},
        train=RankerTrainConfig(steps=12, batch_size=16, num_spliced=4, warmup=2, parts=PARTS),
        seconds=1.0,
        fixed=0.0,
    ),
}
