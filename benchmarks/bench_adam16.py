"""One step of `AdamW16` beside torch's fused AdamW, on 50 million float32 parameters."""

from __future__ import annotations

from typing import Any

import torch

import dalle_ext
import harness

FUSED = "torch.optim.AdamW(fused=True), float32 moments"
SIZES = [1 << 20] * 47 + [700_001, 4096, 512]  # 50 million in all


def check() -> None:
    """Ten updates end within a hundredth of the way from torch's own."""
    start = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    ends = []
    for make in (dalle_ext.AdamW16, torch.optim.AdamW):
        param = torch.nn.Parameter(start.clone())
        optimizer = make([param], lr=1e-2)
        for t in range(10):
            generator = torch.Generator().manual_seed(1 + t)
            param.grad = torch.randn(20_000, generator=generator)
            optimizer.step()
        ends.append(param.detach())
    assert (ends[0] - ends[1]).abs().max() < 0.01 * (ends[1] - start).abs().max()


def model(half: bool = False) -> list[torch.nn.Parameter]:
    dtype = torch.float16 if half else torch.float32
    params = [torch.nn.Parameter(torch.full((n,), 0.1, dtype=dtype)) for n in SIZES]
    for i, param in enumerate(params):
        generator = torch.Generator().manual_seed(i)
        param.grad = (torch.randn(param.shape, generator=generator) * 1e-3).to(dtype)
    return params


def measure() -> list[dict[str, Any]]:
    """Checks, times a step, and compares the bytes of the states."""
    check()
    fused = torch.optim.AdamW(model(), lr=1e-4, fused=True)
    cases = {
        "float32 parameters": dalle_ext.AdamW16(model(), lr=1e-4),
        "float16 parameters": dalle_ext.AdamW16(model(half=True), lr=1e-4),
        "float16 parameters, stochastic": dalle_ext.AdamW16(
            model(half=True), lr=1e-4, stochastic_rounding=True
        ),
    }
    rows: list[dict[str, Any]] = []
    for name, optimizer in cases.items():
        rows += harness.compare(
            f"AdamW16 step, {name}, 50 million",
            optimizer.step,
            {FUSED: fused.step},
            work=sum(SIZES) * 1e-6,
            unit="Mparam/s",
            goals={FUSED: 1.3} if name == "float32 parameters" else None,
            rounds=11,
        )
    theirs = sum(t.nbytes for state in fused.state.values() for t in state.values())
    for row, optimizer in zip(rows, cases.values(), strict=True):
        row["state_bytes"], row["rival_state_bytes"] = optimizer.state_bytes(), theirs
        row["state_bytes_per_parameter"] = optimizer.state_bytes() / sum(SIZES)
    print(f"AdamW16: {rows[0]['state_bytes_per_parameter']:.3f} bytes of state a parameter, "
          f"torch: {theirs / sum(SIZES):.3f}")  # fmt: skip
    return rows


def test_beside_fused_adamw(benchmark):
    rows = benchmark.pedantic(measure, rounds=1, iterations=1)
    benchmark.extra_info["ratios"] = {row["what"]: round(row["ratio"], 2) for row in rows}
    assert all(row["state_bytes"] <= 0.51 * row["rival_state_bytes"] for row in rows)
