"""What each process of `test_cluster` does."""

from __future__ import annotations

import errno
import json
import os
import zlib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dalle.commands.dvae import METHODS
from dalle.distributed.cluster import Cluster
from dalle.distributed.config import ClusterConfig
from dalle.distributed.parallelize import parallelize
from dalle.distributed.world import Solo
from dalle.dtensor import gather, local_part
from dalle.dvae.model import DiscreteVAE
from dalle.dvae.straight_through import get_codebook, takes_nearest
from dalle.errors import CheckpointError, DalleError
from dalle.precision import scaler
from dalle.train import loop, update
from dalle.train.checkpoint import load_checkpoint, save_checkpoint
from dalle.train.config import LoopConfig
from dalle.train.dvae import DvaeTask
from dalle.train.loop import train
from dalle.train.manifest import checkpoints
from support.dvae import PATCH, WARM, some_pairs
from support.prior import SMALL, make_parts, make_task
from support.tiny_task import state_hash

STEPS = 6
RECIPE = replace(SMALL, batch_size=11, caption_dropout=0.3, token_dropout=0.2, bpe_dropout=0.2)
VARIANTS = {
    "plain": (replace(SMALL, batch_size=11), {}),  # parts of different sizes
    "crops and dropouts": (replace(RECIPE, augment="paper"), {}),
    "recomputed": (RECIPE, {"checkpointing": True}),
    "not recomputed": (RECIPE, {}),
    "padded text": (RECIPE, {"text_targets": "padded"}),
    "codebook": (replace(SMALL, image_init="codebook"), {}),
    "in three micro-batches": (replace(RECIPE, batch_size=4, accumulate=3), {}),
}
WHOLE = "whole", replace(RECIPE, batch_size=12), {}  # to compare with "in three micro-batches"
HALF = ("fp16-scaled", replace(SMALL, decay="none"), {"precision": "fp16-scaled", "d_model": 64})
PLATEAU = {"decay": "plateau", "plateau_window": 1, "plateau_patience": 1, "plateau_min_delta": 1.0}
_joined: list[Cluster] = []


def cluster_of(machines=1, rank=0):
    """The one cluster of this process; a world of one in the tests' own process."""
    if "RANK" not in os.environ:
        return Solo()
    if not _joined:
        config = ClusterConfig(machines=machines, powersgd_rank=rank, timeout=60.0)
        _joined.append(Cluster(config, torch.device("cpu")))
    return _joined[0]


def said_of(call):
    """The line of the error that a call ends in."""
    try:
        call()
    except DalleError as problem:
        return str(problem)
    return "nothing"


def losses(_rank, name, machines=1, psgd=0):
    config, sizes = {**VARIANTS, WHOLE[0]: WHOLE[1:], HALF[0]: HALF[1:]}[name]
    task = make_task(make_parts(), config, world=cluster_of(machines, psgd), **sizes)
    values = [task.train_step(step) for step in range(STEPS)]
    return {key: [float(v[key]) for v in values] for key in ("loss", "text_loss", "grad_norm")}


def dvae_task(world=None, config=WARM):
    torch.manual_seed(0)
    vae, pairs = DiscreteVAE(PATCH), some_pairs()
    world = world or Solo()
    parallelize(vae, world, vae.resblocks(), owner="dvae train", forwards=METHODS)
    return DvaeTask(vae, pairs, config, world=world)


def dvae_losses(_rank):
    task = dvae_task(cluster_of())
    values = [task.train_step(step) for step in range(10)]
    codebook = gather(task.model.decoder.blocks.input.w)
    other = dvae_task(cluster_of(), replace(WARM, quantizer="straight-through"))
    others = [other.train_step(step) for step in range(16)]
    vectors = get_codebook(other.model)
    average = gather(other.average.average["decoder.blocks.input.w"])[:, :, 0, 0].t()
    return {"loss": [float(v["loss"]) for v in values], "counts": task.counts,
            "codebook": codebook, "vector_loss": [float(v["loss"]) for v in others],
            "vectors": vectors, "averaged": average, "nearest": takes_nearest(other.model),
            "codebook_counts": other.codebook.counts}  # fmt: skip


def small_task(cluster):
    return make_task(make_parts(), RECIPE, world=cluster, d_model=64, precision="fp16-scaled")


def saved(_rank, folder, machines=1, psgd=0):
    """Losses after a checkpoint, of who saved and went on and of who loaded."""
    cluster = cluster_of(machines, psgd)
    first = small_task(cluster)
    for step in range(4):
        first.train_step(step)
    path = save_checkpoint(first, Path(folder), 4)
    kept = [float(first.train_step(step)["loss"]) for step in range(4, 8)]
    second = small_task(cluster)
    assert load_checkpoint(second, path) == 4
    again = [float(second.train_step(step)["loss"]) for step in range(4, 8)]
    return {"kept": kept, "again": again, "hashes": [state_hash(first), state_hash(second)],
            "error": len(cluster.psgd.compressor.matrices) if cluster.psgd else 0}  # fmt: skip


def resumed(_rank, folder):
    task = small_task(cluster_of())
    step = load_checkpoint(task, checkpoints(Path(folder))[-1])
    return [float(task.train_step(i)["loss"]) for i in range(step, step + 4)]


def damaged(rank, folder):
    """What is said, on this process, of one changed byte in each file of a checkpoint."""
    task, cluster = small_task(cluster_of()), cluster_of()
    path = save_checkpoint(task, Path(folder), 3)
    said = []
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        whole = file.read_bytes()
        cluster.any(False)  # all have read it
        if rank == 0:
            middle = len(whole) // 2
            file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        cluster.any(False)
        try:
            load_checkpoint(task, path)
            said.append("nothing")
        except CheckpointError as problem:
            said.append(str(problem).replace(str(path), "PATH"))
        cluster.any(False)
        if rank == 0:
            file.write_bytes(whole)
    return said


