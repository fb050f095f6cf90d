"""Whether processes that hold the same part of a model still hold the same weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dalle.distributed.cluster import Cluster
from dalle.sharded import local_part


def drifted(model: nn.Module, cluster: Cluster) -> str | None:
    """In words, the first process whose weights are not those of its replica; None. Collective.

    Machines take the same updates from the same gradients, so their weights are equal bit for bit
    as long as all of them compute alike; what makes them drift apart (another kind of processor,
    a fault of memory) is nowhere else to be seen.

    Args:
        model: of equal weights on all machines, each shared out over its processes.
        cluster: of the model.
    """
    params = dict(model.named_parameters())
    every_hash = torch.stack([_hash(param) for param in params.values()]).tolist()
    hashes = dict(zip(params, every_hash, strict=True))
    # One number first: all of them would be megabytes where there are many processes.
    every = cluster.gather(hash(tuple(hashes.values())))  # of integers: alike in all processes
    pairs = [(p, p % cluster.shards) for p in range(cluster.shards, cluster.world)]
    apart = [(p, q) for p, q in pairs if every[p] != every[q]]
    if not apart:
        return None
    named = cluster.gather(hashes)
    process, other = apart[0]
    names = [n for n, found in named[process].items() if found != named[other][n]]
    rest = f" and {len(names) - 1} others" if len(names) > 1 else ""
    more = f"; so do those of {len(apart) - 1} more processes" if len(apart) > 1 else ""
    return (
        f"weights of process {process} differ from those of process {other}, which holds the same "
        f"part, in {names[0]}{rest}{more}"
    )


def _hash(tensor: Tensor) -> Tensor:
    own = local_part(tensor).detach()
    nothing = torch.zeros((), dtype=torch.int64, device=own.device)
    return torch.hash_tensor(own).view(torch.int64) if own.numel() else nothing
