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
MASK, CAUSAL = "torch SDPA, mask", "torch SDPA, causal"
FORWARD, BOTH = "forward", "forward + backward"
Goals = dict[str, dict[str, float]]  # pass -> rival -> the least ratio that we mean to reach
FLOAT_GOALS: dict[str, Goals] = {
    "row": {FORWARD: {MASK: 5.0, CAUSAL: 2.8}, BOTH: {MASK: 5.0, CAUSAL: 3.0}},
    "column": {BOTH: {MASK: 4.5}},
    "conv": {BOTH: {MASK: 3.5}},
}
SHORT_GOALS: dict[torch.dtype, Goals] = {
    torch.bfloat16: {FORWARD: {MASK: 8.0}, BOTH: {MASK: 6.0}},
    torch.float16: {BOTH: {MASK: 20.0}},
}


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
    goals: Goals | None = None,
) -> list[dict[str, Any]]:
    """Checks, then times, forward and forward + backward; returns the harness's rows."""
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
        name = BOTH if backward else FORWARD
        passes = (False, True) if backward else (False,)
        work = sum(pattern.flops(batch, heads, head_size, p) for p in passes) * 1e-9
        return harness.compare(
            f"sparse_attention {kind} {name} {text_len}+{grid[0]}x{grid[1]} "
            f"B{batch} H{heads} D{head_size} {str(dtype)[6:]}",
            candidates.pop("ours"),
            candidates,
            work=work,
            unit="GFLOP/s",
            goals=(goals or {}).get(name),
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


@pytest.mark.parametrize("kind", FLOAT_GOALS)
def test_size_of_the_paper(kind):
    rows = measure(kind, torch.float32, goals=FLOAT_GOALS[kind])
    assert all(row["ratio"] > 1 for row in rows), harness.table(rows)


@pytest.mark.parametrize("dtype", SHORT_GOALS, ids=str)
def test_16_bit(dtype):
    rows = measure("row", dtype, goals=SHORT_GOALS[dtype])
    assert all(row["ratio"] > 1 for row in rows), harness.table(rows)


def test_toy_size():
    """The shape of a small training run: many short heads."""
    assert measure("row", torch.float32, text_len=16, grid=(8, 8), batch=32, head_size=32)


if __name__ == "__main__":
    for size, goal in FLOAT_GOALS.items():
        print(harness.table(measure(size, torch.float32, goals=goal)))
