"""Scaled gradients beside a plain copy of the same bytes, and beside torch's unscaling.

The copies read and write what the op reads and writes, and like the op allocate what it allocates.
`torch._amp_foreach_non_finite_check_and_unscale_` sets a flag and divides; it counts nothing and
takes no norm, so `unscale_gradients_` is also held against the ops that do the same jobs.
"""

from __future__ import annotations

from typing import Any

import torch

import dalle_ext
import harness

Tensor = torch.Tensor
NUMEL = 1 << 25  # of all gradients; nothing of this size is allocated in a call
BLOCK = 1 << 22  # of a stream: what the ends allocate is not fresh pages
COPY, AMP = "plain copy of the bytes", "torch._amp_foreach_non_finite_check_and_unscale_"
APART = "torch, one pass a job"
GOAL = {COPY: 1 / 1.3}


def check() -> None:
    grads = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (5, 70001)]
    scales = torch.tensor([8.0, 3.0])
    found = dalle_ext.unscale_gradients_(grads, scales, [0, 1], check_only=True)
    for i, grad in enumerate(grads):
        wanted = (grad.double() / scales[i].double()).square().sum()
        torch.testing.assert_close(found.sum_squares[i], wanted, rtol=1e-6, atol=0)


def jobs_apart(grads: list[Tensor], scale: Tensor) -> tuple[Tensor, ...]:
    """The counts and the norm of `unscale_gradients_` by torch's own ops, then the division."""
    flag, inverse = torch.zeros(1), scale.reciprocal()
    zeros = torch.stack([(g == 0).sum() for g in grads])
    small = torch.stack([(g.abs() < torch.finfo(g.dtype).tiny).sum() for g in grads])
    most = torch.stack(torch._foreach_norm(grads, float("inf")))
    norms = torch.stack(torch._foreach_norm(grads, 2))
    torch._amp_foreach_non_finite_check_and_unscale_(grads, flag, inverse)
    return flag, zeros, small, most, norms


def measure(names: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Checks, then times both ends of a block, and the gradients of a model."""
    check()
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(NUMEL, generator=generator)
    half = torch.randn(NUMEL, generator=generator).half()
    block, half_block = stream[:BLOCK], half[:BLOCK]
    scale, one = torch.tensor(1024.0), torch.tensor(1.0)
    three = torch.zeros(3 * BLOCK, dtype=torch.uint8)  # 6 bytes an element: 3 read, 3 written
    five = torch.zeros(5 * BLOCK, dtype=torch.uint8)  # 10 bytes an element
    wide, narrow = list(stream.clone().chunk(100)), list(half.clone().chunk(100))
    memory = {id(wide): (stream, stream.clone()), id(narrow): (half, half.clone())}
    tables = {id(grads): dalle_ext.TensorTable([grads]) for grads in (wide, narrow)}
    flag = torch.zeros(1)

    def unscale(grads: list[Tensor], check_only: bool = False) -> Any:
        return dalle_ext.unscale_gradients_(
            grads, one.view(1), check_only=check_only, table=tables[id(grads)]
        )

    def many(grads: list[Tensor]) -> dict[str, Any]:
        return {
            COPY: lambda: memory[id(grads)][1].copy_(memory[id(grads)][0]),
            AMP: lambda: torch._amp_foreach_non_finite_check_and_unscale_(grads, flag, one),
            APART: lambda: jobs_apart(grads, one),
        }

    cases: dict[str, tuple[Any, dict[str, Any], bool]] = {
        "scale_gradient, float32 to float16": (
            lambda: dalle_ext.scale_gradient(block, scale), {COPY: lambda: three.clone()}, False),
        "unscale_gradient, float16 into float32": (
            lambda: dalle_ext.unscale_gradient(block, half_block, scale),
            {COPY: lambda: five.clone()}, False),
        "unscale_gradients_, 100 of float32": (lambda: unscale(wide), many(wide), True),
        "unscale_gradients_, 100 of float16": (lambda: unscale(narrow), many(narrow), True),
        "check only, 100 of float16": (
            lambda: unscale(narrow, check_only=True), {APART: many(narrow)[APART]}, False),
    }  # fmt: skip
    rows = []
    for name in names or tuple(cases):
        ours, rivals, goal = cases[name]
        numel = NUMEL if "100 of" in name else BLOCK
        rows += harness.compare(
            f"grad_scale {name}, 2^{numel.bit_length() - 1} elements",
            ours,
            rivals,
            work=numel * 1e-6,
            unit="Melem/s",
            goals=GOAL if goal else None,
            rounds=41,
        )
    return rows


def test_beside_a_copy(benchmark):
    rows = benchmark.pedantic(measure, rounds=1, iterations=1)
    benchmark.extra_info["ratios"] = {
        f"{row['what']}: {row['rival']}": round(row["ratio"], 2) for row in rows
    }
    assert min(row["ratio"] for row in rows if row["rival"] == APART) > 1
