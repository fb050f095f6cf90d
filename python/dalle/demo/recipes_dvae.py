"""How the demo trains its discrete VAE; the numbers and what was tried are in docs/log.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dalle.demo.parts import PARTS
from dalle.dvae import DiscreteVAEConfig
from dalle.train.dvae import DvaeTrainConfig


@dataclass(frozen=True, kw_only=True)
class DvaeRecipe:
    """Canvas in pixels, sizes, training, number of updates.

    Seconds on two idle cores with AVX-512; `fixed` of them make the codebook and the scores.
    """

    image_size: int
    model: DiscreteVAEConfig
    train: DvaeTrainConfig
    steps: int
    seconds: float
    fixed: float


def _recipe(
    image_size: int,
    warm: int,
    steps: int,
    model: dict[str, int],
    seconds: float,
    fixed: float,
    **changes: Any,
) -> DvaeRecipe:
    """What runs of two minutes have in common.

    From scratch they collapse to a few dozen codes, so a continuous autoencoder comes first; mean
    squared error sharpens the picture faster than the likelihood does; and the KL term, which the
    paper needs to spread the codes, has nothing to do where k-means has spread them.
    """
    options: dict[str, Any] = {
        "batch_size": 16,
        "tau_start": 0.3,
        "tau_steps": round(0.6 * (steps - warm)),
        "kl_weight": 0.0,
        "kl_steps": 0,
        "lr_end": 5e-5,
        "lr_steps": steps - warm,
        "beta2": 0.99,
        "average_decay": 0.99,
        "average_warmup": True,
        "augment": "none",
        "distortion": "mse",
        "warm_start_steps": warm,
        "parts": PARTS,
    }
    return DvaeRecipe(
        image_size=image_size,
        model=DiscreteVAEConfig(stem="patch", **model),
        train=DvaeTrainConfig(image_size=image_size, **(options | changes)),
        steps=steps,
        seconds=seconds,
        fixed=fixed,
    )


DVAE_RECIPES: dict[str, DvaeRecipe] = {
    "emoji": _recipe(
        40,
        700,
        1000,
        {"patch": 5, "n_hid": 128, "n_blk_per_group": 2, "n_init": 32, "vocab_size": 2048},
        40.0,
        7.0,
        lr_start=1e-3,
        codebook_sharpness=4.0,
    ),
    "shapes": _recipe(
        24,
        600,
        1000,
        {"patch": 2, "n_hid": 48, "n_blk_per_group": 1, "n_init": 16, "vocab_size": 128},
        20.0,
        5.0,
        lr_start=4e-4,
        codebook_sharpness=1.0,
    ),
}
