"""What is done for NCCL's sake, as far as fakes and gloo show it. Nothing here has run on GPUs."""

from __future__ import annotations

import os
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d as c10d

import dalle_ext
from dalle import devices
from dalle.distributed import groups, heartbeat
from dalle.distributed.cluster import Cluster
from dalle.distributed.communicator import Communicator
from dalle.distributed.config import ClusterConfig
from dalle.distributed.heartbeat import Heartbeat
from dalle.distributed.world import Solo
from dalle.errors import EnvironmentProblem, NumericalError, UsageError
from dalle.train.seeds import reproducible
from dalle.train.update import update
from support.processes import free_port


class Alone(Communicator):
    """Two processes, both of which are this one; notes the dtypes that travel."""

    def __init__(self):
        super().__init__(None)
        self.ranks, self.dtypes = [0, 1], []

    def all_to_all(self, rows):
        self.dtypes.append(rows.dtype)
        return rows

    def all_gather(self, shard):
        self.dtypes.append(shard.dtype)
        return torch.cat([shard, shard])

    def broadcast(self, tensor):
        self.dtypes.append(tensor.dtype)


def test_words_travel_as_bytes():
    """As 16-bit floats the words of 14 and more would be NaN to a check of the traffic."""
    values = torch.tensor([14.0, -15.5, 8.0, 1.0])
    assert dalle_ext.pack(values[:2], "1-6-9").view(torch.bfloat16).isnan().any()
    comm, small = Alone(), values / 4
    both = torch.cat([small[:2], small[:2]]) + torch.cat([small[2:], small[2:]])
    tensors = [small.clone()]
    comm.all_reduce_codes_(tensors)
    assert torch.equal(tensors[0], both)
    words = [dalle_ext.pack(values, "1-6-9"), dalle_ext.pack(values[:1], "1-6-9")]
    kept = [word.clone() for word in words]
    comm.broadcast_(words)
    assert all(map(torch.equal, words, kept))
    assert set(comm.dtypes) == {torch.uint8} and len(comm.dtypes) == 3


def joined_by(rank, size, gpus, store, monkeypatch):
    """What a process of `size` on one machine of `gpus` GPUs gives to `init_process_group`."""
    made = {}

    def init(backend, **options):
        made.update(options, backend=backend)
        raise RuntimeError("far enough")

    monkeypatch.setattr(dist, "init_process_group", init)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, rank, size)]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.update(current=device))
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", size)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(size))
    try:
        Cluster(ClusterConfig(timeout=20.0), torch.device("cuda"))
    except EnvironmentProblem as problem:
        assert "far enough" in str(problem)
    return made


def test_nccl_is_bound_to_the_gpu_of_the_local_rank(monkeypatch):
    store = dist.HashStore()
    store.set("dalle/gpu/1", "ok")
    for rank in range(2):
        made = joined_by(rank, 2, 2, store, monkeypatch)
        assert made["device_id"] == made["current"] == torch.device("cuda", rank)
        assert (made["rank"], made["world_size"], made["store"]) == (rank, 2, store)


def test_all_end_with_the_first_line_where_a_machine_has_too_few_gpus(monkeypatch):
    store = dist.HashStore()
    line = "cluster: processes of a machine must be at most its 1 GPUs, got 2 (on process 1)"
    store.set("dalle/gpu/1", line)
    store.add("dalle/gpus/read", 1)
    for rank in range(2):
        with pytest.raises(UsageError) as caught:
            joined_by(rank, 2, 1, store, monkeypatch)
        assert str(caught.value) == line


def test_a_group_of_some_processes_is_not_split_from_all(monkeypatch):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        default, seen = c10d._get_default_group(), []
        real = c10d._new_process_group_helper
        default.bound_device_id = torch.device("cpu", 0)

        def watched(*args, **options):
            seen.append(default.bound_device_id)
            return real(*args, **options)

        monkeypatch.setattr(c10d, "_new_process_group_helper", watched)
        groups.duplicate_group(None, owner := threading.Event())
        assert seen == [None] and default.bound_device_id == torch.device("cpu", 0) and owner
    finally:
        dist.destroy_process_group()


