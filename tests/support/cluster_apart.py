"""What each process of `test_cluster_apart` does."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from dalle.commands import prior as prior_command
from dalle.data.images import BadPicture
from dalle.data.pairs import ArrayPairs
from dalle.dvae.model import DiscreteVAE
from dalle.errors import DataError
from dalle.train.checkpoint import save_checkpoint
from dalle.train.config import LoopConfig
from dalle.train.held_out import save_better
from dalle.train.lock import FolderLock, training_lock
from dalle.train.loop import train, write_pictures
from dalle.train.manifest import checkpoints
from support.cluster import cluster_of, dvae_task, said_of
from support.dvae import WARM
from support.prior import SMALL, make_parts, make_task
from support.tiny_task import state_hash

STEPS = 6
RECIPES = {
    "crops": replace(SMALL, batch_size=6, augment="paper"),
    "encoded once": replace(SMALL, batch_size=6),
}


class Broken(ArrayPairs):
    """Pairs of which some pictures do not decode; by a set's own numbers, as files do."""

    def __init__(self, pairs, bad):
        super().__init__(pairs.name, pairs.images, pairs.captions)
        self.bad = bad

    def load(self, i):
        if i in self.bad:
            raise DataError(f"{i}: image must decode")
        return super().load(i)


def losses(task):
    values = [task.train_step(step) for step in range(STEPS)]
    found = {key: [float(v[key]) for v in values] for key in ("loss", "grad_norm", "images")}
    return found | {"skipped": task.pairs.skipped["does not decode"]}


def prior_losses(_rank, name):
    """Half the pictures are broken, all but two of the first half of the set among them."""
    tokenizer, vae, pairs = make_parts()
    parts = tokenizer, vae, Broken(pairs, {0, 1, 2, 3, 8, 11})
    return losses(make_task(parts, RECIPES[name], world=cluster_of()))


def dvae_losses(_rank):
    config = replace(WARM, batch_size=5, warm_start_steps=2, augment="paper")
    task = dvae_task(cluster_of(), config)
    task.pairs = Broken(task.pairs, set(range(0, len(task.pairs), 3)))
    return losses(task)


def own_part_gone(_rank):
    """Encoded once: nothing that process 0 would encode decodes; then nothing at all."""
    tokenizer, vae, pairs = make_parts()
    half = Broken(pairs, set(range(6)))
    task = make_task((tokenizer, vae, half), RECIPES["encoded once"], world=cluster_of())
    none = Broken(pairs, set(range(12)))
    said = said_of(
        lambda: make_task((tokenizer, vae, none), RECIPES["encoded once"], world=cluster_of())
    )
    return {"kept": task.usable.tolist(), "said": said}


def other_data(rank):
    """What is said where process 1 has another recipe, picture, caption or dVAE."""
    tokenizer, vae, pairs = make_parts()
    images, captions = pairs.images.copy(), list(pairs.captions)
    images[3, 0, 0, 0] ^= 1
    captions[3] += "!"
    other_vae = make_parts()[1]
    with torch.no_grad():
        next(other_vae.parameters()).view(-1)[0] += 1e-3
    other_words = type(tokenizer).train(["quite", "other", "words"] * 9, vocab_size=300)
    given = {
        "train.lr": (replace(SMALL, lr=0.5), (tokenizer, vae, pairs)),
        "picture": (SMALL, (tokenizer, vae, ArrayPairs("toy", images, pairs.captions))),
        "caption": (SMALL, (tokenizer, vae, ArrayPairs("toy", pairs.images, captions))),
        "tokenizer": (SMALL, (other_words, vae, pairs)),
        "vae": (SMALL, (tokenizer, other_vae, pairs)),
    }
    said = {}
    for what, (config, parts) in given.items():
        own = (config, parts) if rank else (SMALL, (tokenizer, vae, pairs))
        said[what] = said_of(lambda own=own: make_task(own[1], own[0], world=cluster_of()))
    return said


def other_shapes(rank):
    """What is said where process 1 has a dVAE to which the pictures' size does not fit."""
    tokenizer, vae, _ = make_parts()
    if rank:
        vae = DiscreteVAE(replace(vae.config, patch=16))
    folder = Path(tempfile.mkdtemp())
    tokenizer.save_pretrained(folder / "tokenizer")
    vae.save_pretrained(folder / "vae")
    config = prior_command.PriorCommandConfig(
        data="shapes", image_size=24, tokenizer=folder / "tokenizer", vae=folder / "vae",
        loop=LoopConfig(out=folder / "out", steps=1), recipe="paper",
        training=replace(SMALL, augment="paper"),
    )  # fmt: skip
    return said_of(lambda: prior_command._train(config, cluster_of()))


