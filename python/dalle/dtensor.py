"""Sharded tensors (`DTensor`, as FSDP2's `fully_shard` makes them)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import dalle_ext
from dalle_ext import local_part

__all__ = [
    "StatsTables",
    "fill_",
    "gather",
    "gradient_stats",
    "local_part",
    "shard_groups",
    "swapped",
]


@torch.no_grad()
def gather(tensor: Tensor) -> Tensor:
    """The full tensor of one that may be sharded, detached. Collective."""
    full_tensor: Any = getattr(tensor, "full_tensor", None)
    return tensor.detach() if full_tensor is None else full_tensor()


@torch.no_grad()
def fill_(param: Tensor, value: Tensor) -> None:
    """Gives a parameter its value; of a sharded one each process takes its part.

    Args:
        param: changed in place.
        value: the full value, the same on all processes.
    """
    value = value.to(param.device)
    if hasattr(param, "placements"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(param, DTensor)
        value = distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
    param.copy_(value)


@contextmanager
def swapped(params: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Parameters hold other values inside the block, and their previous ones afterwards.

    Args:
        params: by name.
        values: by the same names, sharded as the parameters are.
    """
    saved = {name: param.detach().clone() for name, param in params.items()}
    try:
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(values[name])
        yield
    finally:
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(saved[name])


def shard_groups(tensor: Any) -> tuple[Any, ...]:
    """The groups of processes that hold the other parts of a tensor, one for each sharded axis."""
    if not hasattr(tensor, "placements"):
        return ()
    sharded_axes = [
        axis for axis, placement in enumerate(tensor.placements) if placement.is_shard()
    ]
    return tuple(tensor.device_mesh.get_group(axis) for axis in sharded_axes)


class StatsTables:
    """Where the gradients of earlier `gradient_stats` lay; copies of it begin empty."""

    def __init__(self) -> None:
        self._tables: dict[tuple[Any, ...], dalle_ext.TensorTable] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_tables": {}}

    def table(
        self, key: tuple[Any, ...], grads: list[Tensor], groups: list[int]
    ) -> dalle_ext.TensorTable | None:
        """The last table of `key` if it says where these are, else a new one.

        None where a gradient is not contiguous, since the op makes another view of it every time.
        """
        if not all(map(Tensor.is_contiguous, grads)):
            return None
        table = self._tables.get(key)
        if table is None or not table.fits([grads], groups):
            table = self._tables[key] = dalle_ext.TensorTable([grads], groups)
            table.columns = []  # else the gradients would keep their memory
        return table


def gradient_stats(
    params: Sequence[Tensor],
    scales: float | Tensor,
    groups: Sequence[int] | None = None,
    *,
    check_only: bool = True,
    tables: StatsTables | None = None,
) -> tuple[Tensor, Tensor]:
    """Norm of the full gradient, unscaled, and how many elements of each group are not finite.

    Each process reads its own parts; sharded parameters are summed over all processes, replicated
    ones counted once. The same on all processes. Collective where there are sharded ones.

    Args:
        params: parameters; those without a gradient are left out.
        scales: as of `dalle_ext.unscale_gradients_`, on the gradients' device.
        groups: index of each parameter's group.
        check_only: False unscales the gradients in place.
        tables: kept from call to call, so that gradients at the same place cost the host less.

    Returns:
        The norm of all finite elements, 0-d float64, and counts (G,) int64.
    """
    by_groups: dict[tuple[Any, ...], tuple[list[Tensor], list[int]]] = {}
    for i, param in enumerate(params):
        if param.grad is not None:
            grads, group_ids = by_groups.setdefault(shard_groups(param), ([], []))
            grads.append(local_part(param.grad))
            group_ids.append(0 if groups is None else groups[i])
    count = scales.numel() if isinstance(scales, Tensor) else 1
    device = params[0].device
    squares = torch.zeros((), dtype=torch.float64, device=device)
    nonfinite = torch.zeros(count, dtype=torch.int64, device=device)
    for process_groups, (grads, group_ids) in by_groups.items():
        table = None if tables is None else tables.table(process_groups, grads, group_ids)
        stats = dalle_ext.unscale_gradients_(
            grads, scales, group_ids, check_only=check_only, table=table
        )
        sums = torch.cat([stats.sum_squares.sum()[None], stats.nonfinite.double()])
        for group in process_groups:
            torch.distributed.all_reduce(sums, group=group)
        squares = squares + sums[0]
        nonfinite = nonfinite + sums[1:].long()
    return squares.sqrt(), nonfinite
