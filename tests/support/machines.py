"""Machines simulated in one process: `dalle.distributed.wire.Exchange` without a network."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

import dalle_ext
from dalle.distributed import PowerSGD
from dalle.distributed.wire import Exchange
from dalle.errors import UsageError


class Copies(Exchange):
    """Any number of machines that have the same gradients; one of them is computed."""

    def __init__(self, world):
        super().__init__(None)
        self.ranks = list(range(world))

    def gather(self, value):
        return [value] * self.world

    def require_same(self, own):
        pass

    def all_reduce(self, flat):
        flat.mul_(self.world)

    def all_to_all(self, parts):
        self.parts = parts.view(torch.int16).flatten()
        return parts[:1].repeat(self.world, 1)

    def all_gather(self, part):
        every = self.parts.expand(self.world, -1).contiguous()
        return dalle_ext.sum_codes(every, "1-6-9").codes.view(torch.bfloat16)

    def broadcast(self, flat):
        pass


class Machine(Exchange):
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

    def require_same(self, own):
        every = self.gather(own)
        if any(other != every[0] for other in every):
            raise UsageError("machines differ")

    def all_reduce(self, flat):
        flat.copy_(torch.stack(self.gather(flat.clone())).sum(0))

    def all_to_all(self, parts):
        return torch.stack([other[self.rank] for other in self.gather(parts)])

    def all_gather(self, part):
        return torch.cat(self.gather(part))

    def broadcast(self, flat):
        flat.copy_(self.gather(flat.clone())[0])


def copies(world, **options):
    """A `PowerSGD` among so many alike."""
    psgd = PowerSGD(**options)
    psgd.compressor.exchange = Copies(world)
    psgd.compressor.account.traffic = psgd.compressor.exchange.traffic
    return psgd


def machines(world, body, **options):
    """What `body(rank, psgd)` returns on each of `world` machines."""
    slots, barrier = [None] * world, threading.Barrier(world, timeout=60)

    def run(rank):
        psgd = PowerSGD(**options)
        psgd.compressor.exchange = Machine(rank, slots, barrier)
        psgd.compressor.account.traffic = psgd.compressor.exchange.traffic
        try:
            return body(rank, psgd)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))
