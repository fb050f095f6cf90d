"""What each process of `test_distributed` does."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import own_model_ddp
from dalle.distributed import PowerSGD
from dalle.distributed.powersgd import Gradient
from dalle.errors import UsageError
from dalle.precision import ResblockScaler
from support.engines import batch, fsdp, model

STEPS, WIRE = 12, ("fp32", "1-6-9")


def gradients(rank, count, rows=24, columns=40, inner=None, seed=0):
    """Of one process: `count` matrices, of rank `inner` where it is given, and a bias."""
    draw = torch.Generator().manual_seed(100 * seed + rank)
    shared = torch.Generator().manual_seed(100 * seed + 77)  # one row space, or the sum has more
    found = []
    for _ in range(count):
        if inner is None:
            found.append(torch.randn(rows, columns, generator=draw))
        else:  # small integers, which the error buffer holds as they are
            left = torch.randint(-2, 3, (rows, inner), generator=draw).float()
            found.append(left @ torch.randint(-2, 3, (inner, columns), generator=shared).float())
    return found, torch.randn(7, generator=draw)


def named(matrices, bias):
    return [Gradient(f"m{i}", m.clone()) for i, m in enumerate(matrices)] + [
        Gradient("bias", bias.clone())
    ]


def reduce_once(rank, options, count, inner, rows=24, columns=40):
    matrices, bias = gradients(rank, count, rows, columns, inner)
    psgd = PowerSGD(**options)
    given = named(matrices, bias)
    psgd.compressor.reduce_(given, set())
    return {g.name: g.grad for g in given} | {"norm": psgd.gradient_norm()}


def mean_of(world, count, inner, rows=24, columns=40):
    every = [gradients(rank, count, rows, columns, inner) for rank in range(world)]
    means = [sum(e[0][i] for e in every) / world for i in range(count)]
    return means, sum(e[1] for e in every) / world


def feedback(rank, wire, steps):
    psgd = PowerSGD(rank=4, wire=wire)
    handed = [torch.zeros(24, 40) for _ in range(2)]
    given = [torch.zeros(24, 40) for _ in range(2)]
    for step in range(steps):
        matrices, bias = gradients(rank, 2, seed=step)
        reduced = named(matrices, bias)
        psgd.compressor.reduce_(reduced, set())
        for i in range(2):
            given[i] += matrices[i]
            handed[i] += reduced[i].grad
    kept = [psgd.compressor.matrices[f"m{i}"].value() for i in range(2)]
    return {"given": given, "handed": handed, "kept": kept}


def one_infinity(rank):
    psgd = PowerSGD(rank=4)
    before, found = [], []
    for step in range(3):
        matrices, bias = gradients(rank, 2, seed=step)
        if step == 1 and rank == 1:
            matrices[0][3, 5] = float("inf")
        reduced = named(matrices, bias)
        psgd.compressor.reduce_(reduced, set())
        before.append(psgd.compressor.matrices["m0"].value())
        found.append([*(g.grad for g in reduced), psgd.gradient_norm()])
    kept = psgd.compressor.matrices["m0"].value()
    return {"found": found, "errors": before, "kept": kept}


def scaled(rank):
    """Gradients as two blocks scale them, and plain ones; the report."""
    scaler = ResblockScaler({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    scaler.scales[:2] = torch.tensor([8.0, 1024.0])
    matrices, _ = gradients(rank, 2)
    plain = PowerSGD(rank=4)
    reduced = [Gradient(f"m{i}", m.clone()) for i, m in enumerate(matrices)]
    plain.compressor.reduce_(reduced, set())
    psgd = PowerSGD(rank=4, scaler=scaler)
    halves = [Gradient(f"m{i}", m * scaler.scales[i], i) for i, m in enumerate(matrices)]
    psgd.compressor.reduce_(halves, set())
    blown = [Gradient(f"m{i}", m * scaler.scales[i], i) for i, m in enumerate(matrices)]
    blown[1].grad[0, 0] = math.inf
    psgd.compressor.reduce_(blown, set())
    report = {k: v for k, v in plain.report().items() if k != "advice"}
    return {
        "plain": [g.grad for g in reduced], "scaled": [g.grad for g in halves],
        "blown": [g.grad for g in blown], "scales": scaler.scales, "report": report,
        "advice": plain.report()["advice"],
    }  # fmt: skip


def example(rank, steps):
    """`examples/own_model_ddp.py`."""
    return own_model_ddp.main(steps, backend="eager")


def others(rank, options):
    """Options that process 1 has otherwise."""
    matrices, bias = gradients(rank, 1)
    psgd = PowerSGD(rank=2, **options[rank])
    try:
        psgd.compressor.reduce_(named(matrices, bias), set())
    except UsageError as error:
        return str(error)
    return ""


def saved(rank):
    """State after a step; and buffers made of it by as many processes, and by one."""
    psgd, again = PowerSGD(rank=4), PowerSGD(rank=4)
    psgd.compressor.reduce_(named(*gradients(rank, 2)), set())
    sums = psgd.compressor.matrices["m0"].value()
    dist.all_reduce(sums)
    state = psgd.state_dict()
    again.load_state_dict(state)
    results = []
    for one in (psgd, again):
        given = named(*gradients(rank, 2, seed=1))
        one.compressor.reduce_(given, set())
        results.append([g.grad for g in given])
    halved = PowerSGD(rank=4)
    halved.load_state_dict(state | {"machines": 1})  # a checkpoint of one machine, on two
    return {"sums": sums, "state": state, "results": results,
            "halved": halved.compressor._loaded["m0"][0]}  # fmt: skip


PLAIN = {"rank": 4}


def uneven(rank):
    """Under `DDP.join` the first process has two batches and the second four: whose weights."""
    net = DistributedDataParallel(model())
    PowerSGD(rank=2, min_compression=1.0).attach(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with net.join():
        for step in range(2 + 2 * rank):
            optimizer.zero_grad()
            tokens, expected = batch(rank, step)
            nn.functional.cross_entropy(net(tokens), expected).backward()
            optimizer.step()
    return [p.detach() for p in net.parameters()]


def too_large(rank):
    """A rank that the whole matrices allow, but not the processes' parts."""
    try:
        fsdp(rank, {"rank": 12, "min_compression": 2.0}, 1)
    except UsageError as error:
        return str(error)
    return ""
