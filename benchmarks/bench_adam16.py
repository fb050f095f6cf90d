"""One step of `AdamW16` beside torch's fused AdamW: 50 million parameters, on a GPU 2^28."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import dalle_ext
import harness
from harness import Call, Case, Error, Ready

FUSED = "torch.optim.AdamW(fused=True), float32 moments"
START, LR = 0.1, 1e-3  # a step of LR is more than bfloat16 rounds away
ADAMW8 = "bitsandbytes AdamW8bit"
SIZES = {
    "cpu": [1 << 20] * 47 + [700_001, 4096, 512],  # 50 million in all
    "gpu": [1 << 24] * 15 + [(1 << 24) - 5000, 4096, 904],
    "tiny": [20_000, 300],
}


def drift(device: str) -> Error:
    """Ten updates end within a hundredth of the way from torch's own."""
    start = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).to(device)
    ends = []
    for make in (dalle_ext.AdamW16, torch.optim.AdamW):
        param = torch.nn.Parameter(start.clone())
        optimizer = make([param], lr=1e-2)
        for t in range(10):
            draw = torch.Generator().manual_seed(1 + t)
            param.grad = torch.randn(20_000, generator=draw).to(device)
            optimizer.step()
        ends.append(param.detach())
    gone, way = ((x - y).abs().max() for x, y in ((ends[0], ends[1]), (ends[1], start)))
    return Error(float(gone / way), 0.01)


def model(dtype: torch.dtype, sizes: list[int], device: str) -> list[torch.nn.Parameter]:
    draw = torch.Generator(device).manual_seed(0)
    params = [
        torch.nn.Parameter(torch.full((n,), START, dtype=dtype, device=device)) for n in sizes
    ]
    for param in params:
        grad = torch.randn(param.shape, generator=draw, device=device) * 1e-3
        param.grad = grad.to(dtype)
    return params


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values())


def ready(dtype: torch.dtype, stochastic: bool, sizes: list[int], names: Any, device: str) -> Ready:
    made: dict[str, torch.optim.Optimizer] = {}

    def build(name: str) -> Call:
        if name == ADAMW8:
            import bitsandbytes

            optimizer = bitsandbytes.optim.AdamW8bit(model(dtype, sizes, device), lr=LR)
        elif name == FUSED:
            optimizer = torch.optim.AdamW(model(torch.float32, sizes, device), lr=LR, fused=True)
        else:
            params = model(dtype, sizes, device)
            optimizer = dalle_ext.AdamW16(params, lr=LR, stochastic_rounding=stochastic)
        made[name] = optimizer
        return optimizer.step

    def check(name: str, result: None) -> Error | None:
        params = made[name].param_groups[0]["params"]
        moved = torch.cat([p.detach().flatten()[:4096] for p in params])
        assert bool(moved.isfinite().all()), "the parameters must be finite after a step"
        assert not torch.equal(moved, torch.full_like(moved, START)), (
            "a step must move the parameters"
        )
        if name != "ours":
            return None
        if FUSED in made:
            ours, theirs = made["ours"].state_bytes(), state_bytes(made[FUSED])
            assert ours <= 0.51 * theirs, "the state must be half of torch's"
        return drift(device)

    # Parameter read and written, gradient read, two moments of 2 bytes read and written.
    moved = sum(sizes) * (3 * dtype.itemsize + 8)
    calls = {name: partial(build, name) for name in ("ours", *names)}
    return Ready(calls, check, sum(sizes) * 1e-6, "Mparam/s", moved)


def cases(scale: str) -> Iterator[Case]:
    """Each dtype of the parameters, the 16-bit ones with both roundings."""
    half, total = (torch.float16, torch.bfloat16), sum(SIZES[scale])
    rivals = {FUSED: "eager"} | ({} if scale == "cpu" else {ADAMW8: "rest"})
    kinds = [(torch.float32, False), (half[0], False), (half[0], True)]
    if scale != "cpu":
        kinds += [(half[1], False), (half[1], True)]
    for dtype, stochastic in kinds:
        goals = {FUSED: 1.3} if scale == "cpu" else {FUSED: 1.6, ADAMW8: 1.2}
        name = f"{str(dtype)[6:]} parameters" + ", stochastic" * stochastic
        yield Case(
            op="adam16",
            what=f"AdamW16 step, {name}, {total / 1e6:.0f} million",
            ready=partial(ready, dtype, stochastic, SIZES[scale], tuple(rivals)),
            rivals=rivals,
            goals=goals if dtype == torch.float32 else {},
            goal_us=1.07 * 20 * total / 4.3e6 if dtype == torch.float32 else None,
            rounds=11,
        )


def test_beside_fused_adamw(case):
    harness.assert_right(harness.measure(case))
