"""The packed linear layer beside torch's product of the same rows, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import dalle_ext
import harness
from dalle_ext.testing import accuracy
from harness import Case, Error, Ready

LINEAR = "torch linear"


def ready(rows: int, outputs: int, inputs: int, dtype: torch.dtype, device: str) -> Ready:
    draw = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, inputs, generator=draw, device=device)
    weight = torch.randn(outputs, inputs, generator=draw, device=device) / inputs**0.5
    layer, matrix = dalle_ext.PackedLinear(weight, dtype=dtype), weight.to(dtype)
    near = x.to(dtype)
    exact = near.double() @ matrix.double().T

    def check(name: str, result: torch.Tensor) -> Error:
        return Error(*accuracy(result.to(dtype), near @ matrix.T, exact, factor=4))

    calls = {
        "ours": lambda: lambda: layer(x),
        LINEAR: lambda: lambda: torch.nn.functional.linear(near, matrix),
    }
    return Ready(calls, check, matrix.nbytes * 1e-9, "GB/s", matrix.nbytes)


def cases(scale: str) -> Iterator[Case]:
    """None on a GPU, where the op does not exist."""
    for dtype in (torch.float32, torch.bfloat16) if scale == "cpu" else ():
        for rows in (1, 64):
            yield Case(
                op="packed_linear",
                what=f"packed_linear {str(dtype)[6:]}, {rows} x 768 by 3072",
                ready=partial(ready, rows, 3072, 768, dtype),
                rivals={LINEAR: "eager"},
            )


def test_beside_torch(case):
    harness.assert_right(harness.measure(case))
