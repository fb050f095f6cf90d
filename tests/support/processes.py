"""Test bodies run in several processes, which `torch.distributed` joins over gloo."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def join_environment(rank, world, port):
    """What `torchrun` sets."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}


def child_environment(**more):
    """Of a Python that imports `support` too."""
    path = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in path if p), **more}


def process(rank, world, port, calls, folder, joined):
    join_environment(rank, world, port)
    torch.set_num_threads(1)
    if joined:
        dist.init_process_group("gloo")
    try:
        found = {name: body(rank, *arguments) for name, (body, *arguments) in calls.items()}
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(world, calls, folder, joined=True):
    """By name, what `body(rank, *arguments)` returned in each of `world` processes.

    All calls in the same processes, as most of the time goes into starting them. They have what
    `torchrun` would set; with `joined`, a group too.
    """
    arguments = (world, free_port(), calls, str(folder), joined)
    mp.spawn(process, arguments, nprocs=world)
    every = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
    return {name: [found[name] for found in every] for name in calls}
