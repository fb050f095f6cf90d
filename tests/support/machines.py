"""Machines simulated in one process: a `Communicator` without a network."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

import dalle_ext
from dalle.distributed import PowerSGD
from dalle.distributed.communicator import Communicator
from dalle.errors import UsageError


class Copies(Communicator):
    """Any number of machines that have the same gradients; one of them is computed."""

    def __init__(self, world):
        super().__init__(None)
        self.ranks = list(range(world))

    def gather(self, value):
        return [value] * self.world_size

    def require_same(self, values):
        pass

    def all_reduce(self, tensor):
        tensor.mul_(self.world_size)

    def all_to_all(self, rows):
        self.rows = rows.view(torch.int16).flatten()
        return rows[:1].repeat(self.world_size, 1)

    def all_gather(self, shard):
        every = self.rows.expand(self.world_size, -1).contiguous()
        return dalle_ext.sum_codes(every, "1-6-9").codes.view(torch.bfloat16)

    def broadcast(self, tensor):
        pass


class Machine(Communicator):
    """One of several threads, each of which is a machine of its own."""

    def __init__(self, rank, slots, barrier):
        super().__init__(None)
        self.ranks, self.rank = list(range(len(slots))), rank
        self.slots, self.barrier = slots, barrier

    def gather(self, value):
        self.slots[self.rank] = value
        self.barrier.wait()
        every = list(self.slots)
        self.barrier.wait()
        return every

    def require_same(self, values):
        every = self.gather(values)
        if any(other != every[0] for other in every):
            raise UsageError("machines differ")

    def all_reduce(self, tensor):
        tensor.copy_(torch.stack(self.gather(tensor.clone())).sum(0))

    def all_to_all(self, rows):
        return torch.stack([other[self.rank] for other in self.gather(rows)])

    def all_gather(self, shard):
        return torch.cat(self.gather(shard))

    def broadcast(self, tensor):
        tensor.copy_(self.gather(tensor.clone())[0])


def copies(world, **options):
    """A `PowerSGD` among so many alike."""
    psgd = PowerSGD(**options)
    psgd.compressor.comm = Copies(world)
    psgd.compressor.stats.traffic = psgd.compressor.comm.traffic
    return psgd


def machines(world, body, **options):
    """What `body(rank, psgd)` returns on each of `world` machines."""
    slots, barrier = [None] * world, threading.Barrier(world, timeout=60)

    def run(rank):
        psgd = PowerSGD(**options)
        psgd.compressor.comm = Machine(rank, slots, barrier)
        psgd.compressor.stats.traffic = psgd.compressor.comm.traffic
        try:
            return body(rank, psgd)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))
