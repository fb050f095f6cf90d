"""What passes between the processes that sum gradients: fp32 words, or 1-6-9 words of 16 bits."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import dalle_ext
from dalle.distributed.agreement import require_same
from dalle.distributed.groups import own_group

WIRES = ("1-6-9", "fp32")
# Its name since torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Traffic:
    """What a process sent.

    Attributes:
        sent: bytes.
        packed: elements that were made 16-bit words.
        counts: (3,) int64 on the device: of them, how many these words could not hold (as
            `dalle_ext.pack_counted` counts); None before the first.
    """

    sent: int = 0
    packed: int = 0
    counts: Tensor | None = field(default=None, repr=False)

    def count(self, *packed: dalle_ext.Packed) -> None:
        """Adds what packing counted; nothing waits for the device."""
        self.packed += sum(one.codes.numel() for one in packed)
        found = torch.stack([one.counts for one in packed]).sum(0)
        self.counts = found if self.counts is None else self.counts + found

    def shares(self) -> tuple[float, float]:
        """Of all packed elements, those that were too large and those that vanished."""
        if self.counts is None or not self.packed:
            return 0.0, 0.0
        saturated, flushed, _ = self.counts.tolist()
        return saturated / self.packed, flushed / self.packed


class Exchange:
    """Sums over a group of processes, in a group of its own.

    Collectives of one group must be begun in the same order everywhere, and gradients are reduced
    in a thread or on a stream beside whatever else the given group is used for.

    Args:
        group: which processes; None for all.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.traffic = Traffic()
        self.take(group)

    def take(self, group: dist.ProcessGroup | None) -> None:
        """Goes over to the processes of another group."""
        self.parent = group
        self.ranks = None if group is None else dist.get_process_group_ranks(group)
        self._own: dist.ProcessGroup | None = None

    def open(self) -> dist.ProcessGroup:
        """The own group; made when it is first needed, by all its processes. Collective then."""
        if self._own is None:
            self._own = own_group(self.parent, self)
        return self._own

    @property
    def group(self) -> dist.ProcessGroup:
        """See `open`."""
        return self.open()

    def __getstate__(self) -> dict[str, Any]:
        return {"traffic": self.traffic}  # a pickle belongs to no processes

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.take(None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchange:
        found = memo[id(self)] = Exchange(self.parent)
        found.traffic = copy.deepcopy(self.traffic, memo)
        return found

    @property
    def world(self) -> int:
        """How many processes."""
        return dist.get_world_size() if self.ranks is None else len(self.ranks)

    def gather(self, value: Any) -> list[Any]:
        """The value of each process."""
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.group)
        return found

    def require_same(self, own: Mapping[str, Any]) -> None:
        """Raises UsageError on every process unless all have the same values."""
        require_same("PowerSGD", own, self.group)

    def all_reduce(self, flat: Tensor) -> None:
        """Sums in place."""
        dist.all_reduce(flat, group=self.group)

    def all_reduce_max(self, flat: Tensor) -> None:
        """The largest of all, in place."""
        dist.all_reduce(flat, op=dist.ReduceOp.MAX, group=self.group)

    def all_to_all(self, parts: Tensor) -> Tensor:
        """Row i of every process's rows, on process i."""
        found = torch.empty_like(parts)
        dist.all_to_all_single(found, parts, group=self.group)
        return found

    def all_gather(self, part: Tensor) -> Tensor:
        """The parts of all, one after the other."""
        found = part.new_empty(self.world * part.numel())
        _all_gather(found, part, group=self.group)
        return found

    def broadcast(self, flat: Tensor) -> None:
        """Takes what the first process has."""
        dist.broadcast(flat, group=self.group, group_src=0)

    def sum_fp32_(self, tensors: list[Tensor]) -> None:
        """Replaces float32 tensors by their sums, in one all-reduce."""
        if not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        self.all_reduce(flat)
        self.traffic.sent += self._ring_bytes(flat)
        _spread(flat, tensors)

    def sum_codes_(self, tensors: list[Tensor]) -> None:
        """The same through 1-6-9 words, in the bytes of a ring all-reduce of 16 bits.

        No collective adds such words: each process gets one part of all buffers (all-to-all), adds
        it in float32, packs the sum, and all gather the sums. One process makes each sum, so all
        hold the same bits. Words travel as bfloat16, which gloo knows; nobody reads them as that.
        """
        if not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        part = -(-flat.numel() // self.world)
        packed = dalle_ext.pack_counted(flat, "1-6-9")
        codes = torch.zeros(self.world * part, dtype=torch.int16, device=flat.device)
        codes[: flat.numel()] = packed.codes
        theirs = self.all_to_all(codes.view(torch.bfloat16).view(self.world, part))
        total = dalle_ext.sum_codes(theirs.view(torch.int16), "1-6-9")
        codes = self.all_gather(total.codes.view(torch.bfloat16)).view(torch.int16)
        self.traffic.count(packed, total)
        self.traffic.sent += self._ring_bytes(codes)
        _spread(dalle_ext.unpack(codes, "1-6-9")[: flat.numel()], tensors)

    def take_first_(self, tensors: list[Tensor]) -> None:
        """Replaces tensors of one dtype by those of the first process, in one broadcast."""
        if not tensors or self.world == 1:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        self.broadcast(flat.view(torch.bfloat16) if flat.dtype == torch.int16 else flat)
        self.traffic.sent += flat.numel() * flat.element_size()
        _spread(flat, tensors)

    def _ring_bytes(self, flat: Tensor) -> int:
        """Bytes one process sends when a buffer is summed in parts and the sums are gathered."""
        return 2 * (self.world - 1) * flat.numel() * flat.element_size() // self.world


def _spread(flat: Tensor, tensors: list[Tensor]) -> None:
    start = 0
    for tensor in tensors:
        tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()
