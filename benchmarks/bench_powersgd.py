"""PowerSGD's products beside the same arithmetic in torch on fp32 matrices, and a whole round.

torch's sides read error buffers of twice the bytes; the products alone (`torch.mm`) keep no error
feedback, so a round is also held against all that torch's `powerSGD_hook` computes between its
collectives.
"""

from __future__ import annotations

from typing import Any

import torch

import dalle_ext
import harness

Tensor = torch.Tensor
HOOK, MM = "torch, the arithmetic of powerSGD_hook in fp32", "torch.mm on fp32, the product alone"
# A quarter of the paper's shards, and the matrices of a block of width 512 on two processes.
SHAPES = {(992, 992, 112): 1, (992, 3968, 112): 1, (512, 256, 32): 4, (1024, 512, 32): 1}


def check() -> None:
    grad = torch.randn(60, 90, generator=torch.Generator().manual_seed(0))
    error, q = torch.zeros(60, 90, dtype=torch.int16), torch.randn(90, 8)
    (p,) = dalle_ext.powersgd_compress_([error], [grad], [q])
    torch.testing.assert_close(p, grad @ q, rtol=0.05, atol=0.05)
    (d,) = dalle_ext.powersgd_decompress_([error], [p], [q])
    torch.testing.assert_close(d, p @ q.t(), rtol=1e-4, atol=1e-3)


def ours(
    errors: list[Tensor], grads: list[Tensor], qs: list[Tensor], fast: bool = False
) -> list[Tensor]:
    ps = dalle_ext.powersgd_compress_(errors, grads, qs, fast=fast)
    ps = [dalle_ext.orthogonalize(p) for p in ps]
    new = dalle_ext.powersgd_project(errors, ps, fast=fast)
    return dalle_ext.powersgd_decompress_(errors, ps, new, fast=fast)


def hook(errors: list[Tensor], grads: list[Tensor], qs: list[Tensor]) -> None:
    for error, grad, q in zip(errors, grads, qs, strict=True):
        total = grad + error
        p = torch.linalg.qr(total @ q).Q
        error.copy_(total - p @ (total.t() @ p).t())


def measure(shapes: tuple[tuple[int, int, int], ...] = ()) -> list[dict[str, Any]]:
    """Checks, then times the three products of each shape, and a round of each group."""
    check()
    rows = []
    for m, n, r in shapes or tuple(SHAPES):
        draw, count = torch.Generator().manual_seed(0), SHAPES.get((m, n, r), 1)
        grads = [torch.randn(m, n, generator=draw) * 1e-3 for _ in range(count)]
        qs = [torch.randn(n, r, generator=draw) for _ in range(count)]
        codes = [dalle_ext.pack(g, "1-6-9") for g in grads]
        wide = [g.clone() for g in grads]
        ps, work = [g @ q for g, q in zip(grads, qs, strict=True)], 2e-9 * m * n * r * count
        steps = {
            "compress": (
                lambda c=codes, g=grads, q=qs: dalle_ext.powersgd_compress_(c, g, q),
                {MM: lambda g=grads, q=qs: [a @ b for a, b in zip(g, q, strict=True)]}, 1),
            "project": (
                lambda c=codes, p=ps: dalle_ext.powersgd_project(c, p),
                {MM: lambda g=grads, p=ps: [a.t() @ b for a, b in zip(g, p, strict=True)]}, 1),
            "decompress": (
                lambda c=codes, p=ps, q=qs: dalle_ext.powersgd_decompress_(c, p, q),
                {MM: lambda p=ps, q=qs: [a @ b.t() for a, b in zip(p, q, strict=True)]}, 1),
            "round": (
                lambda c=codes, g=grads, q=qs: ours(c, g, q),
                {HOOK: lambda w=wide, g=grads, q=qs: hook(w, g, q)}, 3),
        }  # fmt: skip
        for name, (run, rivals, products) in steps.items():
            rows += harness.compare(
                f"powersgd {name}, {count} of {m} x {n}, rank {r}",
                run,
                rivals,
                work=products * work,
                unit="GFLOP/s",
                rounds=15,
            )
    return rows


def test_beside_the_hook(benchmark):
    rows = benchmark.pedantic(measure, rounds=1, iterations=1)
    benchmark.extra_info["ratios"] = {row["what"]: round(row["ratio"], 2) for row in rows}
