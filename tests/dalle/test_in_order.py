"""The communication thread of `PowerSGD`: order, failures, shutdown."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from dalle.distributed.in_order import InOrder
from dalle.errors import UsageError


def test_after_an_exchange_that_failed_no_other_is_begun():
    order, ran = InOrder(), []

    def fail():
        raise RuntimeError("the link")

    futures = [torch.futures.Future() for _ in range(3)]
    jobs = (lambda: ran.append("first"), fail, lambda: ran.append("last"))
    for job, future in zip(jobs, futures, strict=True):
        order.put(job, future, torch.zeros(1))
    futures[0].wait()
    for future in futures[1:]:
        with pytest.raises(RuntimeError, match="the link"):
            future.wait()
    assert ran == ["first"]


def test_a_thread_ends_with_its_owner():
    before = set(threading.enumerate())
    order = InOrder()
    future = torch.futures.Future()
    order.put(lambda: None, future, torch.zeros(1))
    future.wait()
    (thread,) = set(threading.enumerate()) - before
    del order
    thread.join(10)
    assert not thread.is_alive()


def test_a_thread_ends_with_its_owner_after_a_failure():
    """Neither the error it keeps nor one that the caller raised again holds the owner."""

    class Owner:
        def __init__(self):
            self.order = InOrder()

        def fail(self):
            raise UsageError("the link")

        def step(self):
            future = torch.futures.Future()
            self.order.put(self.fail, future, torch.zeros(1))
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
