"""The 16-bit ops beside a copy of the same bytes: formats, grad_scale, and AdamW16 beside AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import dalle_ext
from gpu import names
from gpu.bench import Bench
from gpu.cases import Case

Tensor = torch.Tensor
Call = Callable[[], Any]
CHECKED, TENSOR = 4096, 2**24  # elements held against the definition; elements of one gradient
BYTES = {"float32": 4, "float16": 2}


def equal_to_the_definition(op: Callable[..., Any], *given: Any) -> None:
    """Raises unless `op` gives on the GPU what the reference gives."""
    ours = op(*given)
    with dalle_ext.use_reference():
        wanted = op(*given)
    pairs = zip(ours, wanted, strict=True) if isinstance(ours, tuple) else ((ours, wanted),)
    for one, other in pairs:
        assert torch.equal(one, other), "must equal the definition bit for bit"


def copied(moved: int, bench: Bench) -> Call:
    """A copy that reads and writes `moved` bytes in all."""
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def formats(case: Case, x: Tensor, bench: Bench) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """pack and unpack."""
    moved = x.numel() * (x.element_size() + 2)
    codes = dalle_ext.pack(x, case.kind)

    def pack() -> Call:
        equal_to_the_definition(dalle_ext.pack, x[:CHECKED], case.kind)
        return lambda: dalle_ext.pack(x, case.kind)

    def unpack() -> Call:
        equal_to_the_definition(dalle_ext.unpack, codes[:CHECKED], case.kind, x.dtype)
        return lambda: dalle_ext.unpack(codes, case.kind, x.dtype)

    for which, prepare in (("pack", pack), ("unpack", unpack)):
        yield which, moved, {"ours": prepare, names.COPY: lambda: copied(moved, bench)}


def grad_scale(case: Case, x: Tensor, bench: Bench) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Both ends of a block, and all gradients of a model in place."""
    scale = torch.full((), 1024.0, device=bench.device)
    half, flag = x.half(), torch.zeros(1, device=bench.device)
    grads = list(x.clone().split(TENSOR))
    table, one = dalle_ext.TensorTable([grads]), torch.ones(1, device=bench.device)

    def enter() -> Call:
        equal_to_the_definition(dalle_ext.scale_gradient, x[:CHECKED], scale)
        return lambda: dalle_ext.scale_gradient(x, scale)

    def leave() -> Call:
        few = half[:CHECKED]
        equal_to_the_definition(dalle_ext.unscale_gradient, few.float(), few, scale)
        stream = x if x.dtype == torch.float32 else x.float()
        return lambda: dalle_ext.unscale_gradient(stream, half, scale)

    def unscale() -> Call:
        found = dalle_ext.unscale_gradients_(grads, one, table=table)
        wanted = sum(float(g.double().square().sum()) for g in grads) ** 0.5
        assert abs(float(found.norm) / wanted - 1) < 1e-6, "the norm must be right"
        return lambda: dalle_ext.unscale_gradients_(grads, one, table=table)

    def amp() -> Call:
        return lambda: torch._amp_foreach_non_finite_check_and_unscale_(grads, flag, one)

    sizes = {"enter": x.element_size() + 2, "leave": 10, "unscale": 2 * x.element_size()}
    for which, prepare in (("enter", enter), ("leave", leave), ("unscale", unscale)):
        moved = x.numel() * sizes[which]
        todo = {"ours": prepare, names.COPY: lambda n=moved: copied(n, bench)}
        yield which, moved, todo | ({names.AMP: amp} if which == "unscale" else {})


def adam16(case: Case, x: Tensor, bench: Bench) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """One step of the optimizers, each with parameters of its own."""

    def stepping(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Call:
        params = [torch.nn.Parameter(part.clone()) for part in x.split(TENSOR)]
        for param in params:
            param.grad = param.detach() * 1e-3
        optimizer = make(params)
        optimizer.step()
        moved = torch.cat([p.detach().flatten()[:CHECKED] for p in params])
        assert bool(moved.isfinite().all()), "the parameters must be finite after a step"
        assert not torch.equal(moved[:CHECKED], x[:CHECKED]), "a step must move the parameters"
        return optimizer.step

    def eight_bit(params: list[Tensor]) -> torch.optim.Optimizer:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(params, lr=1e-4)  # type: ignore[no-any-return]

    todo: dict[str, Any] = {
        "ours": lambda: stepping(lambda p: dalle_ext.AdamW16(p, lr=1e-4)),
        names.ROUNDED: lambda: stepping(
            lambda p: dalle_ext.AdamW16(p, lr=1e-4, stochastic_rounding=True)
        ),
        names.ADAMW: lambda: stepping(lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True)),
        names.ADAMW8: lambda: stepping(eight_bit),
    }
    # Parameter read and written, gradient read, two moments of 2 bytes read and written.
    yield "step", x.numel() * (3 * x.element_size() + 8), todo


MEASURE = {"formats": formats, "grad_scale": grad_scale, "adam16": adam16}


def measure(case: Case, bench: Bench) -> Iterator[dict[str, Any]]:
    """A row for each pass of the case."""
    generator = torch.Generator(bench.device).manual_seed(0)
    x = torch.randn(case.size[0], generator=generator, device=bench.device)
    x = x.to(getattr(torch, case.dtype))
    for which, moved, todo in MEASURE[case.op](case, x, bench):
        found = bench.times(todo)
        yield {
            **{"case": case.name, "pass": which, "ours": found.pop("ours"), "rivals": found},
            **{"work": moved * 1e-9, "unit": "GB/s", "bytes": moved},
        }
