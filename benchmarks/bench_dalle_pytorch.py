"""A training step and an image of 256 tokens beside dalle-pytorch 1.6.6, where it is installed.

Same sizes on both sides: width 256, 8 layers, 4 heads of 64, 64 + 16 x 16 tokens, fp32.
Its row and column patterns are not the paper's, but the work is alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import harness
import rival_dalle_pytorch as rival
from dalle.prior.config import PriorConfig
from dalle.prior.model import Prior

DIM, DEPTH, TEXT, GRID, VOCAB, CODES, BATCH = 256, 8, 64, 16, 8192, 1024, 4
SHIPPED, FIXED = "dalle-pytorch", "dalle-pytorch, cache on"


def our_prior() -> Prior:
    torch.manual_seed(0)
    return Prior(
        PriorConfig(
            text_vocab=VOCAB,
            image_vocab=CODES,
            text_len=TEXT,
            grid=(GRID, GRID),
            d_model=DIM,
            num_heads=DIM // 64,
            num_layers=DEPTH,
        )
    )


def their_model() -> Any:
    return rival.build(
        dim=DIM, depth=DEPTH, heads=4, head_size=64, text_len=TEXT, grid=GRID, text_vocab=VOCAB
    )[0]


def stepper(
    parameters: list[torch.nn.Parameter], loss: Callable[[], torch.Tensor]
) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=True)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        optimizer.step()
        return float(value)

    return step


def test_training_step() -> None:
    prior = our_prior()
    text = torch.randint(1, VOCAB, (BATCH, TEXT - 1))
    tokens = torch.randint(0, CODES, (BATCH, GRID * GRID))
    ours = stepper(list(prior.parameters()), lambda: prior(text, tokens).loss)
    first, last = ours(), [ours() for _ in range(5)][-1]
    assert last < first, "the step must train"
    rivals: dict[str, Callable[[], Any]] = {}
    if rival.installed():
        theirs = their_model()
        full = torch.randint(1, VOCAB, (BATCH, TEXT))
        loss = lambda: theirs(full, tokens, return_loss=True)  # noqa: E731
        rivals[SHIPPED] = stepper(rival.trainable(theirs), loss)
    what = f"training step, 64 + 256 tokens, batch {BATCH}"
    harness.compare(what, ours, rivals, work=BATCH, unit="image/s", rounds=3)


@torch.no_grad()
def test_one_image() -> None:
    prior = our_prior().eval()
    text = torch.randint(1, VOCAB, (1, TEXT - 1))

    def ours() -> torch.Tensor:
        return prior.generate(text, num_samples=1, seed=0)

    drawn = ours()
    assert drawn.shape == (1, 1, GRID, GRID) and 0 <= int(drawn.min()) <= int(drawn.max()) < CODES
    assert torch.equal(drawn, ours()), "same seed, same tokens"
    rivals: dict[str, Callable[[], Any]] = {}
    if rival.installed():
        theirs = their_model().eval()
        full = torch.randint(1, VOCAB, (1, TEXT))
        rival.keep_the_cache(theirs)
        rivals[FIXED] = lambda: theirs.generate_images(full, filter_thres=0.9, use_cache=True)
    harness.compare("one image of 256 tokens", ours, rivals, work=1, unit="image/s", rounds=3)