def pictures(rank):
    """Pictures on process 0: as they are, all broken, and with too little memory; then a step."""
    folder = Path(tempfile.mkdtemp())
    task = make_task(make_parts(), RECIPES["crops"], world=cluster_of())
    dvae = dvae_task(cluster_of())
    own = task.pairs
    for step, pairs in ((1, own), (2, Broken(own, set() if rank else set(range(12))))):
        task.pairs = pairs
        write_pictures(task, step, folder)
    task.pairs, task.vae = own, NoMemory()
    write_pictures(task, 3, folder)
    task.vae = make_parts()[1]
    write_pictures(dvae, 1, folder)
    values = [float(t.train_step(0)["loss"]) for t in (task, dvae)]
    return {"written": sorted(p.name for p in folder.iterdir()), "losses": values}


def better(_rank):
    """The models that are written with a held-out part, and without one."""
    folder = Path(cluster_of().first(tempfile.mkdtemp()))
    for name in ("with", "without"):
        task = make_task(make_parts(), RECIPES["crops"], world=cluster_of())
        task.validation = task.pairs if name == "with" else None
        task.train_step(0)
        task.average.copies = 10_000
        save_better("prior train", task, folder / name, 1)
    return sorted(path.name for path in folder.iterdir())


def locked(rank):
    """What is said where another training has the folder, and who has it when that has gone."""
    cluster = cluster_of()
    folder = Path(cluster.first(tempfile.mkdtemp()))
    other = None if rank else FolderLock(folder, "other")
    task = SimpleNamespace(name="prior", world=cluster)
    cluster.any(False)
    said = said_of(lambda: training_lock(folder, task).__enter__())
    if other is not None:
        other.release()
    with training_lock(folder, task) as lock:
        cluster.any(False)
        files = [path.name for path in folder.iterdir()]
        cluster.any(False)
    return {"said": said, "has": lock is not None, "files": files, "folder": str(folder)}


def rescued(rank):
    """What happens where one process has no data at step 3: said, saved, and how it goes on."""
    cluster = cluster_of()
    folder, found = Path(cluster.first(tempfile.mkdtemp())), {}
    makers = {
        "prior": lambda: make_task(make_parts(), RECIPES["crops"], world=cluster),
        "dvae": lambda: dvae_task(cluster),
    }
    for process, (name, make) in enumerate(makers.items()):
        loop = LoopConfig(
            out=folder / name, steps=5, checkpoint_every=100, picture_every=0, log_every=5
        )
        whole, task, again = make(), make(), make()
        train(whole, replace(loop, out=folder / f"{name}-whole"))
        plain = task.batch

        def batch(step, plain=plain, process=process):
            if step == 3 and rank == process:
                raise DataError("gone")
            return plain(step)

        task.batch = batch
        said = said_of(lambda task=task, loop=loop: train(task, loop))
        saved = [path.name for path in checkpoints(loop.out)]
        train(again, loop)
        same = state_hash(again) == state_hash(whole)
        found[name] = {"said": said, "saved": saved, "same": same}
    return found


class NoMemory:
    def encode(self, _):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    decode = encode


def broken_codebook(_rank):
    task = dvae_task(cluster_of())
    task.pairs = Broken(task.pairs, set(range(len(task.pairs))))
    return said_of(task._make_codebook)


def told_apart(rank):
    """An error whose class takes more than its line."""
    problem = BadPicture("a.png", "empty", "decode") if rank else None
    try:
        cluster_of().raise_first(problem)
    except DataError as found:
        return [type(found).__name__, str(found)]
    return []


def time_apart(rank):
    """Process 0 works alone for longer than an exchange waits; then it gives no sign of life."""
    cluster = cluster_of()
    cluster.heartbeat._limit = 1.5
    c10d._set_pg_timeout(timedelta(seconds=1.5), cluster.control)
    begin = time.monotonic()
    with cluster.raise_on_all():
        if rank == 0:
            time.sleep(3.0)
    waited = time.monotonic() - begin

    def fail():
        with cluster.raise_on_all():
            if rank == 0:
                raise OSError(21, "Is a directory", "metrics.jsonl")

    said = said_of(fail)
    lost = ""
    if rank == 0:
        cluster.heartbeat.stop()
        time.sleep(4.0)
        cluster.heartbeat.wait_for_rank0()
    else:
        try:
            cluster.heartbeat.wait_for_rank0()
        except dist.DistError as problem:
            lost = str(problem)
    cluster.heartbeat._limit, cluster.heartbeat._dead = 60.0, "0"
    begin = time.monotonic()
    if rank:  # another process has found that process 0 is gone
        with pytest.raises(dist.DistError):
            cluster.heartbeat.wait_for_rank0()
    return {"waited": waited, "said": said, "lost": lost, "judged": time.monotonic() - begin}


def saved(_rank, folder):
    task = make_task(make_parts(), SMALL, world=cluster_of())
    task.train_step(0)
    save_checkpoint(task, Path(folder), 1)
