"""Many small tensors with few operators: most of what a reduction costs the host."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


@functools.lru_cache(maxsize=256)
def number(value: float, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """0-d. On the CPU a Python number beside a float32 tensor costs four operators more.

    As all that is kept here it is made on the host: that copy waits, so any stream may use it.
    """
    return torch.tensor(value, dtype=dtype, device="cpu").to(device)


@functools.lru_cache(maxsize=256)
def numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(len,) float32, made once."""
    return torch.tensor(values, dtype=torch.float32, device="cpu").to(device)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """All elements, one tensor after another, of the largest dtype: a new (sum,) tensor."""
    contiguous = [t if t.is_contiguous() else t.contiguous() for t in tensors]
    return torch.cat([t if t.dim() == 1 else t.view(-1) for t in contiguous])


def elements(flat: Tensor) -> Sequence[Tensor]:
    """The elements of an (n,) tensor, (1,) each: a view of each, where `unbind` makes two."""
    return flat.split_with_sizes([1] * len(flat))


def split_rows(flat: Tensor, like: Sequence[Tensor], side: int, rank: int) -> list[Tensor]:
    """The matrices (rows, rank) of a flat tensor, as many rows as side `side` of `like` is long."""
    return list(flat.view(-1, rank).split_with_sizes([t.shape[side] for t in like]))


@functools.lru_cache(maxsize=1024)
def membership(block_of: tuple[int, ...], device: torch.device) -> tuple[list[int], Tensor]:
    """Which of the blocks, in their order, each gradient is of; and (blocks, len) float32, 1 for
    the gradients of a block, else 0."""
    blocks = sorted(set(block_of))
    position = [blocks.index(block) for block in block_of]
    members = torch.tensor(
        [[float(p == b) for p in position] for b in range(len(blocks))],
        dtype=torch.float32,
        device="cpu",
    )
    return position, members.to(device)


def max_abs(tensors: Sequence[Tensor]) -> Tensor:
    """(len,) float32 largest magnitudes; Inf or NaN where a tensor has one, 0 of an empty one."""
    if tensors[0].device.type == "cpu":  # a twentieth of the time of norms
        zeros = (number(0.0, tensors[0].device),) * 2
        ends = [end for t in tensors for end in (torch.aminmax(t) if t.numel() else zeros)]
        return joined(ends).float().view(-1, 2).abs().amax(1)
    nonempty = [t for t in tensors if t.numel()]
    norms = iter(torch._foreach_norm(nonempty, math.inf) if nonempty else ())
    zero = number(0.0, tensors[0].device)
    return torch.stack([next(norms).float() if t.numel() else zero for t in tensors])
