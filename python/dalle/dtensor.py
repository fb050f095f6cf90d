"""Tensors of which each process holds a part (`DTensor`, as FSDP2's `fully_shard` makes them)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import dalle_ext
from dalle_ext import local_part

__all__ = ["fill_", "gather", "gradient_stats", "local_part", "shard_groups", "swapped"]


@torch.no_grad()
def gather(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process may hold a part. Collective; detached."""
    whole: Any = getattr(tensor, "full_tensor", None)
    return tensor.detach() if whole is None else whole()


@torch.no_grad()
def fill_(param: Tensor, value: Tensor) -> None:
    """Gives a parameter its value; of one that is sharded each process takes its part.

    Args:
        param: changed in place.
        value: all of it, the same on all processes.
    """
    value = value.to(param.device)
    if hasattr(param, "placements"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(param, DTensor)
        value = distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
    param.copy_(value)


@contextmanager
def swapped(params: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Parameters hold other values inside the block, their own again afterwards.

    Args:
        params: by name.
        values: for each of them, shared out as it is.
    """
    own = {name: param.detach().clone() for name, param in params.items()}
    try:
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(values[name])
        yield
    finally:
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(own[name])


def shard_groups(tensor: Any) -> tuple[Any, ...]:
    """The groups of processes that hold the other parts of a tensor, one for each sharded axis."""
    if not hasattr(tensor, "placements"):
        return ()
    parted = [axis for axis, placed in enumerate(tensor.placements) if placed.is_shard()]
    return tuple(tensor.device_mesh.get_group(axis) for axis in parted)


def gradient_stats(
    params: Sequence[Tensor],
    scales: float | Tensor,
    groups: Sequence[int] | None = None,
    *,
    check_only: bool = True,
) -> tuple[Tensor, Tensor]:
    """Norm of the whole gradient, unscaled, and how many elements of each group are not finite.

    Each process reads its own parts; of parameters that are sharded the parts of all are counted,
    and of the others one. The same on all processes. Collective where there are sharded ones.

    Args:
        params: parameters; those without a gradient are left out.
        scales: as of `dalle_ext.unscale_gradients_`, on the gradients' device.
        groups: of each parameter.
        check_only: False unscales the gradients in place.

    Returns:
        The norm of all finite elements, 0-d float64, and counts (G,) int64.
    """
    kinds: dict[tuple[Any, ...], tuple[list[Tensor], list[int]]] = {}
    for i, param in enumerate(params):
        if param.grad is not None:
            grads, of = kinds.setdefault(shard_groups(param), ([], []))
            grads.append(local_part(param.grad))
            of.append(0 if groups is None else groups[i])
    count = scales.numel() if isinstance(scales, Tensor) else 1
    device = params[0].device
    squares = torch.zeros((), dtype=torch.float64, device=device)
    nonfinite = torch.zeros(count, dtype=torch.int64, device=device)
    for shared, (grads, of) in kinds.items():
        stats = dalle_ext.unscale_gradients_(grads, scales, of, check_only=check_only)
        both = torch.cat([stats.sum_squares.sum()[None], stats.nonfinite.double()])
        for group in shared:
            torch.distributed.all_reduce(both, group=group)
        squares = squares + both[0]
        nonfinite = nonfinite + both[1:].long()
    return squares.sqrt(), nonfinite
