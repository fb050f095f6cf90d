"""Groups, norms and drift of `PowerSGD`: bodies of `test_distributed` for four processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from dalle.distributed.replicas import find_drift
from dalle.errors import UsageError
from dalle.precision import ResblockScaler
from support.engines import PowerSGD, model


class Net(nn.Module):
    """Linear layers of which the last may be left out."""

    def __init__(self, width=64, count=3):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, x, last=True):
        for layer in self.layers[: None if last else -1]:
            x = layer(x)
        return x


def pairs(rank):
    """Two models, each on a pair of processes, at the same time."""
    both = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    net = nn.Linear(64, 64)
    ddp = DDP(net, process_group=both[rank // 2])
    PowerSGD(rank=32, wire="fp32", min_compression=1.0).attach(ddp)
    ddp(torch.full((8, 64), float(rank // 2))).sum().backward()
    other = DDP(Net(), process_group=both[rank // 2], find_unused_parameters=True)
    PowerSGD(rank=4).attach(other)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for step in range(6):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(10 * step + rank))
        other(x, last=rank % 2 == 0 or step % 2 == 0).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"grad": net.weight.grad, "weights": [p.detach() for p in other.parameters()]}


def said_by(call):
    try:
        call()
    except UsageError as error:
        return str(error)
    return "nothing"


def sharded(mesh, layers=True, **options):
    net = Net(count=2)
    for layer in net.layers if layers else ():
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def refused(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    between, every = mesh["replicate"].get_group(), dist.group.WORLD
    small = {"rank": 4, "min_compression": 1.0}
    found = {
        "one axis": said_by(
            lambda: PowerSGD(**small).attach(sharded(init_device_mesh("cpu", (4,))))
        ),
        "all": said_by(lambda: PowerSGD(group=every, **small).attach(sharded(mesh["shard"]))),
        "both axes": said_by(lambda: PowerSGD(group=between, **small).attach(sharded(mesh))),
        "ddp": said_by(lambda: PowerSGD(group=between, **small).attach(DDP(Net()))),
    }
    net = sharded(mesh["shard"], layers=False)  # one unit, of which a part gets no gradient
    PowerSGD(group=between, **small).attach(net)
    loss = net(torch.randn(4, 64), last=False).square().mean()
    found["unused"] = said_by(loss.backward)
    net = sharded(mesh["shard"])
    PowerSGD(group=between, **small).attach(net)
    backward(net, rank, 0)
    loss = net(torch.randn(4, 64), last=rank < 2).square().mean()  # on one machine only
    return found | {"unit": said_by(loss.backward)}


def whole_norm(net, scale=1.0):
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    grads = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
    return float(nn.utils.get_total_norm([g.double() for g in grads])) / scale


def backward(net, rank, step, scale=1.0):
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(10 * step + rank))
    (net(x) - x).square().mean().mul(scale).backward()


def norms(rank):
    """By case: what `gradient_norm` says and what it is, step by step."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    found = {}

    def check(name, net, psgd, steps=3, micro=1, scaler=None):
        for step in range(steps):
            net.zero_grad()
            for part in range(micro):
                scale = 1.0 if scaler is None else scaler.get_scale()
                backward(net, rank, 10 * step + part, scale)
            pair = (float(psgd.gradient_norm()), whole_norm(net, scale))
            found.setdefault(name, []).append(pair)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    for name, options in (("buckets", {}), ("loss scale", {"scaler": scaler})):
        net = DDP(Net(count=4), bucket_cap_mb=0.02)
        psgd = PowerSGD(rank=4, **options)
        psgd.attach(net)
        check(name, net, psgd, scaler=options.get("scaler"))
    found["loss scale"].append((float(psgd.gradient_norm()), whole_norm(net, 1024.0)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler.unscale_(optimizer)
    found["loss scale"].append((float(psgd.gradient_norm()), whole_norm(net)))

    half = MixedPrecisionPolicy(reduce_dtype=torch.float16)
    for name, options, micro in (
        ("fp16", {"mp_policy": half}, 1), ("micro-batches", {}, 3), ("unfrozen", {}, 1)
    ):  # fmt: skip
        net = sharded(mesh["shard"], **options)
        net.layers[0].weight.requires_grad_(name != "unfrozen")
        psgd = PowerSGD(rank=2, min_compression=1.0)  # its group is found beside the mesh
        psgd.attach(net)
        check(name, net, psgd, micro=micro)
        net.layers[0].weight.requires_grad_(True)
        check(name, net, psgd, micro=micro)

    net = Net()
    fully_shard(net.layers[1], mesh=mesh["shard"])  # the others are whole on all processes
    scaler = ResblockScaler({"1": net.layers[1]}, initial=1024.0)
    net(torch.ones(8, 64)).square().mean().backward()
    net.layers[1].weight.grad *= 1024.0
    net.layers[1].bias.grad *= 1024.0
    wanted = whole_norm(net)
    first, last = list(net.parameters()), list(net.parameters())[2:] + list(net.parameters())[:2]
    for params in (first, last):
        step = scaler.step(torch.optim.SGD(params, lr=0.0), clip_norm=None)
        unscaled = whole_norm(net)
        found.setdefault("partly sharded", []).append((float(step.norm), unscaled))
        net.layers[1].weight.grad *= 1024.0
        net.layers[1].bias.grad *= 1024.0
    assert wanted > unscaled
    return found


def drift(rank):
    """Two machines of two processes; then a weight of one is another one's no more."""

    def gather(value):
        every = [None] * 4
        dist.all_gather_object(every, value)
        return every

    net = model()
    equal = find_drift(net, gather, shards=2)
    if rank == 2:
        net[1].weight.data[3, 4] *= 1 + 2.0**-20
    return {"equal": equal, "apart": find_drift(net, gather, shards=2)}
