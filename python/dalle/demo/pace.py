"""How fast this machine trains, measured before the demo begins for its forecast."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from dalle.prior.config import PriorConfig
from dalle.prior.model import Prior
from dalle.ranker.blocks import ImageTower, RankerConfig
from dalle.train.parts import PARTS, run_parts, sum_parts

# Seconds of `transformer_step` and `convolution_step` on the machine that the recipes' seconds are
# from: two idle cores with AVX-512 (docs/log.md).
TRANSFORMER, CONVOLUTION = 0.066, 0.030
SHARES = {"dvae": 0.3, "ranker": 0.5, "prior": 0.0, "samples": 0.0, "report": 0.0}
ROUNDS = 15


def measure() -> dict[str, float]:
    """Stage -> its time here relative to the recipes' machine. Takes about 3 seconds.

    Transformer and convolutions are measured apart, since AVX-512 gains nothing in the one and 1.7
    times in the other; `SHARES` says how much of a stage are convolutions.
    """
    transformer = _median(transformer_step()) / TRANSFORMER
    convolution = _median(convolution_step()) / CONVOLUTION
    return {
        stage: share * convolution + (1 - share) * transformer for stage, share in SHARES.items()
    }


def transformer_step() -> Callable[[], None]:
    """Forward and backward of a prior of the emoji demo's size, in `PARTS` parts."""
    prior = Prior(
        PriorConfig(
            text_vocab=4096,
            image_vocab=2048,
            text_len=16,
            grid=(8, 8),
            d_model=128,
            num_heads=4,
            num_layers=4,
            kernel_size=5,
        )
    )
    text = torch.arange(16 * 15, dtype=torch.int64, device="cpu").view(16, 15) % 4096
    tokens = torch.arange(16 * 64, dtype=torch.int64, device="cpu").view(16, 64) % 2048
    return _step(prior, lambda rows: prior(text[rows], tokens[rows]).loss, 16)


def convolution_step() -> Callable[[], None]:
    """Forward and backward of the ranker's image tower on 144 pictures, in `PARTS` parts."""
    tower = ImageTower(RankerConfig(image_size=40))
    images = torch.linspace(0, 1, 144 * 3 * 40 * 40, dtype=torch.float32, device="cpu").view(
        144, 3, 40, 40
    )
    return _step(tower, lambda rows: tower(images[rows]).square().mean(), 144)


def _step(
    model: torch.nn.Module, loss: Callable[[slice], torch.Tensor], size: int
) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        (total,) = sum_parts(run_parts(lambda rows: (loss(rows),), size, PARTS, model))
        total.backward()

    return step


def _median(step: Callable[[], None]) -> float:
    seconds = []
    for number in range(ROUNDS + 3):
        begin = time.perf_counter()
        step()
        if number >= 3:  # the first are slower
            seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
