"""A small model trained by DDP and by FSDP2 with `PowerSGD`: bodies of `test_distributed`."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from dalle.distributed import PowerSGD

WIDTH = 32


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(),
        nn.Linear(4 * WIDTH, WIDTH), nn.Linear(WIDTH, 11),
    )  # fmt: skip


def batch(rank, step):
    draw = torch.Generator().manual_seed(1000 + 10 * step + rank)
    tokens = torch.randint(0, 11, (16,), generator=draw)
    return tokens, (3 * tokens + 1) % 11


def train(net, rank, steps, optimizer, parts=1, sync=None):
    """`parts` micro-batches an update; `sync(last)` is called before each of several."""
    losses = []
    for step in range(steps):
        tokens, wanted = batch(rank, step)
        for part in range(parts):
            if sync is not None:
                sync(part == parts - 1)
            own = slice(part, None, parts)
            loss = nn.functional.cross_entropy(net(tokens[own]), wanted[own])
            (loss / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def ddp(rank, options, steps):
    net = DDP(model(), bucket_cap_mb=0.02)
    psgd = None
    if options is not None:
        psgd = PowerSGD(**options, exclude=[net.module[4].weight])  # the unembedding
        psgd.attach(net)
    losses = train(net, rank, steps, torch.optim.AdamW(net.parameters(), lr=1e-2))
    weights = {name: p.detach() for name, p in net.module.named_parameters()}
    names = [] if psgd is None else sorted(psgd.compressor.matrices)
    return {"losses": losses, "weights": weights, "names": names}


def fsdp(rank, options, steps, parts=1, way="", mixed=None):
    """`way`: "at once" never overlaps, "last" exchanges with the last micro-batch only, "whole"
    compresses nothing."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    net, policy = model(), {}
    if mixed is not None:
        reduce = getattr(torch, mixed)
        policy = {"mp_policy": MixedPrecisionPolicy(reduce_dtype=reduce)}
    for layer in (net[1], net[3]):
        fully_shard(layer, mesh=mesh["shard"], **policy)
    fully_shard(net, mesh=mesh["shard"], **policy)
    psgd = PowerSGD(group=mesh["replicate"].get_group(), **options)
    if way == "at once":
        psgd._reduce_async = lambda gradients, _: psgd.compressor.reduce_(gradients, psgd._excluded)
    psgd.attach(net)
    if way == "whole":
        psgd._excluded |= set(psgd._params)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    sync = net.set_requires_gradient_sync if way == "last" else None
    losses = train(net, rank, steps, optimizer, parts, sync)
    weights = {name: p.detach().full_tensor() for name, p in net.named_parameters()}
    names, report = sorted(psgd.compressor.matrices), psgd.report()
    if sync is not None:
        sync(True)
    nn.functional.cross_entropy(net(batch(rank, 0)[0]), batch(rank, 0)[1]).backward()
    norms = [psgd.gradient_norm(), nn.utils.get_total_norm(
        [p.grad.full_tensor() for p in net.parameters()])]  # fmt: skip
    return {"losses": losses, "weights": weights, "names": names, "report": report,
            "norms": norms, "compressed": list(psgd.compressed())}  # fmt: skip
