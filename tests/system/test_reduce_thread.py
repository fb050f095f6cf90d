"""The communication thread of `PowerSGD`: order, failures, shutdown."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dalle.distributed import PowerSGD
from dalle.distributed.reduce_thread import ReduceThread
from dalle.errors import UsageError
from support.engines import model


def test_after_an_exchange_that_failed_no_other_is_begun():
    reducer, ran = ReduceThread(), []

    def fail():
        raise RuntimeError("the link")

    futures = [torch.futures.Future() for _ in range(3)]
    jobs = (lambda: ran.append("first"), fail, lambda: ran.append("last"))
    for job, future in zip(jobs, futures, strict=True):
        reducer.submit(job, future, torch.zeros(1))
    futures[0].wait()
    for future in futures[1:]:
        with pytest.raises(RuntimeError, match="the link"):
            future.wait()
    assert ran == ["first"]


def test_a_thread_ends_with_its_owner():
    before = set(threading.enumerate())
    reducer = ReduceThread()
    future = torch.futures.Future()
    reducer.submit(lambda: None, future, torch.zeros(1))
    future.wait()
    (thread,) = set(threading.enumerate()) - before
    del reducer
    thread.join(10)
    assert not thread.is_alive()


def test_a_thread_ends_with_its_owner_after_a_failure():
    """Neither the error it keeps nor one that the caller raised again holds the owner."""

    class Owner:
        def __init__(self):
            self.reducer = ReduceThread()

        def fail(self):
            raise UsageError("the link")

        def step(self):
            future = torch.futures.Future()
            self.reducer.submit(self.fail, future, torch.zeros(1))
            future.wait()

    before, owner = set(threading.enumerate()), Owner()
    for _ in range(3):
        with pytest.raises(UsageError, match="the link"):
            owner.step()
    (thread,) = set(threading.enumerate()) - before
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("good", [0, 1])
def test_an_error_in_the_thread_of_ddp_reaches_the_user_as_it_is(good):
    """DDP would take it for a tensor; also in a later bucket, and after a backward pass that failed
    elsewhere."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        net = DistributedDataParallel(model(), bucket_cap_mb=0.02)
        psgd = PowerSGD(rank=4)
        psgd.attach(net)

        def loss():
            return net(torch.arange(11)).square().mean()

        for _ in range(2):  # DDP cuts its buckets anew after the first
            loss().backward()
        reduce, seen = psgd.compressor.reduce_, []

        def fail(gradients, excluded):
            seen.append(gradients)
            if len(seen) > good:
                raise UsageError("the link")
            reduce(gradients, excluded)

        psgd.compressor.reduce_ = fail
        psgd._futures.append(torch.futures.Future())
        psgd._futures[0].set_result(torch.zeros(1))
        with pytest.raises(UsageError, match="^the link$"):
            loss().backward()
        assert len(seen) == good + 1 and not psgd._futures
    finally:
        dist.destroy_process_group()
