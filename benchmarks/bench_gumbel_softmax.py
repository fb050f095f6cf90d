"""gumbel_softmax beside torch: F.gumbel_softmax alone, and the same by hand with argmax and KL.

Ours gives sample, argmax of the noisy logits and KL in one pass, F.gumbel_softmax only the sample.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dalle_ext
import harness
from dalle_ext.reference import gumbel_softmax as reference

Tensor = torch.Tensor
TAU = 0.5
LARGE = (4096, 8192)
ALONE, BY_HAND = "torch F.gumbel_softmax", "torch by hand, argmax, KL"


def by_hand(logits: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a training script writes without the op."""
    noisy = logits - torch.empty_like(logits).exponential_().log()
    log_p = logits.log_softmax(dim)
    kl = (log_p.exp() * log_p).sum(dim) + math.log(logits.size(dim))
    return (noisy / TAU).softmax(dim), noisy.argmax(dim), kl


def check(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The op against its definition on a few rows, and its noise against F.gumbel_softmax's law."""
    logits = torch.randn(2, *shape[1:2], *(4 for _ in shape[2:])).to(dtype)
    got = dalle_ext.gumbel_softmax(logits, TAU, seed=1)
    tau, seed = torch.tensor(TAU, dtype=torch.float64), torch.tensor(1)
    exact = reference.gumbel_softmax(logits.double(), tau, dim=1, hard=False, seed=seed)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    assert (got.sample - exact[0]).abs().max() < tolerance
    assert (got.index != exact[1]).sum() <= 1 and (got.kl - exact[2]).abs().max() < 1e-4
    flat = torch.zeros(20_000, 4)
    ours = dalle_ext.gumbel_softmax(flat, TAU, seed=1).sample
    assert (ours.var(0) - F.gumbel_softmax(flat, TAU).var(0)).abs().max() < 5e-3


def forward(what: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[dict[str, Any]]:
    check(shape, dtype)
    logits = torch.randn(shape).to(dtype)
    return harness.compare(
        f"gumbel_softmax forward {what}",
        lambda: dalle_ext.gumbel_softmax(logits, TAU, seed=1),
        {
            ALONE: lambda: F.gumbel_softmax(logits, TAU, dim=1),
            BY_HAND: lambda: by_hand(logits, 1),
        },
        work=logits.numel() * 1e-6,
        unit="Melem/s",
        goals={ALONE: 8.0, BY_HAND: 15.0} if shape == LARGE else {ALONE: 8.0},
        rounds=5,
    )


def backward(what: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[dict[str, Any]]:
    logits = torch.randn(shape).to(dtype).requires_grad_()
    grad, grad_kl = torch.randn(shape).to(dtype), torch.randn(shape[0], *shape[2:])
    ours = dalle_ext.gumbel_softmax(logits, TAU, seed=1)
    sample, _, kl = by_hand(logits, 1)
    grads = [grad, grad_kl.to(dtype)]
    return harness.compare(
        f"gumbel_softmax backward {what}",
        lambda: torch.autograd.grad([ours.sample, ours.kl], logits, [grad, grad_kl], True),
        {BY_HAND: lambda: torch.autograd.grad([sample, kl], logits, grads, retain_graph=True)},
        work=logits.numel() * 1e-6,
        unit="Melem/s",
        goals={BY_HAND: 4.0},
        rounds=5,
    )


CASES = {
    "rows": (forward, "4096 x 8192 float32", LARGE, torch.float32),
    "nchw": (forward, "(2, 8192, 32, 32) float32", (2, 8192, 32, 32), torch.float32),
    "bfloat16": (forward, "1024 x 8192 bfloat16", (1024, 8192), torch.bfloat16),
    "backward": (backward, "4096 x 8192 float32", LARGE, torch.float32),
}


def measure(names: tuple[str, ...] = tuple(CASES)) -> list[dict[str, Any]]:
    """Checks, then times the named cases; one row a case and rival."""
    rows = []
    for name in names:
        function, *arguments = CASES[name]
        rows += function(*arguments)
    return rows


@pytest.mark.parametrize("name", CASES)
def test_beside_torch(benchmark, name):
    rows = benchmark.pedantic(measure, args=((name,),), rounds=1, iterations=1)
    benchmark.extra_info["ratios"] = {row["rival"]: round(row["ratio"], 2) for row in rows}
    assert all(row["ratio"] > 1 for row in rows)
