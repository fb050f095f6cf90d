"""PowerSGD's products, a round and `orthogonalize` beside the same arithmetic in torch on fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import dalle_ext
from bench_powersgd import hook, ours
from gpu import names
from gpu.bench import Bench
from gpu.cases import Case

Tensor = torch.Tensor
Call = Callable[[], Any]
ERROR, FAST_ERROR = 1e-5, 1e-3  # relative, against float64
FEW = 512  # rows that are held against it


@contextmanager
def tf32() -> Iterator[None]:
    """torch's products in tf32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def near(got: Tensor, wanted: Tensor, fast: bool) -> None:
    """Raises unless `got` is `wanted` (float64) but for rounding."""
    error, most = (
        float((got.double() - wanted).norm() / wanted.norm()),
        FAST_ERROR if fast else ERROR,
    )
    assert error < most, f"must be within {most} of float64, got {error:.2e}"


def in_tf32(call: Call) -> Call:
    def run() -> Any:
        with tf32():
            return call()

    return run


def products(case: Case, bench: Bench) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
    """compress, project, decompress and a whole round of `count` matrices in one launch each."""
    m, n, r, count = case.size
    draw = torch.Generator(bench.device).manual_seed(0)
    grads, qs, ps = (
        [torch.randn(*shape, generator=draw, device=bench.device) * scale for _ in range(count)]
        for shape, scale in (((m, n), 1e-4), ((n, r), 1.0), ((m, r), 1e-2))
    )
    codes, few = [dalle_ext.pack(g, "1-6-9") for g in grads], min(m, FEW)

    def compress(fast: bool) -> Call:
        held = dalle_ext.unpack(codes[0][:few], "1-6-9").double() + grads[0][:few].double()
        (p, *_) = dalle_ext.powersgd_compress_(codes, grads, qs, fast=fast)
        wanted = held @ qs[0].double()  # of sums that the buffer rounds: 2^-10 each
        assert float((p[:few].double() - wanted).norm() / wanted.norm()) < 2**-9
        return lambda: dalle_ext.powersgd_compress_(codes, grads, qs, fast=fast)

    def project(fast: bool) -> Call:
        (q, *_) = dalle_ext.powersgd_project(codes, ps, fast=fast)
        held = dalle_ext.unpack(codes[0], "1-6-9").double()
        near(q[:few], held.t()[:few] @ ps[0].double(), fast)
        return lambda: dalle_ext.powersgd_project(codes, ps, fast=fast)

    def decompress(fast: bool) -> Call:
        (total, *_) = dalle_ext.powersgd_decompress_(codes, ps, qs, fast=fast)
        near(total[:few], ps[0][:few].double() @ qs[0].double().t(), fast)
        return lambda: dalle_ext.powersgd_decompress_(codes, ps, qs, fast=fast)

    rivals: dict[str, Call] = {
        "compress": lambda: [a @ b for a, b in zip(grads, qs, strict=True)],
        "project": lambda: [a.t() @ b for a, b in zip(grads, ps, strict=True)],
        "decompress": lambda: [a @ b.t() for a, b in zip(ps, qs, strict=True)],
    }
    moved, work = m * n * count, 2 * m * n * r * count
    bytes_of = {"compress": 8, "project": 2, "decompress": 8}
    for which, prepare in (
        ("compress", compress),
        ("project", project),
        ("decompress", decompress),
    ):
        call = rivals[which]
        todo: dict[str, Any] = {"ours": lambda p=prepare: p(False), names.MATMUL: lambda c=call: c}
        todo[names.FAST] = lambda p=prepare: p(True)
        todo[names.MATMUL_TF32] = lambda c=call: in_tf32(c)
        yield which, bytes_of[which] * moved, work, todo
    wide = [g.clone() for g in grads]
    todo = {"ours": lambda: lambda: ours(codes, grads, qs)}
    todo[names.FAST] = lambda: lambda: ours(codes, grads, qs, fast=True)
    todo[names.HOOK] = lambda: lambda: hook(wide, grads, qs)
    yield "round", 18 * moved, 3 * work, todo


def orthogonalize(case: Case, bench: Bench) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
    """Householder's Q of `count` matrices."""
    n, r, count = case.size
    draw = torch.Generator(bench.device).manual_seed(0)
    p = torch.randn(count, n, r, generator=draw, device=bench.device)

    def prepare() -> Call:
        q = dalle_ext.orthogonalize(p).double()
        eye = torch.eye(r, device=bench.device, dtype=torch.float64)
        assert float((q.mT @ q - eye).abs().max()) < 4e-6, "columns must be orthonormal"
        return lambda: dalle_ext.orthogonalize(p)

    work = count * (4 * n * r * r - 4 * r**3 // 3)
    todo: dict[str, Any] = {"ours": prepare, names.QR: lambda: lambda: torch.linalg.qr(p)}
    yield "orthogonalize", 8 * p.numel(), work, todo


def measure(case: Case, bench: Bench) -> Iterator[dict[str, Any]]:
    """A row for each pass of the case."""
    run = orthogonalize if case.kind == "orthogonalize" else products
    for which, moved, work, todo in run(case, bench):
        found = bench.times(todo)
        yield {
            **{"case": case.name, "pass": which, "ours": found.pop("ours"), "rivals": found},
            **{"work": work * 1e-12, "unit": "TFLOP/s", "flops": work, "bytes": moved},
        }
