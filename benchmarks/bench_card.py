"""What a GPU itself reaches, device copy and matrix products: floors are made of these."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch

from harness import Call, Case, Error, Ready

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # float32 without tf32: the sum's own


def copy(size: int, device: str) -> Ready:
    """Reads and writes `size` bytes each."""
    draw = torch.Generator(device).manual_seed(0)
    source = torch.randint(-128, 128, (size,), dtype=torch.int8, generator=draw, device=device)
    target = torch.zeros_like(source)

    def check(name: str, result: torch.Tensor) -> Error:
        return Error(float((result != source).sum()), 0.0)

    call = lambda: target.copy_(source)  # noqa: E731
    return Ready({"ours": lambda: call}, check, 2 * size * 1e-9, "GB/s", bytes=2 * size)


def product(n: int, dtype: torch.dtype, device: str) -> Ready:
    """n x n x n. Random numbers: equal ones draw less power and run at a higher clock."""
    draw = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, n, n, generator=draw, device=device).to(dtype)

    def check(name: str, result: torch.Tensor) -> Error:
        exact = a[:4].double() @ b.double()
        return Error(float((result[:4] - exact).abs().max()), 0.02 * math.sqrt(n))

    def call() -> Call:
        return lambda: a @ b

    return Ready({"ours": call}, check, 2 * n**3 * 1e-12, "TFLOP/s", flops=2 * n**3)


def cases(scale: str) -> Iterator[Case]:
    """The copy, and the product in each dtype; of a CPU nothing."""
    if scale == "cpu":
        return
    size, n = (2**30, 8192) if scale == "gpu" else (2**10, 16)
    yield Case(op="card", what="card copy", ready=partial(copy, size), rivals={})
    for dtype in DTYPES:
        what = f"card product {str(dtype)[6:]}"
        yield Case(op="card", what=what, ready=partial(product, n, dtype), rivals={})