def full_disk(rank, folder):
    """One process cannot write: at each fsync of its own in turn."""
    task, cluster, said, real = small_task(cluster_of()), cluster_of(), [], os.fsync
    save_checkpoint(task, Path(folder), 1)
    calls = 0
    while True:
        left = calls

        def full(handle):
            nonlocal left
            if rank == 1 and left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left -= 1
            return real(handle)

        os.fsync = full
        try:
            save_checkpoint(task, Path(folder), 2)
            said.append("saved")
            break
        except CheckpointError as problem:
            said.append(str(problem))
        finally:
            os.fsync = real
        cluster.any(False)  # process 0 has cleaned up
        listed = sorted(p.name for p in Path(folder).iterdir())
        assert listed == ["step-00000001"], listed
        calls += 1
    return said


def bad_loss(_rank):
    """A loss that is not a number on one process stops all with one line."""
    cluster = cluster_of()
    task = make_task(make_parts(), replace(SMALL, lr=1e-2), world=cluster)
    if cluster.rank == 1:
        batch = task.batch
        task.batch = lambda step: batch(step)._replace(keep=torch.full((4, 16), float("nan")))
    return said_of(lambda: task.train_step(0))


def bad_rest(rank):
    """An Inf in process 1's part of a gradient that belongs to no block, and so has no scale."""
    task = small_task(cluster_of())
    step = task.scaler.step

    def spoilt(optimizer, **options):
        rest = [p for p in task.model.parameters() if p not in task.scaler.groups]
        part = next(g for p in rest if (g := local_part(p.grad)).numel())
        if rank == 1:
            part.view(-1)[0] = float("inf")
        return step(optimizer, **options)

    task.scaler.step = spoilt
    return said_of(lambda: task.train_step(0))


def read_late(_rank, folder, name, machines=1, psgd=0):
    """A training whose updates are read a step later, beside one that reads them at once."""
    config, sizes = VARIANTS[name] if name in VARIANTS else HALF[1:]
    cluster, found, rows = cluster_of(machines, psgd), [], []

    def task_of(changed=config):
        return make_task(make_parts(), replace(changed, clip_norm=0.5), world=cluster, **sizes)

    def run(task, out, steps=5, **options):
        given = {"log_every": 2, "picture_every": 0, "steps": steps} | options
        train(task, LoopConfig(out=Path(folder) / out, **given))

    for late in (True, False):
        task = task_of(replace(config, **PLATEAU))
        with pytest.MonkeyPatch.context() as patch:
            if not late:
                patch.setattr(update, "skips_on_device", lambda optimizer: False)
            run(task, f"late {late}")
        lines = (Path(folder) / f"late {late}" / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        rows.append(
            [
                {k: v for k, v in r.items() if "second" not in k and k not in ("eta", "data_wait")}
                for r in records
            ]
        )
        found.append((task.plateau.halvings, state_hash(task)))
    task, stopped = task_of(), []
    step, batch = task.train_step, task.batch

    def asked(at):
        if at == 2 and cluster.rank == cluster.size - 1:
            stopped.append("SIGTERM")
        return step(at)

    task.train_step = asked
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "signals", lambda: nullcontext(stopped))
        said = [said_of(lambda: run(task, "stopped", 9))]
    task = task_of()
    if cluster.rank == 1:  # in one process's part, of one step
        task.batch = lambda at: batch(at)._replace(
            keep=torch.full((len(batch(at).text), 16), float("nan" if at == 2 else 1))
        )
    said.append(said_of(lambda: run(task, "spoilt", 9)))
    same = rows[0] == rows[1] and found[0] == found[1]
    steps = [record["step"] for record in rows[0]]
    return {"same": same, "steps": steps, "halvings": found[0][0], "said": said}


def clipped(rank):
    """Hashes of the weights after clipped updates; the second machine finds other norms."""

    def odd(call):
        def changed(*given, **options):
            found, by = call(*given, **options), 1 + rank // 2 / 100
            return (found[0] * by, *found[1:]) if isinstance(found, tuple) else found * by

        return changed

    hashes = []
    for precision in ("fp32", "fp16-scaled"):
        config = replace(SMALL, clip_norm=1e-2)
        task = make_task(make_parts(), config, world=cluster_of(2), precision=precision)
        with pytest.MonkeyPatch.context() as patch:
            for at, name in ((torch.nn.utils, "get_total_norm"), (scaler, "gradient_stats")):
                patch.setattr(at, name, odd(getattr(at, name)))
            norms = [task.train_step(step)["grad_norm"] for step in range(2)]
        assert min(norms) > 1e-2
        parts = [local_part(p.detach()) for p in task.model.parameters()]
        hashes.append([zlib.crc32(part.contiguous().numpy().tobytes()) for part in parts])
    return hashes


def sums(_rank):
    cluster = cluster_of()
    part = cluster.part(11)
    values = cluster.mean({"images": cluster.rank + 1, "list": torch.tensor([1.0, cluster.rank])})
    found = {k: v.tolist() for k, v in values.items()}
    try:
        cluster.part(1)
    except DalleError as problem:
        found["said"] = str(problem)
    try:
        cluster.raise_first(CheckpointError("mine") if cluster.rank == 1 else None)
    except DalleError as problem:
        found["together"] = f"{type(problem).__name__}: {problem}"
    return {"part": [part.start, part.stop], **found}
