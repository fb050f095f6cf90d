"""What the card itself reaches, device copy and matrix products: floors are made of these."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from dalle_ext.testing import max_error
from gpu.bench import Bench
from gpu.cases import Case


def measure(case: Case, bench: Bench) -> Iterator[dict[str, Any]]:
    """One row for the copy (bytes read and written), one for each type's product."""
    size, n = case.size
    generator = torch.Generator(bench.device).manual_seed(0)
    drawn = {"generator": generator, "device": bench.device}
    source = torch.randint(-128, 128, (size,), dtype=torch.int8, **drawn)
    target = torch.empty_like(source)

    def copy() -> Any:
        target.zero_().copy_(source)
        assert torch.equal(target, source), "the copy must equal its source"
        return lambda: target.copy_(source)

    yield _row(case, "copy", bench.times({"ours": copy}), 2 * size * 1e-9, "GB/s")
    for dtype in (torch.float16, torch.bfloat16):
        # Random numbers: products of equal ones draw less power and run at a higher clock.
        a, b = torch.randn(2, n, n, **drawn).to(dtype)

        def product(a: torch.Tensor = a, b: torch.Tensor = b) -> Any:
            error = max_error((a @ b)[:4], a[:4].double() @ b.double())
            assert error < 0.02 * math.sqrt(n), f"the product must be right, got error {error}"
            return lambda: a @ b

        found = bench.times({"ours": product})
        yield _row(case, f"{str(dtype)[6:]} GEMM", found, 2 * n**3 * 1e-12, "TFLOP/s")


def _row(case: Case, which: str, found: dict[str, Any], work: float, unit: str) -> dict[str, Any]:
    return {"case": case.name, "pass": which, **found, "work": work, "unit": unit}
