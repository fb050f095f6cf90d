"""How the demo trains its prior; the numbers and what was tried are in docs/log.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dalle.demo.parts import PARTS
from dalle.train.prior_recipe import PriorTrainConfig


@dataclass(frozen=True, kw_only=True)
class PriorRecipe:
    """Sizes, training and sampling of the demo's prior.

    Attributes:
        model: fields of `PriorConfig`; vocabularies and grid come from tokenizer and dVAE.
        train: the training recipe.
        steps: updates.
        sampling: options of `Prior.generate`.
        seconds: training on two idle cores with AVX-512.
        fixed: how many of these encode the pictures.
        samples_seconds: drawing and scoring the samples there.
    """

    model: dict[str, Any] = field(default_factory=dict)
    train: PriorTrainConfig = field(default_factory=PriorTrainConfig)
    steps: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    fixed: float = 0.0
    samples_seconds: float = 0.0


def _short(steps: int, **changes: Any) -> PriorTrainConfig:
    """What every run of minutes has in common: a cosine to zero, one code per image, a warm start.

    The paper's augmentation and BPE dropout blur what a few epochs have to learn by heart; its
    warm-up alone would outlast the run; and Muon needs half of AdamW's updates.
    """
    options: dict[str, Any] = {
        "warmup_steps": 60,
        "decay": "cosine",
        "decay_steps": steps,
        "augment": "none",
        "bpe_dropout": 0.0,
        "caption_dropout": 0.05,
        "average_every": 5,
        "average_warmup": True,
        "image_init": "codebook",
        "optimizer": "muon",
        "parts": PARTS,
    }
    return PriorTrainConfig(**(options | changes))


def _sizes(text_len: int, **changes: Any) -> dict[str, Any]:
    sizes = {"text_len": text_len, "d_model": 128, "num_heads": 4, "num_layers": 4}
    return {**sizes, "kernel_size": 5, "init_gain": 0.5, **changes}


EMOJI_STEPS, SHAPES_STEPS = 1500, 750

PRIOR_RECIPES: dict[str, PriorRecipe] = {
    "emoji": PriorRecipe(
        model=_sizes(16),
        train=_short(EMOJI_STEPS, batch_size=16, lr=4e-3),
        steps=EMOJI_STEPS,
        sampling={"temperature": 0.5},
        seconds=120.0,
        fixed=3.0,
        samples_seconds=5.0,
    ),
    "shapes": PriorRecipe(
        model=_sizes(16, d_model=192, num_heads=6, num_layers=2, attention=("causal",) * 2),
        train=_short(SHAPES_STEPS, batch_size=16, lr=2.5e-3),
        steps=SHAPES_STEPS,
        sampling={"temperature": 0.5, "cond_scale": 1.5},
        seconds=100.0,
        fixed=8.0,
        samples_seconds=42.0,
    ),
}
