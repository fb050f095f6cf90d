"""`PowerSGD` where shards of a matrix differ in size: all of them are compressed, or none."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dalle.distributed.powersgd import Gradient
from dalle.distributed.shard import min_shard_shape
from dalle.dtensor import local_part
from support.machines import copies

ROWS = (64, 33, 30, 17, 10, 5, 3)  # over four: 33 is 9, 9, 9, 6; 10 is 3, 3, 3, 1; 5 is 2, 2, 1, 0
WORLD = 4


def on_each_process(body):
    """What `body` returns as each of four processes, whose collectives do nothing."""
    found = []
    for rank in range(WORLD):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
        try:
            found.append(body(init_device_mesh("cpu", (WORLD,), mesh_dim_names=("shard",))))
        finally:
            dist.destroy_process_group()
    return found


def layers(mesh, rows=ROWS):
    net = nn.Sequential(*[nn.Linear(64, n, bias=False) for n in rows])
    fully_shard(net, mesh=mesh)
    return net


def test_the_smallest_shard_is_the_same_on_all_processes():
    def body(mesh):
        return [(min_shard_shape(p), local_part(p).shape) for p in layers(mesh).parameters()]

    every = on_each_process(body)
    for at in range(len(ROWS)):
        own = [tuple(found[at][1]) for found in every]
        assert {tuple(found[at][0]) for found in every} == {min(own)}
    assert min_shard_shape(torch.zeros(5, 3)) == (5, 3)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_state_is_levelled_over_the_same_matrices_on_all_shards(rank, monkeypatch):
    """Where only some shards were compressed, their collectives did not meet: it hung."""

    def body(mesh):
        net, levelled = layers(mesh), []
        psgd = copies(2, rank=rank, min_compression=1.0)
        psgd._register(net)
        given = [psgd._gradient(p, torch.ones_like(local_part(p))) for p in net.parameters()]
        psgd.compressor.reduce_(given, psgd._excluded)
        with monkeypatch.context() as patch:
            patch.setattr(dist, "all_reduce", lambda t, **_: levelled.append(tuple(t.shape)))
            names = list(psgd.state_dict()["errors"])
        own = [n for n, p in net.named_parameters() if psgd.compressor.to_compress(
            [Gradient(n, local_part(p))], set())]  # fmt: skip
        assert psgd.compressed() == (len(names), len(ROWS))
        return names, levelled, own

    every = on_each_process(body)
    names = every[0][0]
    assert "0.weight" in names and "6.weight" not in names
    assert all(found[:2] == (names, [(len(names),)]) for found in every)
    assert any(found[2] != names for found in every)  # by their own sizes they would not agree
