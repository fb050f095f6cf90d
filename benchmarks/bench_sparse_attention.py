"""Sparse attention beside torch's own on CPU or GPU: `pytest benchmarks/bench_sparse_attention.py`.

Rivals: `scaled_dot_product_attention` with the pattern as a boolean mask (same result), and with
`is_causal=True` (what one pays without a pattern: dense, a different result).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import dalle_ext
import harness
from dalle_ext.testing import assert_as_accurate, gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ("row", "column", "conv")
MASK, CAUSAL = "torch SDPA, mask", "torch SDPA, causal"


def measure(
    kind: str,
    dtype: torch.dtype,
    *,
    text_len: int = 256,
    grid: tuple[int, int] = (32, 32),
    batch: int = 2,
    heads: int = 8,
    head_size: int = 64,
    rounds: int = 7,
    goal: float | None = None,
) -> list[dict[str, Any]]:
    """Checks, then times, forward and forward + backward; returns the harness's rows.

    `goal` is the least ratio to SDPA with the mask that we mean to reach in both.
    """
    pattern = dalle_ext.AttentionPattern(kind, text_len=text_len, grid=grid)
    generator = torch.Generator().manual_seed(0)
    shape = (4, batch, heads, pattern.length, head_size)
    inputs = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    q, k, v, grad = inputs
    mask = pattern.mask().to(DEVICE)
    runs = {
        "ours": lambda q, k, v: dalle_ext.sparse_attention(q, k, v, pattern),
        MASK: lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask),
        CAUSAL: lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
    }

    def timed(candidates: dict[str, Any], *, backward: bool) -> list[dict[str, Any]]:
        name = "forward + backward" if backward else "forward"
        passes = (False, True) if backward else (False,)
        work = sum(pattern.flops(batch, heads, head_size, p) for p in passes) * 1e-9
        return harness.compare(
            f"sparse_attention {kind} {name} {text_len}+{grid[0]}x{grid[1]} "
            f"B{batch} H{heads} D{head_size} {str(dtype)[6:]}",
            candidates.pop("ours"),
            candidates,
            work=work,
            unit="GFLOP/s",
            goals={} if goal is None else {MASK: goal},
            rounds=rounds,
        )

    def synchronous(run: Any, *arguments: Any) -> Any:
        def call() -> None:
            run(*arguments)
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        return call

    one = [x[:1, :1] for x in inputs]  # one head is enough to know that all compute the same
    exact = [x.double() for x in one]
    assert_as_accurate(runs["ours"](*one[:3]), runs[MASK](*one[:3]), runs[MASK](*exact[:3]))
    ours, same, want = (
        gradients(runs[name], x[:3], x[3])
        for name, x in (("ours", one), (MASK, one), (MASK, exact))
    )
    for got, plain, true in zip(ours, same, want, strict=True):
        assert_as_accurate(got, plain, true, factor=3)

    with torch.no_grad():
        rows = timed({n: synchronous(run, q, k, v) for n, run in runs.items()}, backward=False)
    both = {n: synchronous(gradients, run, (q, k, v), grad) for n, run in runs.items()}
    return rows + timed(both, backward=True)


@pytest.mark.parametrize("kind", KINDS)
def test_size_of_the_paper(kind):
    rows = measure(kind, torch.float32, goal=5.0)
    assert all(row["ratio"] > 1 for row in rows), harness.table(rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit(dtype):
    assert measure("row", dtype, batch=1, heads=4, rounds=3)


def test_toy_size():
    """The shape of a small training run: many short heads."""
    assert measure("row", torch.float32, text_len=16, grid=(8, 8), batch=32, head_size=32)


if __name__ == "__main__":
    for size in KINDS:
        print(harness.table(measure(size, torch.float32)))
