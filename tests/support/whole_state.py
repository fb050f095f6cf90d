"""The optimizer state of FSDP2 gathered whole and put back, in processes of `processes.run`."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import dalle_ext
from dalle_ext import local_part

TO_FIRST = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
MOMENTS = ("exp_avg", "exp_avg_sq")


def place(param):
    """An odd number of rows is shared out along its columns; of a bias unevenly."""
    return Shard(1 if param.dim() == 2 and len(param) % 2 else 0)


def make(mesh=None):
    """Two layers whose weights are kept in codes, sharded over a mesh, and their optimizer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(102, 97), nn.Linear(97, 102))
    if mesh is not None:
        fully_shard(net, mesh=mesh, shard_placement_fn=place)
    return net, dalle_ext.AdamW16(net.parameters(), lr=1e-2)


def gathered(rank):
    mesh = init_device_mesh("cpu", (2,))
    net, optimizer = make(mesh)
    for step in range(2):
        x = torch.randn(8, 102, generator=torch.Generator().manual_seed(step))
        net.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    whole = get_optimizer_state_dict(net, optimizer, options=TO_FIRST)
    found = {"names": sorted(whole.get("state", {}))}
    if rank == 0:
        plain, alone = make()
        set_optimizer_state_dict(plain, alone, whole)
        kept = alone.state[plain[0].weight]
        found |= {name: kept[name] for name in ("step", *MOMENTS)}
        found["bytes"] = whole["state"]["0.weight"]["exp_avg"]
    again, other = make(mesh)
    given = whole or {"state": {}, "param_groups": []}
    set_optimizer_state_dict(again, other, given, options=FROM_FIRST)
    found["own"] = {name: local_part(optimizer.state[net[0].weight][name]) for name in MOMENTS}
    found["same"] = all(
        torch.equal(local_part(mine), local_part(theirs))
        for one, two in zip(optimizer.state.values(), other.state.values(), strict=True)
        for mine, theirs in zip(one.values(), two.values(), strict=True)
    )
    return found
