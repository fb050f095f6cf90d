"""Sums over processes, in fp32 words or in 1-6-9 words of 16 bits (paper section 2.5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

import dalle_ext

WIRES = ("1-6-9", "fp32")
# Its name since torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Traffic:
    """What a process sent, in bytes, and what 16-bit words could not hold, in elements."""

    sent: int = 0
    saturated: int = 0
    flushed: int = 0


def sum_fp32_(tensors: list[Tensor], group: dist.ProcessGroup | None, traffic: Traffic) -> None:
    """Replaces float32 tensors by their sums over the group, in one all-reduce."""
    if not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat, group=group)
    traffic.sent += _ring_bytes(flat, group)
    _spread(flat, tensors)


def sum_codes_(tensors: list[Tensor], group: dist.ProcessGroup | None, traffic: Traffic) -> None:
    """The same through 1-6-9 words, in the bytes of a ring all-reduce of 16 bits.

    No collective adds such words: each process gets one part of all buffers (all-to-all), adds it
    in float32, packs the sum, and all gather the sums. One process makes each sum, so all hold the
    same bits. Words travel as bfloat16, which gloo knows; nobody reads them as that.
    """
    if not tensors:
        return
    world = dist.get_world_size(group)
    flat = torch.cat([t.reshape(-1) for t in tensors])
    part = -(-flat.numel() // world)
    packed = dalle_ext.pack_counted(flat, "1-6-9")
    codes = torch.zeros(world * part, dtype=torch.int16, device=flat.device)
    codes[: flat.numel()] = packed.codes
    theirs = torch.empty_like(codes)
    dist.all_to_all_single(theirs.view(torch.bfloat16), codes.view(torch.bfloat16), group=group)
    total = dalle_ext.sum_codes(theirs.view(world, part), "1-6-9")
    gathered = codes.view(torch.bfloat16)
    _all_gather(gathered, total.codes.view(torch.bfloat16), group=group)
    counts = (packed.counts + total.counts).tolist() if flat.device.type == "cpu" else (0, 0)
    traffic.saturated += int(counts[0])
    traffic.flushed += int(counts[1])
    traffic.sent += _ring_bytes(codes, group)
    _spread(dalle_ext.unpack(codes, "1-6-9")[: flat.numel()], tensors)


def _ring_bytes(flat: Tensor, group: dist.ProcessGroup | None) -> int:
    """Bytes one process sends when a buffer is summed in parts and the sums are gathered."""
    world = dist.get_world_size(group)
    return 2 * (world - 1) * flat.numel() * flat.element_size() // world


def _spread(flat: Tensor, tensors: list[Tensor]) -> None:
    start = 0
    for tensor in tensors:
        tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()
