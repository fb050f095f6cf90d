"""Collectives of the processes that average gradients: sums in fp32, or in 16-bit 1-6-9 words."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import dalle_ext
from dalle.distributed.agreement import require_same
from dalle.distributed.groups import duplicate_group
from dalle.distributed.traffic import Traffic

WIRE_FORMATS = ("1-6-9", "fp32")
# Its name since torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Communicator:
    """Collectives over the processes of a group, in a process group that nothing else uses.

    Collectives of one group must be issued in the same order on all processes. Gradients are
    reduced in a thread or on a stream beside the backward pass, which uses the given group.

    Args:
        group: which processes; None for all.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.traffic = Traffic()
        self.set_parent(group)

    def set_parent(self, group: dist.ProcessGroup | None) -> None:
        """Uses the processes of another group from here on."""
        self.parent = group
        self.ranks = None if group is None else dist.get_process_group_ranks(group)
        self._group: dist.ProcessGroup | None = None

    def init_group(self) -> dist.ProcessGroup:
        """The process group; the first call on each process makes it, and is collective."""
        if self._group is None:
            self._group = duplicate_group(self.parent, self)
        return self._group

    @property
    def group(self) -> dist.ProcessGroup:
        """See `init_group`."""
        return self.init_group()

    def __getstate__(self) -> dict[str, Any]:
        return {"traffic": self.traffic}  # a process group cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.set_parent(None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Communicator:
        copied = memo[id(self)] = Communicator(self.parent)
        copied.traffic = copy.deepcopy(self.traffic, memo)
        return copied

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return dist.get_world_size() if self.ranks is None else len(self.ranks)

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, in their order."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def require_same(self, values: Mapping[str, Any]) -> None:
        """Raises UsageError on every process unless all have the same values."""
        require_same("PowerSGD", values, self.group)

    def all_reduce(self, tensor: Tensor) -> None:
        """Replaces a tensor by its sum over the processes."""
        dist.all_reduce(tensor, group=self.group)

    def all_reduce_max(self, tensor: Tensor) -> None:
        """Replaces a tensor by its maximum over the processes."""
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)

    def all_to_all(self, rows: Tensor) -> Tensor:
        """(world size, n): row i of the result is this process's row from process i."""
        received = torch.empty_like(rows)
        dist.all_to_all_single(received, rows, group=self.group)
        return received

    def all_gather(self, shard: Tensor) -> Tensor:
        """(n,) on each process -> (world size * n,), in the order of the processes."""
        gathered = shard.new_empty(self.world_size * shard.numel())
        _all_gather(gathered, shard, group=self.group)
        return gathered

    def broadcast(self, tensor: Tensor) -> None:
        """Replaces a tensor by the first process's."""
        dist.broadcast(tensor, group=self.group, group_src=0)

    def sum_fp32_(self, flat: Tensor) -> Tensor:
        """Replaces a float32 tensor by its sum over the processes, and returns it."""
        if self.world_size == 1:
            return flat
        self.all_reduce(flat)
        self.traffic.sent += self._ring_bytes(flat)
        return flat

    def sum_codes(self, flat: Tensor) -> Tensor:
        """The sum of (n,) float32 over the processes, in 1-6-9 words: a ring's bytes of 16 bits.

        No collective adds such words. So each process gets one shard of all buffers (all-to-all),
        adds it in float32, and packs the sum; then all gather the sums. One process computes each
        sum, so all hold the same bits. The words are sent as bytes: no collective takes int16, and
        read as 16-bit floats those from 14 upwards are NaN to what looks for NaN in the traffic.
        """
        size, world_size = flat.numel(), self.world_size
        packed = dalle_ext.pack_counted(flat, "1-6-9")
        if world_size == 1:
            self.traffic.count(packed)
            return dalle_ext.unpack(packed.codes, "1-6-9")
        codes, missing = packed.codes, -size % world_size
        if missing:
            codes = torch.cat([codes, codes.new_zeros(missing)])
        received = self.all_to_all(codes.view(torch.uint8).view(world_size, -1))
        reduced = dalle_ext.sum_codes(received.view(torch.int16), "1-6-9")
        codes = self.all_gather(reduced.codes.view(torch.uint8)).view(torch.int16)
        self.traffic.count(packed, reduced)
        self.traffic.sent += self._ring_bytes(codes)
        return dalle_ext.unpack(codes[:size] if missing else codes, "1-6-9")

    def all_reduce_fp32_(self, tensors: list[Tensor]) -> None:
        """Replaces float32 tensors by their sums, in one all-reduce."""
        if tensors:
            _unflatten(self.sum_fp32_(torch.cat([t.reshape(-1) for t in tensors])), tensors)

    def all_reduce_codes_(self, tensors: list[Tensor]) -> None:
        """As `all_reduce_fp32_`, see `sum_codes`."""
        if tensors:
            _unflatten(self.sum_codes(torch.cat([t.reshape(-1) for t in tensors])), tensors)

    def broadcast_(self, tensors: list[Tensor]) -> None:
        """Replaces tensors of one dtype by those of the first process, in one broadcast."""
        if not tensors or self.world_size == 1:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        self.broadcast(flat.view(torch.uint8) if flat.dtype == torch.int16 else flat)
        self.traffic.sent += flat.numel() * flat.element_size()
        _unflatten(flat, tensors)

    def _ring_bytes(self, flat: Tensor) -> int:
        """Bytes a process sends in a ring all-reduce: a reduce-scatter, then an all-gather."""
        return 2 * (self.world_size - 1) * flat.numel() * flat.element_size() // self.world_size


def _unflatten(flat: Tensor, tensors: list[Tensor]) -> None:
    """Copies the parts of a flat buffer into the tensors it was concatenated from."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    views = [p.view_as(t) for p, t in zip(parts, tensors, strict=True)]
    torch._foreach_copy_(tensors, views)
