"""Scaled gradients beside a plain copy of the same bytes, and beside torch's unscaling.

The copies read and write what the op reads and writes, and like the op allocate what it allocates.
`torch._amp_foreach_non_finite_check_and_unscale_` sets a flag and divides; it counts nothing and
takes no norm, so `unscale_gradients_` is also held against the ops that do the same jobs.
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
COPY, AMP = "plain copy of the bytes", "torch._amp_foreach_non_finite_check_and_unscale_"
APART = "torch, one pass a job"
CHECKED = 4099
# Powers of two of elements: of a stream (on a CPU what the ends allocate is then not fresh pages),
# and of all gradients (nothing of this size is allocated in a call).
POWERS = {"cpu": (22, 25), "gpu": (28, 28), "tiny": (12, 14)}
SCALE, UNSCALE = "scale_gradient", "unscale_gradient"
ALL, CHECK = "unscale_gradients_, 100", "check only, 100"


def jobs_apart(grads: list[Tensor], scale: Tensor) -> tuple[Tensor, ...]:
    """The counts and the norm of `unscale_gradients_` by torch's own ops, then the division."""
    flag, inverse = torch.zeros(1, device=scale.device), scale.reciprocal()
    zeros = torch.stack([(g == 0).sum() for g in grads])
    small = torch.stack([(g.abs() < torch.finfo(g.dtype).tiny).sum() for g in grads])
    most = torch.stack(torch._foreach_norm(grads, float("inf")))
    norms = torch.stack(torch._foreach_norm(grads, 2))
    torch._amp_foreach_non_finite_check_and_unscale_(grads, flag, inverse)
    return flag, zeros, small, most, norms


def ready(which: str, dtype: torch.dtype, numel: int, names: tuple[str, ...], device: str) -> Ready:
    draw = torch.Generator(device).manual_seed(0)
    x = torch.randn(numel, generator=draw, device=device)
    low = x.to(torch.float16 if which == UNSCALE else dtype)
    scale, one = torch.full((), 1024.0, device=device), torch.ones(1, device=device)
    grads = list(low.clone().chunk(100))
    table = dalle_ext.TensorTable([grads])
    size = dtype.itemsize
    moved = numel * {SCALE: size + 2, UNSCALE: 10, ALL: 2 * size, CHECK: size}[which]
    half = torch.zeros(moved // 2, dtype=torch.uint8, device=device)
    flag = torch.zeros(1, device=device)
    into = torch.zeros_like(half)
    ops: dict[str, Callable[[int | None], Any]] = {
        SCALE: lambda n: dalle_ext.scale_gradient(low[:n], scale).grad,
        UNSCALE: lambda n: dalle_ext.unscale_gradient(x[:n], low[:n], scale),
    }

    def unscale() -> Any:
        return dalle_ext.unscale_gradients_(grads, one, check_only=which == CHECK, table=table)

    calls: dict[str, Callable[[], Call]] = {
        "ours": lambda: unscale if "100" in which else lambda: ops[which](None),
        COPY: lambda: (lambda: into.copy_(half)) if "100" in which else half.clone,
        AMP: lambda: lambda: torch._amp_foreach_non_finite_check_and_unscale_(grads, flag, one[0]),
        APART: lambda: lambda: jobs_apart(grads, one[0]),
    }

    def check(name: str, result: Any) -> Error | None:
        """The norm; elements of the ends that are not the definition's."""
        if "100" in which and name in (COPY, AMP):
            return None
        if "100" in which:
            norm = float(result.norm if name == "ours" else result[4].norm())
            most = 1e-6 if name == "ours" else 1e-2  # torch keeps norms in the dtype
            return Error(abs(norm / float(low.double().norm()) - 1), most)
        if name != "ours":
            return None
        with dalle_ext.use_reference():
            return Error(float((result[:CHECKED] != ops[which](CHECKED)).sum()), 0.0)

    chosen = {name: calls[name] for name in ("ours", *names)}
    return Ready(chosen, check, numel * 1e-6, "Melem/s", moved)


def cases(scale: str) -> Iterator[Case]:
    """Both ends of a block, and the gradients of a model in place, in each dtype."""
    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    both = {SCALE: (f32,), UNSCALE: (f16,), ALL: (f32, f16), CHECK: (f16,)}
    if scale != "cpu":
        both |= {SCALE: (f32, f16, bf16), ALL: (f32, f16, bf16), CHECK: (f32, f16)}
    names = {SCALE: "scale_gradient, {} to float16", UNSCALE: "unscale_gradient, {} into float32",
             ALL: ALL + " of {}", CHECK: CHECK + " of {}"}  # fmt: skip
    rivals = {SCALE: (COPY,), UNSCALE: (COPY,), ALL: (COPY, AMP, APART), CHECK: (APART,)}
    for which, dtypes in both.items():
        power = POWERS[scale]["100" in which]
        for dtype in dtypes:
            goals = {COPY: 1 / 1.3} if which == ALL else {}
            goals = goals if scale == "cpu" else {COPY: 1 / 1.07}
            yield Case(
                op="grad_scale",
                what=f"grad_scale {names[which].format(str(dtype)[6:])}, 2^{power} elements",
                ready=partial(ready, which, dtype, 1 << power, rivals[which]),
                rivals=dict.fromkeys(rivals[which], "eager"),
                goals=goals,
                rounds=41,
            )


def test_beside_a_copy(case):
    rows = harness.measure(case)
    harness.assert_right(rows)
    assert all(row["ratio"] > 1 for row in rows if row["rival"] == APART), harness.table(rows)
