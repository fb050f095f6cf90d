"""Tensors of which each process holds a part (`DTensor`, as FSDP2's `fully_shard` makes them)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dalle_ext import local_part

__all__ = ["gather", "local_part", "over_shards", "shard_group"]


@torch.no_grad()
def gather(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process may hold a part. Collective; detached."""
    whole: Any = getattr(tensor, "full_tensor", None)
    return tensor.detach() if whole is None else whole()


def shard_group(tensors: Iterable[Tensor]) -> Any:
    """The processes that hold the other parts of the first of these; None where it is whole."""
    first: Any = next(iter(tensors))
    if not hasattr(first, "placements"):
        return None
    parted = [axis for axis, placed in enumerate(first.placements) if placed.is_shard()]
    return first.device_mesh.get_group(parted[0]) if parted else None


def over_shards(params: Iterable[Tensor], norm: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """A norm, and integers, of all parts of the parameters' gradients from those of this process.

    Args:
        params: which.
        norm: 0-d float64.
        counts: (n,) int64.
    """
    group = shard_group(params)
    if group is None:
        return norm, counts
    both = torch.cat([norm.square()[None], counts.double()])
    torch.distributed.all_reduce(both, group=group)
    return both[0].sqrt(), both[1:].long()