def test_cublas_is_told_before_its_first_use(monkeypatch):
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.delenv(name, raising=False)
    devices.pick_device("cpu")
    assert name not in os.environ
    devices.pick_device("cpu", deterministic=True)
    assert os.environ[name] == ":4096:8"
    monkeypatch.setenv(name, ":16:8")  # the user's own
    devices.prepare_cublas()
    assert os.environ[name] == ":16:8"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    devices.prepare_cublas()
    monkeypatch.delenv(name)
    with pytest.raises(EnvironmentProblem, match=f"{name} must be set to :4096:8 before"):
        with reproducible(0, deterministic=True):
            pass


class NoDevice:
    """A scalar on a device that nobody may read."""

    def __init__(self, order):
        self.order = order

    def detach(self):
        self.order.append("detach")
        return self

    def backward(self):
        self.order.append("backward")


def test_the_backward_pass_is_queued_before_the_host_reads_the_loss():
    order = []

    class Watched(Solo):
        def raise_postponed(self):
            order.append("postponed")

        @contextmanager
        def device_exchange(self):
            order.append("begin")
            yield
            order.append("end")

        def mean_loss(self, loss):
            order.append("read")
            return torch.tensor(float("nan"))

    task = SimpleNamespace(
        name="task", world=Watched(), model=nn.Linear(1, 1), optimizer=None, average=None
    )
    task.optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    with pytest.raises(NumericalError):
        update(task, NoDevice(order), 3, lr=0.1)
    assert order[:6] == ["postponed", "begin", "backward", "end", "detach", "read"]


@pytest.fixture
def beating(monkeypatch):
    """Heartbeats of two processes in this one, of a store of their own, ten times as fast."""
    monkeypatch.setattr(heartbeat, "BEAT", 0.02)
    monkeypatch.setattr(heartbeat, "GRACE", 0.4)
    port = free_port()
    server = dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    made = [Heartbeat(rank, 2, timedelta(seconds=1.0), "run") for rank in range(2)]
    yield made
    for one in made:
        one.stop()
    del server


def lost_by(one, seconds):
    """What `watch` calls within so many seconds of waiting for the device; "" for nothing."""
    said = queue.SimpleQueue()
    one.watch(said.put)
    with one.waiting():
        try:
            return said.get(timeout=seconds)
        except queue.Empty:
            return ""


def test_a_process_that_waits_for_the_device_notices_who_is_gone(beating):
    first, second = beating
    for _ in range(3):  # the other lives; and the time-out counts from where waiting begins
        assert lost_by(first, 0.35) == ""
    second.stop()  # as if it were killed: no signs any more
    first._timeout = 60.0  # so that a slow machine does not come to the time-out first
    begin = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(lost_by, first, 20.0)
        assert found.result() == "closed"
    assert time.monotonic() - begin < 15
    assert first.dead_ranks() == [1]


def test_a_process_that_hangs_is_named_after_the_time_out(beating):
    first, second = beating
    assert lost_by(first, 5.0) == "timed out"  # the other's heart goes on beating
    assert first.dead_ranks() == [1]  # whose exchange did not fail
    assert lost_by(second, 5.0) == "closed"  # that it is dead has been said


def test_the_line_and_the_end(monkeypatch, capsys):
    cluster = object.__new__(Cluster)
    cluster.rank, cluster.size, cluster._step = 0, 4, lambda: 7
    cluster.heartbeat = SimpleNamespace(dead_ranks=lambda: [2])
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    cluster._end("timed out")
    assert ended == [EnvironmentProblem.exit_code]
    assert capsys.readouterr().err == (
        "cluster: every process must answer, got none from process 2 of 4: exchange timed out in "
        "step 7 on process 0; the same command goes on from the last checkpoint\n"
    )
