"""Whether processes that hold the same part of a model still hold the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dalle.dtensor import local_part


def drifted(model: nn.Module, gather: Callable[[Any], list[Any]], shards: int) -> str | None:
    """In words, the first process whose weights are not those of its replica; None. Collective.

    Machines take the same updates from the same gradients, so their weights are equal bit for bit
    as long as all of them compute alike; what makes them drift apart (another kind of processor,
    a fault of memory) is nowhere else to be seen.

    Args:
        model: of equal weights on all machines, each shared out over its processes.
        gather: a value of each process, in their order; collective.
        shards: processes of one machine.
    """
    params = dict(model.named_parameters())
    every_hash = torch.stack([_hash(param) for param in params.values()]).tolist()
    hashes = dict(zip(params, every_hash, strict=True))
    # One number first: all of them would be megabytes where there are many processes.
    every = gather(hash(tuple(hashes.values())))  # of integers: alike in all processes
    pairs = [(p, p % shards) for p in range(shards, len(every))]
    apart = [(p, q) for p, q in pairs if every[p] != every[q]]
    if not apart:
        return None
    named = gather(hashes)
    process, other = apart[0]
    names = [n for n, found in named[process].items() if found != named[other][n]]
    rest = f" and {len(names) - 1} others" if len(names) > 1 else ""
    more = f"; so do those of {len(apart) - 1} more processes" if len(apart) > 1 else ""
    return (
        f"weights of process {process} differ from those of process {other}, which holds the same "
        f"part, in {names[0]}{rest}{more}"
    )


_CHUNK = 1 << 20  # elements: what the hash needs of memory is a few times 8 MiB
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_ODD = -0x61C8864680B583EB, -0x4B47D0C5A1D8B6BD  # as int64; odd: no factor loses a bit


@torch.no_grad()
def _hash(tensor: Tensor) -> Tensor:
    """0-d int64 of this process's part, of every element's bits and place; on its device.

    The sum, modulo 2^64, of each element's mixed bits times an odd number of its place. All steps
    can be undone, so that one element that changed is always seen; `torch.hash_tensor` is an XOR of
    all elements, blind to places, to pairs of equal ones and to many changes of sign.
    """
    own = local_part(tensor).detach()
    bits = own.reshape(-1).view(_INTEGERS.get(own.element_size(), torch.int64))
    total = torch.zeros((), dtype=torch.int64, device=own.device)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].long()
        place = torch.arange(start, start + part.numel(), dtype=torch.int64, device=own.device)
        total += (_mixed(part, _ODD[0]) * (_mixed(place, _ODD[1]) | 1)).sum()
    return total


def _mixed(numbers: Tensor, odd: int) -> Tensor:
    """Each number spread over 64 bits: 0 stays 0, others stay apart."""
    numbers = numbers * odd
    numbers ^= (numbers >> 32) & 0xFFFFFFFF
    return numbers.mul_(odd)
