"""One batch in parts that are computed at the same time, each on its own thread.

A model of small layers keeps several cores busy this way where torch's own threads, which meet at
the end of every operation, do not (docs/log.md). The numbers of an update then depend on the number
of parts, which the recipe says, and not on the number of cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dalle.configs import integer
from dalle.errors import SECOND_DERIVATIVE
from dalle_ext._checks import once_differentiable

Run = Callable[[slice], Sequence[Tensor]]


@cache
def _threads(parts: int, intra_op: int) -> ThreadPoolExecutor:
    """`parts` threads that use `intra_op` threads for one operation, as their caller does."""
    return ThreadPoolExecutor(
        parts, f"parts-{parts}", initializer=torch.set_num_threads, initargs=(intra_op,)
    )


def slices(size: int, parts: int) -> list[slice]:
    """`size` items in `parts` runs of nearly equal length; fewer where there are fewer items."""
    size, parts = integer("parts", "size", size, 0), integer("parts", "parts", parts, 1)
    ends = [size * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False) if a < b]


class _RunParts(torch.autograd.Function):
    """Runs the parts under their own graphs; backward walks each graph on its own thread."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Run,
        part_slices: list[slice],
        graphs: list[list[Tensor]],
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        def run_part(rows: slice) -> list[Tensor]:
            with torch.enable_grad():
                return list(run(rows))

        ctx.pool = _threads(len(part_slices), torch.get_num_threads())
        graphs[:] = list(ctx.pool.map(run_part, part_slices))
        ctx.graphs, ctx.parameters = graphs, parameters
        outputs = tuple(out.detach() for part in graphs for out in part)
        ctx.mark_non_differentiable(*(out for out in outputs if not out.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        def walk(part: Sequence[Tensor], grads: Sequence[Tensor]) -> Sequence[Tensor | None]:
            ends = [(out, g) for out, g in zip(part, grads, strict=True) if out.requires_grad]
            outs, starts = zip(*ends, strict=True)
            results: tuple[Tensor | None, ...]
            results = torch.autograd.grad(outs, ctx.parameters, starts, allow_unused=True)
            return results

        size = len(ctx.graphs[0])
        grads_by_part = [gradients[i : i + size] for i in range(0, len(gradients), size)]
        grads_of_parts = list(ctx.pool.map(walk, ctx.graphs, grads_by_part))
        ctx.graphs.clear()
        totals = [_sum(grads) for grads in zip(*grads_of_parts, strict=True)]
        sources = (*(g for g in gradients if g is not None), *ctx.parameters)
        present = [total for total in totals if total is not None]
        checked = iter(once_differentiable(present, sources, SECOND_DERIVATIVE))
        return None, None, None, *(None if total is None else next(checked) for total in totals)


def _sum(gradients: Sequence[Tensor | None]) -> Tensor | None:
    """The sum in the order of the parts."""
    present = [gradient for gradient in gradients if gradient is not None]
    if len(present) < 2:
        return present[0] if present else None
    total = present[0] + present[1]  # not in place: autograd may have given it to two parameters
    for gradient in present[2:]:
        total.add_(gradient)
    return total


def run_parts(run: Run, size: int, parts: int, model: nn.Module) -> list[tuple[Tensor, ...]]:
    """`run` on each part of a batch, at the same time; gradients flow into `model` as usual.

    Equivalent to `[tuple(run(rows)) for rows in slices(size, parts)]`.

    Args:
        run: takes a slice of the batch and returns tensors, as many for each part; only `model`'s
            parameters get gradients through them. It must not draw from torch's own generator,
            which the threads would share.
        size: items in the batch.
        parts: how many; 1 calls `run` in place.
        model: whose parameters `run` uses.
    """
    part_slices = slices(size, parts)
    if len(part_slices) < 2:
        return [tuple(run(rows)) for rows in part_slices]
    if not torch.is_grad_enabled():
        return run_parts_no_grad(run, size, parts)
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat: tuple[Tensor, ...]
    flat = _RunParts.apply(run, part_slices, [], *parameters)  # type: ignore[no-untyped-call]  # of torch
    count = len(flat) // len(part_slices)
    return [flat[i : i + count] for i in range(0, len(flat), count)]


def run_parts_no_grad(run: Run, size: int, parts: int) -> list[tuple[Tensor, ...]]:
    """As `run_parts`, without gradients and for any `run`."""

    @torch.no_grad()
    def run_part(rows: slice) -> tuple[Tensor, ...]:
        return tuple(run(rows))

    part_slices = slices(size, parts)
    if len(part_slices) < 2:
        return [run_part(rows) for rows in part_slices]
    return list(_threads(len(part_slices), torch.get_num_threads()).map(run_part, part_slices))


def sum_parts(outputs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Sums of the parts' outputs, added in the order of the parts."""
    return [
        torch.stack(list(values)).sum(0) if len(values) > 1 else values[0]
        for values in zip(*outputs, strict=True)
    ]


PARTS = 2  # fixed, so that the numbers do not depend on the number of cores


@contextmanager
def threads_for_parts() -> Iterator[None]:
    """Inside, torch's threads are divided among the parts, which run at the same time."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // PARTS))
    try:
        yield
    finally:
        torch.set_num_threads(before)
