"""Processes that differ: pictures that do not decode on one, other data, delays."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_train_dvae
import torch
import torch.distributed as dist
from processes import run
from test_cluster import cluster_of, dvae_task, said_of
from test_train_prior import SMALL, make_parts, make_task
from tiny_task import state_hash
from torch.distributed import distributed_c10d as c10d

from dalle.commands import prior as prior_command
from dalle.data.images import BadPicture
from dalle.data.pairs import ArrayPairs, load_or_draw
from dalle.distributed.cluster import Cluster
from dalle.dvae.model import DiscreteVAE
from dalle.errors import CheckpointError, DataError, UsageError
from dalle.train.checkpoint import load_checkpoint, save_checkpoint
from dalle.train.config import LoopConfig
from dalle.train.lock import FolderLock, alone_in
from dalle.train.loop import train, write_pictures
from dalle.train.manifest import checkpoints
from dalle.train.seeds import step_seed

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
    config = replace(test_train_dvae.WARM, batch_size=5, warm_start_steps=2, augment="paper")
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
    return {"kept": task.kept.tolist(), "said": said}


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
        out=folder / "out", steps=1, recipe=replace(SMALL, augment="paper"),
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


def locked(rank):
    """What is said where another training has the folder, and who has it when that has gone."""
    cluster = cluster_of()
    folder = Path(cluster.first(tempfile.mkdtemp()))
    other = None if rank else FolderLock(folder, "other")
    task = SimpleNamespace(name="prior", world=cluster)
    cluster.any(False)
    said = said_of(lambda: alone_in(folder, task).__enter__())
    if other is not None:
        other.release()
    with alone_in(folder, task) as lock:
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
    with cluster.agreed():
        if rank == 0:
            time.sleep(3.0)
    waited = time.monotonic() - begin

    def fail():
        with cluster.agreed():
            if rank == 0:
                raise OSError(21, "Is a directory", "metrics.jsonl")

    said = said_of(fail)
    lost = ""
    if rank == 0:
        cluster.heartbeat.stop()
        time.sleep(4.0)
        cluster.heartbeat.follow()
    else:
        try:
            cluster.heartbeat.follow()
        except dist.DistError as problem:
            lost = str(problem)
    cluster.heartbeat._limit, cluster.heartbeat._verdict = 60.0, "0"
    begin = time.monotonic()
    if rank:  # another process has found that process 0 is gone
        with pytest.raises(dist.DistError):
            cluster.heartbeat.follow()
    return {"waited": waited, "said": said, "lost": lost, "judged": time.monotonic() - begin}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    calls = {name: (prior_losses, name) for name in RECIPES}
    calls |= {"dvae": (dvae_losses,), "gone": (own_part_gone,), "other": (other_data,)}
    calls |= {"shapes": (other_shapes,), "pictures": (pictures,), "told": (told_apart,)}
    calls |= {"codebook": (broken_codebook,), "locked": (locked,), "rescued": (rescued,)}
    calls |= {"time": (time_apart,)}  # the last: its heartbeat has stopped
    return run(2, calls, tmp_path_factory.mktemp("two"), joined=False)


@pytest.mark.parametrize("name", [*RECIPES, "dvae"])
def test_losses_with_broken_pictures_are_those_of_one_process(two, name):
    one = dvae_losses(0) if name == "dvae" else prior_losses(0, name)
    assert one["skipped"] > 0
    if name == "crops":
        assert one["images"] == [6.0] * STEPS  # others were drawn in their places
    for found in two[name]:
        for key in ("loss", "grad_norm", "images"):
            # The norm of the first gradients through the codes: sums in another order.
            within = 1e-4 if (name, key) == ("dvae", "grad_norm") else 1e-5
            assert found[key] == pytest.approx(one[key], rel=within), key


def test_a_process_without_a_picture_that_decodes_goes_on(two):
    for found in two["gone"]:
        assert found["kept"] == [6, 7, 8, 9, 10, 11]
        assert found["said"] == "toy: a picture must be usable, got none that is"


def test_other_data_on_one_process_is_named(two):
    for found in two["other"]:
        for what, said in found.items():
            key = {"picture": "data.pictures", "caption": "data.captions"}.get(what, what)
            assert said.startswith(f"cluster: {key} must be the same on all processes ("), said
            assert said.endswith(" on process 1"), said


def test_others_wait_for_process_0_while_it_lives(two):
    first, second = two["time"]
    assert second["waited"] > 2.5
    assert second["judged"] < 5.0
    assert first["said"] == second["said"] != "nothing"
    assert "Is a directory" in first["said"]
    assert second["lost"] == "timed out waiting for process 0"


def test_a_process_without_data_lets_all_save_first(two):
    for found in two["rescued"]:
        for name, said in (("prior", "gone"), ("dvae", "gone (on process 1)")):
            assert found[name] == {"said": said, "saved": ["step-00000003"], "same": True}


def test_one_training_of_many_processes_at_a_time_in_a_folder(two):
    for rank, found in enumerate(two["locked"]):
        line = f"prior: out must be used by one training at a time, got {found['folder']}, where "
        assert found["said"].startswith(line), found["said"]
        assert found["has"] == (rank == 0) and found["files"] == ["training.lock"]


def test_pictures_of_many_processes(two):
    first, second = two["pictures"]
    assert first["written"] == ["reconstructions-00000001.png", "samples-00000001.png"]
    assert second["written"] == []
    assert first["losses"] == second["losses"]


def test_a_codebook_without_pictures_ends_on_all(two):
    first, second = two["codebook"]
    assert first == second
    assert "a batch must hold a picture that can be used" in first


def test_a_dvae_that_does_not_fit_is_told_on_all(two):
    first, second = two["shapes"]
    assert first == second
    assert "multiple of 16" in first and first.endswith(" (on process 1)")


def test_an_error_of_more_than_a_line_is_told_on_all(two):
    line = "a.png: image must decode, got: empty (on process 1)"
    assert two["told"] == [["DataError", line]] * 2


def test_fewer_gpus_than_processes(monkeypatch):
    def together(problem):
        raise problem

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    line = "cluster: processes of a machine must be at most its 2 GPUs, got 4"
    with pytest.raises(UsageError, match=line):
        Cluster._own_device(SimpleNamespace(raise_first=together), torch.device("cuda"), 4)


def test_a_shard_that_no_manifest_lists_is_refused(tmp_path, tmp_path_factory):
    calls = {"saved": (saved, str(tmp_path))}
    run(2, calls, tmp_path_factory.mktemp("saved"), joined=False)
    path = tmp_path / "step-00000001"
    task = make_task(make_parts(), SMALL)
    assert load_checkpoint(task, path) == 1
    shard = next((path / "shards").glob("*.safetensors"))
    shutil.copy(shard, shard.with_name("stranger.safetensors"))
    line = "files must be in its manifest, got shards/stranger.safetensors"
    with pytest.raises(CheckpointError, match=line):
        load_checkpoint(task, path)


def saved(_rank, folder):
    task = make_task(make_parts(), SMALL, world=cluster_of())
    task.train_step(0)
    save_checkpoint(task, Path(folder), 1)


def test_pictures_leave_out_what_does_not_decode(tmp_path, capsys):
    """One process: the first are drawn without it; where none decodes the run says so."""
    tokenizer, vae, pairs = make_parts()
    broken = Broken(pairs, {0, 2})
    task = make_task((tokenizer, vae, broken), RECIPES["crops"])
    write_pictures(task, 1, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["samples-00000001.png"]
    assert broken.skipped["does not decode"] == 2
    broken.bad = set(range(12))
    write_pictures(task, 2, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert "prior: pictures after step 2 not written: toy: a batch must" in capsys.readouterr().err


def test_what_is_drawn_at_a_place_depends_on_the_place_alone():
    images = np.zeros((40, 8, 8, 3), np.uint8)
    pairs = Broken(ArrayPairs("toy", images, ["x"] * 40), set(range(30)))

    def load(first, stop):
        def seed(place):
            return step_seed(0, 0, 5, first + place)

        return load_or_draw(pairs, range(first, stop), seed, lambda image, _: image)[1]

    found, later = load(0, 8), load(4, 8)
    assert found[4:].tolist() == later.tolist() and set(found) <= set(range(30, 40))
    assert len(set(found.tolist())) > 2

    pairs.bad = set(range(40))
    with pytest.raises(DataError, match="toy: a batch must hold a picture that can be used, got"):
        load(0, 1)
