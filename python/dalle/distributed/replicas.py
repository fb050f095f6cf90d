"""Whether processes that hold the same part of a model still hold the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dalle.dtensor import local_part


def find_drift(model: nn.Module, gather: Callable[[Any], list[Any]], shards: int) -> str | None:
    """Names the first process whose weights differ from its replica's, or None. Collective.

    Machines make the same updates from the same gradients, so their weights are equal bit for bit
    as long as their arithmetic is the same. Nothing else shows that they drift apart, by another
    kind of processor or a memory fault.

    Args:
        model: of equal weights on all machines, sharded over the processes of each.
        gather: a value of each process, in their order; collective.
        shards: processes of one machine.
    """
    params = dict(model.named_parameters())
    values = torch.stack([_hash(param) for param in params.values()]).tolist()
    hashes = dict(zip(params, values, strict=True))
    # One number a process first: the hashes of all parameters would be megabytes.
    digests = gather(hash(tuple(hashes.values())))  # hashes of integers are not seeded
    pairs = [(p, p % shards) for p in range(shards, len(digests))]
    mismatches = [(p, q) for p, q in pairs if digests[p] != digests[q]]
    if not mismatches:
        return None
    hashes_by_rank = gather(hashes)
    process, other = mismatches[0]
    names = [n for n, value in hashes_by_rank[process].items() if value != hashes_by_rank[other][n]]
    rest = f" and {len(names) - 1} others" if len(names) > 1 else ""
    more = f"; so do those of {len(mismatches) - 1} more processes" if len(mismatches) > 1 else ""
    return (
        f"weights of process {process} differ from those of process {other}, which holds the same "
        f"part, in {names[0]}{rest}{more}"
    )


_CHUNK = 1 << 20  # elements at a time, so that the hash needs a few times 8 MiB
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_ODD = -0x61C8864680B583EB, -0x4B47D0C5A1D8B6BD  # as int64; odd: no factor loses a bit


@torch.no_grad()
def _hash(tensor: Tensor) -> Tensor:
    """Hash of the bits and positions of this process's part: 0-d int64 on its device.

    The sum, modulo 2^64, of each element's mixed bits times an odd number from its position. All
    steps are invertible, so that a change of one element is always seen. `torch.hash_tensor` is an
    XOR of all elements, blind to positions, to pairs of equal ones and to many changes of sign.
    """
    local = local_part(tensor).detach()
    bits = local.reshape(-1).view(_INTEGERS.get(local.element_size(), torch.int64))
    total = torch.zeros((), dtype=torch.int64, device=local.device)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].long()
        positions = torch.arange(
            start, start + part.numel(), dtype=torch.int64, device=local.device
        )
        total += (_mixed(part, _ODD[0]) * (_mixed(positions, _ODD[1]) | 1)).sum()
    return total


def _mixed(numbers: Tensor, odd: int) -> Tensor:
    """A bijection of int64 that spreads a number over 64 bits; 0 stays 0."""
    numbers = numbers * odd
    numbers ^= (numbers >> 32) & 0xFFFFFFFF
    return numbers.mul_(odd)
