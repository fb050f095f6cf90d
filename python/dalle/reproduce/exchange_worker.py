"""The two processes of Figure 5 and Table 1: steps of a small prior, shared over gloo.

python -m dalle.reproduce.exchange_worker FOLDER PROCESS
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

from dalle.distributed.hooks import PowerSGD
from dalle.distributed.shard import shard
from dalle.errors import DataError
from dalle.files import read_bytes, read_object, write_atomic
from dalle.prior.config import PriorConfig
from dalle.prior.model import Prior

PROCESSES = 2
BATCH, LR = 4, 1e-3  # of one process
WARM = 3  # steps before the measured one
MACHINE, CLUSTER = "one machine", "two machines"


def work(rank: int, folder: str) -> None:
    """One process: reads FOLDER/job.json and batches.safetensors; process 0 writes result.json."""
    path = Path(folder)
    job = read_object(path / "job.json", DataError)
    data = load(read_bytes(path / "batches.safetensors", 1 << 30))
    torch.set_num_threads(1)
    with joined(path / "store", rank, PROCESSES):
        found: dict[str, Any] = {
            name: timeline(job["timeline"], name, data, rank) for name in (MACHINE, CLUSTER)
        }
        found["ranks"] = [losses(job["ranks"], r, data, rank) for r in job["ranks"]["ranks"]]
        if rank == 0:
            write_atomic(path / "result.json", json.dumps(found).encode())


@contextmanager
def joined(store: Path, rank: int, size: int) -> Iterator[None]:
    """A gloo group of `size` processes that meet in a file."""
    meeting = dist.FileStore(str(store), size)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def make(config: Mapping[str, Any], machines: int, rank: int) -> tuple[Prior, PowerSGD | None]:
    """A prior over `machines`, with PowerSGD of `rank` between them where it is above 0."""
    torch.manual_seed(0)
    prior = Prior(PriorConfig(**config))
    shape = (machines, dist.get_world_size() // machines)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    shard(prior, list(prior.layers), mesh["shard"] if rank or machines == 1 else mesh)
    if not rank:
        return prior, None
    matrices = {id(p) for layer in prior.layers for p in layer.parameters()}
    psgd = PowerSGD(
        rank,
        mesh["replicate"].get_group(),
        exclude=[p for p in prior.parameters() if id(p) not in matrices],
    )
    psgd.attach(prior)
    return prior, psgd


def part_of(data: Mapping[str, Tensor], step: int, process: int) -> tuple[Tensor, Tensor]:
    """Text and tokens of a process's part of the batch of a step; the batches repeat."""
    count = len(data["text"])
    first = (step * dist.get_world_size() + process) * BATCH
    rows = (torch.arange(BATCH, dtype=torch.int64, device="cpu") + first) % count
    return data["text"][rows], data["tokens"][rows]


def timeline(
    job: Mapping[str, Any], name: str, data: Mapping[str, Tensor], process: int
) -> dict[str, Any]:
    """The events of one training step, as torch's profiler has them.

    Returns:
        "events": name, start and end in microseconds, thread, and elements of the exchange where
        there are some; with PowerSGD "report", the difference that the step made.
    """
    rank = job["rank"] if name == CLUSTER else 0
    prior, psgd = make(job["prior"], 2 if name == CLUSTER else 1, rank)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=LR)

    def step(number: int) -> None:
        text, tokens = part_of(data, number, process)
        prior(text, tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for number in range(WARM):
        step(number)
    before = {} if psgd is None else psgd.report()
    dist.barrier()
    everywhere = torch.profiler._ExperimentalConfig(profile_all_threads=True)
    with profile(
        activities=[ProfilerActivity.CPU], experimental_config=everywhere, record_shapes=True
    ) as recorded:
        step(WARM)
    events = [
        {
            "name": event.name,
            "start": float(event.time_range.start),
            "end": float(event.time_range.end),
            "thread": int(event.thread),
            "elements": elements_of(event.input_shapes),
        }
        for event in recorded.events() or []
        if event.name.startswith(("gloo:", "FSDP::", "Optimizer.step"))
    ]
    found: dict[str, Any] = {"events": events, "rank": rank}
    if psgd is not None:
        after = psgd.report()
        keys = ("bytes_sent", "bytes_uncompressed", "seconds", "waited_seconds", "exchange_seconds")
        found["report"] = {key: after[key] - before[key] for key in keys}
    return found


def elements_of(shapes: Any) -> int:
    """Of the first input of an exchange; 0 where it is not known."""
    total = 1
    for size in shapes[0] if shapes else ():
        total *= int(size)
    return total if shapes and shapes[0] else 0


def losses(
    job: Mapping[str, Any], rank: int, data: Mapping[str, Tensor], process: int
) -> dict[str, Any]:
    """A training over two machines with PowerSGD of `rank`, or without it at 0."""
    prior, psgd = make(job["prior"], PROCESSES, rank)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=LR)
    found = []
    for step in range(job["updates"]):
        text, tokens = part_of(data, step, process)
        loss = prior(text, tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        found.append(float(total) / PROCESSES)
    sent = None if psgd is None else psgd.report()
    return {"rank": rank, "losses": found, "report": sent}


def end_with_parent() -> None:
    """Ends this process where the one that started it has ended, which closes the pipe to stdin."""
    os.read(sys.stdin.fileno(), 1)  # of a thread, sys.stdin itself would hold a lock at the end
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    work(int(sys.argv[2]), sys.argv[1])
