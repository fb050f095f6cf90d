"""One process of `bench_cluster`: trains a prior in one way and writes what a step cost.

    torchrun ... cluster_worker.py MODE --steps N --out FILE [--width D --layers L]
                 [--words W --tables T]

MODE: hsdp:fp32, hsdp:fp16 (native, uncompressed), psgd:RANK:WIRE[:nofeedback] (this library's),
ddp:fp32, ddp:RANK (torch's `powerSGD_hook` of that rank), ddp:psgd:RANK:WIRE (this library's).
Process 0 writes FILE as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torchs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dalle.distributed import PowerSGD
from dalle.distributed.buffers import Factors
from dalle.prior.model import Prior

BATCH, LR, WARMUP = 2, 1e-3, 30


def make(width: int, layers: int, words: int) -> Prior:
    torch.manual_seed(0)
    sizes = {"d_model": width, "num_heads": 8, "num_layers": layers, "text_len": 9, "grid": (4, 6)}
    return Prior.from_preset("tiny", **sizes, text_vocab=words, image_vocab=words, init_gain=0.5)


def batch(step: int, process: int, words: int, tables: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Words at random. The first is a picture's first token, the second says by which table each
    next one follows from the one before, but for some noise."""
    draw = torch.Generator().manual_seed(1009 * step + process)
    fixed = torch.Generator().manual_seed(1)
    follows = torch.randint(0, words, (words, tables), generator=fixed)
    if tables == 1:
        follows = torch.randperm(words, generator=fixed.manual_seed(1))[:, None]
    text = torch.randint(0, words, (BATCH, 8), generator=draw)
    tokens = [text[:, 0]]
    for _ in range(1, 24):
        noise = torch.randint(0, words, (BATCH,), generator=draw)
        wanted = follows[tokens[-1], text[:, 1] % tables]
        tokens.append(torch.where(torch.rand(BATCH, generator=draw) < 0.05, noise, wanted))
    return text, torch.stack(tokens, 1)


def wrap(model: Prior, mode: str) -> tuple[Any, PowerSGD | None]:
    """The model as the mode trains it."""
    kind, *more = mode.split(":")
    heads = [*model.text_head.parameters(), *model.image_head.parameters()]
    if kind == "ddp":
        if more[0] == "psgd":
            parallel = DistributedDataParallel(model)
            ours = PowerSGD(int(more[1]), wire=more[2], exclude=heads)
            ours.attach(parallel)
            return parallel, ours
        parallel = DistributedDataParallel(model, bucket_cap_mb=1000)  # torch's hook needs one
        if more[0] != "fp32":
            state = torchs.PowerSGDState(
                None, matrix_approximation_rank=int(more[0]), start_powerSGD_iter=2)  # fmt: skip
            parallel.register_comm_hook(state, torchs.powerSGD_hook)
        return parallel, None
    machines = 2
    shape = (machines, dist.get_world_size() // machines)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float16 if more[0] == "fp16" else None)
    over = mesh if kind == "hsdp" else mesh["shard"]
    for part in (*model.layers, model):
        fully_shard(part, mesh=over, mp_policy=policy)
    if kind == "hsdp":
        return model, None
    psgd = PowerSGD(
        int(more[0]), mesh["replicate"].get_group(), wire=more[1], error_feedback=len(more) < 3,
        exclude=heads)  # fmt: skip
    psgd.attach(model)
    return model, psgd


def reconstruction_error(psgd: PowerSGD, step: Callable[[], object]) -> float:
    """Of what this process's error buffers hold in one more `step`, the part that the factors
    cannot express: a ratio of norms, 0 to 1. To be called on all processes."""
    buffers: Any = psgd.compressor.buffers
    whole: list[float] = []
    inside: list[float] = []
    project = buffers.project

    def measured(factors: Factors, fast: bool) -> None:
        project(factors, fast)  # Q = E^T P of this process; P's columns are orthonormal
        whole.extend(float(m.value().square().sum()) for m in factors.matrices)
        pairs = zip(factors.qs, factors.units, strict=True)
        inside.extend(float((q * unit).square().sum()) for q, unit in pairs)

    buffers.project = measured
    try:
        step()
    finally:
        del buffers.project  # the class has its own
    return math.sqrt(max(0.0, 1 - sum(inside) / sum(whole)))


def sent_bytes() -> int:
    """Bytes out of this machine's interface so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.strip().partition(":")
        if name == "eth0":
            return int(counts.split()[8])
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("mode")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--words", type=int, default=32)
    parser.add_argument("--tables", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    process = dist.get_rank()
    plain = make(given.width, given.layers, given.words)
    count = sum(p.numel() for p in plain.parameters())
    model, psgd = wrap(plain, given.mode)
    optimizer = torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.98), fused=True)
    seconds, losses, bytes_before = [], [], sent_bytes()

    def train(step: int) -> torch.Tensor:
        text, image = batch(step, process, given.words, given.tables)
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / WARMUP)
        dist.barrier()
        begin = time.perf_counter()
        loss = model(text, image).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        seconds.append(time.perf_counter() - begin)
        return loss

    for step in range(given.steps + 3):
        if step == 3:  # torch's hook begins to compress in its third step
            bytes_before = sent_bytes()
        shared = train(step).detach().clone()
        dist.all_reduce(shared)
        losses.append(shared.item() / dist.get_world_size())
    found = {"mode": given.mode, "parameters": count, "seconds": seconds[3:], "losses": losses}
    found["bytes_a_step"] = (sent_bytes() - bytes_before) / given.steps
    if psgd is not None:
        found["report"] = psgd.report()
        more = given.steps + 3
        found["reconstruction_error"] = reconstruction_error(psgd, lambda: train(more))
    if process == 0:
        given.out.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
