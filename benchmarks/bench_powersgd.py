"""PowerSGD's products beside the same arithmetic in torch on fp32 matrices, and a whole round.

torch's sides read error buffers of twice the bytes; the products alone (`torch.mm`) keep no error
feedback, so a round is also held against all that torch's `powerSGD_hook` computes between its
collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import dalle_ext
import harness
from harness import Call, Case, Error, Ready

Tensor = torch.Tensor
HOOK, MM = "torch, the arithmetic of powerSGD_hook in fp32", "torch.mm on fp32, the product alone"
TF32, QR = MM + ", in tf32", "torch.linalg.qr"
FEW = 512  # rows that are held against float64
# A quarter of the paper's shards, and the matrices of a block of width 512 on two processes.
CPU_SHAPES = ((992, 992, 112, 1), (992, 3968, 112, 1), (512, 256, 32, 4), (1024, 512, 32, 1))
GOALS: dict[Any, tuple[float, dict[str, float]]] = {
    (3968, 3968, 112, 1, "compress"): (35, {}),  # reads the gradient too: 8 bytes, not 2
    (3968, 3968, 112, 1, "project"): (12, {MM: 5.0, TF32: 1.8}),
    (3968, 15872, 112, 1, "round"): (320, {HOOK: 8.0}),
    (3968, 112, 1): (120, {QR: 8.0}),
    (3968, 112, 16): (240, {QR: 40.0}),
    (3968, 896, 1): (1500, {QR: 4.0}),
}


def ours(errors: list[Tensor], grads: list[Tensor], qs: list[Tensor], fast: bool) -> list[Tensor]:
    ps = dalle_ext.powersgd_compress_(errors, grads, qs, fast=fast)
    ps = [dalle_ext.orthogonalize(p) for p in ps]
    new = dalle_ext.powersgd_project(errors, ps, fast=fast)
    return dalle_ext.powersgd_decompress_(errors, ps, new, fast=fast)


def hook(errors: list[Tensor], grads: list[Tensor], qs: list[Tensor]) -> None:
    for error, grad, q in zip(errors, grads, qs, strict=True):
        total = grad + error
        p = torch.linalg.qr(total @ q).Q
        error.copy_(total - p @ (total.t() @ p).t())


def in_tf32(call: Call) -> Call:
    def run() -> Any:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return call()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return run


def ready(shape: tuple[int, ...], which: str, fast: bool, names: Any, device: str) -> Ready:
    m, n, r, count = shape
    draw = torch.Generator(device).manual_seed(0)
    grads, qs, ps = (
        [torch.randn(*size, generator=draw, device=device) * scale for _ in range(count)]
        for size, scale in (((m, n), 1e-3), ((n, r), 1.0), ((m, r), 1e-2))
    )
    codes, wide = [dalle_ext.pack(g, "1-6-9") for g in grads], [g.clone() for g in grads]
    first = dalle_ext.unpack(codes[0], "1-6-9").double()
    products: dict[str, tuple[Call, Call]] = {
        "compress": (
            lambda: dalle_ext.powersgd_compress_(codes, grads, qs, fast=fast),
            lambda: [a @ b for a, b in zip(grads, qs, strict=True)]),
        "project": (
            lambda: dalle_ext.powersgd_project(codes, ps, fast=fast),
            lambda: [a.t() @ b for a, b in zip(grads, ps, strict=True)]),
        "decompress": (
            lambda: dalle_ext.powersgd_decompress_(codes, ps, qs, fast=fast),
            lambda: [a @ b.t() for a, b in zip(ps, qs, strict=True)]),
        "round": (lambda: ours(codes, grads, qs, fast), lambda: hook(wide, grads, qs)),
    }  # fmt: skip
    run, product = products[which]
    calls = {"ours": lambda: run, MM: lambda: product, HOOK: lambda: product}
    calls[TF32] = lambda: in_tf32(product)

    def check(name: str, result: list[Tensor]) -> Error | None:
        """Of the first matrix, relative to its norm."""
        if name != "ours" or which == "round":
            return None
        few, rows = result[0][:FEW].double(), min(FEW, n if which == "project" else m)
        most = 1e-3 if fast else 1e-5
        if which == "compress":  # of sums that the buffer rounds: 2^-10 each
            exact, most = (first[:rows] + grads[0][:rows].double()) @ qs[0].double(), 2**-9
        elif which == "project":
            exact = first.t()[:rows] @ ps[0].double()
        else:
            exact = ps[0][:rows].double() @ qs[0].double().t()
        return Error(float((few - exact).norm() / exact.norm()), most)

    flops = (3 if which == "round" else 1) * 2 * m * n * r * count
    moved = {"compress": 8, "project": 2, "decompress": 8, "round": 18}[which] * m * n * count
    chosen = {name: calls[name] for name in ("ours", *names)}
    return Ready(chosen, check, flops * 1e-9, "GFLOP/s", moved, flops)


def ready_orthogonalize(n: int, r: int, count: int, device: str) -> Ready:
    draw = torch.Generator(device).manual_seed(0)
    p = torch.randn(count, n, r, generator=draw, device=device)

    def check(name: str, result: Any) -> Error:
        q = (result if name == "ours" else result.Q).double()
        eye = torch.eye(r, device=device, dtype=torch.float64)
        return Error(float((q.mT @ q - eye).abs().max()), 4e-6)

    flops = count * (4 * n * r * r - 4 * r**3 // 3)
    calls: dict[str, Callable[[], Call]] = {
        "ours": lambda: lambda: dalle_ext.orthogonalize(p),
        QR: lambda: lambda: torch.linalg.qr(p),
    }
    return Ready(calls, check, flops * 1e-9, "GFLOP/s", 8 * p.numel(), flops)


def cases(scale: str) -> Iterator[Case]:
    """On a GPU the shards of the paper's model (width 3968) on 8 GPUs, ranks 112 and 896."""
    d = {"cpu": 0, "gpu": 3968, "tiny": 16}[scale]
    small, large = (d * 112) // 3968 or 1, (d * 896) // 3968 or 1
    shapes = CPU_SHAPES if scale == "cpu" else (
        *((d, n, small, 1) for n in (d, 4 * d, d // 2, d // 8)), (d, d // 2, small, 4),
        *((d, n, large, 1) for n in (d, d // 2, 4 * d)))  # fmt: skip
    for m, n, r, count in shapes:
        for which in ("compress", "project", "decompress", "round"):
            rivals = {HOOK: "eager"} if which == "round" else {MM: "eager"}
            if scale != "cpu" and which != "round":
                rivals[TF32] = "eager"
            goal_us, goals = GOALS.get((m, n, r, count, which), (None, {}))
            for fast in (False,) if scale == "cpu" else (False, True):
                yield Case(
                    op="powersgd",
                    what=f"powersgd {which}{', fast' * fast}, {count} of {m} x {n}, rank {r}",
                    ready=partial(ready, (m, n, r, count), which, fast, tuple(rivals)),
                    rivals=rivals,
                    goals=goals,
                    goal_us=goal_us,
                    rounds=15,
                )
    for tall in () if scale == "cpu" else ((d, small, 1), (d, small, 16), (d, large, 1)):
        goal_us, goals = GOALS.get(tall, (None, {}))
        yield Case(
            op="powersgd",
            what=f"orthogonalize, {tall[2]} of {tall[0]} x {tall[1]}",
            ready=partial(ready_orthogonalize, *tall),
            rivals={QR: "eager"},
            goals=goals,
            goal_us=goal_us,
        )


def test_beside_the_hook(case):
    harness.assert_right(harness.measure(case))
