"""A training over many processes: the losses of one process, sharded checkpoints, failures."""

from __future__ import annotations

import errno
import os
import re
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import test_train_dvae
import torch
from processes import run
from test_train_prior import SMALL, make_parts, make_task
from tiny_task import state_hash

from dalle.distributed.cluster import Cluster
from dalle.distributed.config import ClusterConfig
from dalle.distributed.parallelize import parallelize
from dalle.distributed.world import Solo, join
from dalle.dtensor import gather, local_part
from dalle.dvae.model import DiscreteVAE
from dalle.errors import CheckpointError, DalleError, UsageError
from dalle.precision import scaler
from dalle.train.checkpoint import load_checkpoint, save_checkpoint
from dalle.train.config import LoopConfig
from dalle.train.dvae import DvaeTask
from dalle.train.loop import train
from dalle.train.manifest import checkpoints

STEPS = 6
RECIPE = replace(SMALL, batch_size=11, caption_dropout=0.3, token_dropout=0.2, bpe_dropout=0.2)
VARIANTS = {
    "plain": (replace(SMALL, batch_size=11), {}),  # parts of different sizes
    "crops and dropouts": (replace(RECIPE, augment="paper"), {}),
    "recomputed": (RECIPE, {"checkpointing": True}),
    "not recomputed": (RECIPE, {}),
    "padded text": (RECIPE, {"text_targets": "padded"}),
    "codebook": (replace(SMALL, image_init="codebook"), {}),
}
HALF = ("fp16-scaled", replace(SMALL, decay="none"), {"precision": "fp16-scaled", "d_model": 64})
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
    config, sizes = VARIANTS[name] if name in VARIANTS else HALF[1:]
    task = make_task(make_parts(), config, world=cluster_of(machines, psgd), **sizes)
    values = [task.train_step(step) for step in range(STEPS)]
    return {key: [float(v[key]) for v in values] for key in ("loss", "text_loss", "grad_norm")}


def dvae_task(world=None, config=test_train_dvae.WARM):
    torch.manual_seed(0)
    vae, pairs = DiscreteVAE(test_train_dvae.PATCH), test_train_dvae.some_pairs()
    world = world or Solo()
    parallelize(vae, world, vae.resblocks(), owner="dvae train", forwards=["autoencode"])
    return DvaeTask(vae, pairs, config, world=world)


def dvae_losses(_rank):
    task = dvae_task(cluster_of())
    values = [task.train_step(step) for step in range(10)]
    codebook = gather(task.model.decoder.blocks.input.w)
    return {"loss": [float(v["loss"]) for v in values], "counts": task.counts,
            "codebook": codebook}  # fmt: skip


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


def alike(rank):
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def one():
    found = {name: losses(0, name) for name in [*VARIANTS, HALF[0]]}
    return {**found, "dvae": dvae_losses(0)}


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory):
    for name in ("saved", "damaged", "full"):
        (folder / name).mkdir()
    calls = {name: (losses, name) for name in [*VARIANTS, HALF[0]]}
    calls |= {
        "dvae": (dvae_losses,), "saved": (saved, str(folder / "saved")), "sums": (sums,),
        "damaged": (damaged, str(folder / "damaged")), "full": (full_disk, str(folder / "full")),
        "bad loss": (bad_loss,), "bad rest": (bad_rest,),
    }  # fmt: skip
    return run(2, calls, tmp_path_factory.mktemp("two"), joined=False)


@pytest.fixture(scope="module")
def four(folder, two, tmp_path_factory):
    """Two machines of two processes, gradients whole."""
    calls = {name: (losses, name, 2) for name in ("plain", "crops and dropouts")}
    calls |= {"resumed": (resumed, str(folder / "saved")), "alike": (alike,)}
    return run(4, calls, tmp_path_factory.mktemp("four"), joined=False)


@pytest.fixture(scope="module")
def machines(folder, tmp_path_factory):
    """Two machines of two processes with PowerSGD between them."""
    (folder / "psgd").mkdir()
    calls = {"saved": (saved, str(folder / "psgd"), 2, 2)}
    calls |= {name: (losses, name, 2, 2) for name in ("plain", "not recomputed", "recomputed")}
    return run(4, calls, tmp_path_factory.mktemp("machines"), joined=False)


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_are_those_of_one_process(one, two, name):
    for found in two[name]:
        for key, values in one[name].items():
            assert found[key] == pytest.approx(values, rel=1e-5), key


def test_losses_are_those_of_one_process_on_two_machines(one, four):
    for name in ("plain", "crops and dropouts"):
        for found in four[name]:
            assert found["loss"] == pytest.approx(one[name]["loss"], rel=1e-5)


def test_machines_that_measure_other_norms_clip_alike(four):
    """Without PowerSGD as well: the norm is process 0's."""
    for first, second in (four["alike"][::2], four["alike"][1::2]):
        assert first == second


def test_compressed_gradients_train_alike_with_recomputed_blocks(one, machines):
    """The same losses; and near those of whole gradients."""
    for found, other in zip(machines["recomputed"], machines["not recomputed"], strict=True):
        assert found["loss"] == pytest.approx(other["loss"], rel=1e-5)
    for found in machines["plain"]:
        assert found["loss"] == pytest.approx(one["plain"]["loss"], rel=0.1)
        assert found["loss"] != pytest.approx(one["plain"]["loss"], rel=1e-5)


def test_scaled_fp16_and_16_bit_moments_compose(one, two):
    """Sums in another order: the same to the words' precision."""
    for found in two[HALF[0]]:
        assert found["loss"] == pytest.approx(one[HALF[0]]["loss"], rel=2e-3)
        assert found["grad_norm"] == pytest.approx(one[HALF[0]]["grad_norm"], rel=2e-2)


def test_dvae(one, two):
    """The warm start and what follows, with one codebook, counts of all and one batch's noise."""
    first, second = two["dvae"]
    assert first["loss"] == pytest.approx(one["dvae"]["loss"], rel=1e-5)
    assert first["loss"] == second["loss"] and torch.equal(first["counts"], second["counts"])
    assert torch.equal(first["codebook"], second["codebook"])
    assert torch.equal(first["counts"], one["dvae"]["counts"])


def test_resume_is_bit_exact_at_the_same_number_of_processes(two, machines):
    for found in [*two["saved"], *machines["saved"]]:
        assert found["kept"] == found["again"]
        assert found["hashes"][0] == found["hashes"][1]
    assert all(found["error"] > 0 for found in machines["saved"])


def assert_goes_on(found, kept):
    """The same weights; then fp16 gradients and codes differ in single bits by who sums them.

    Without the mean of the gradients the last losses are .015 apart, without the variance tenfold.
    """
    assert found[0] == pytest.approx(kept[0], rel=1e-5)
    assert found == pytest.approx(kept, rel=1e-3)


def test_resume_at_another_number_of_processes(folder, two, four, machines):
    """One process reads what two wrote, four too, and one what four with PowerSGD wrote."""
    kept = two["saved"][0]["kept"]
    for found in [resumed(0, folder / "saved"), *four["resumed"]]:
        assert_goes_on(found, kept)
    found = resumed(0, folder / "psgd")
    assert found[0] == pytest.approx(machines["saved"][0]["kept"][0], rel=1e-4)


def test_one_changed_byte_is_found_on_every_process(two):
    said, others = two["damaged"]
    assert len(said) == 8 and all(line.startswith("checkpoint PATH: ") for line in said)
    assert all(a.split(" (on")[0] == b.split(" (on")[0] for a, b in zip(said, others, strict=True))


def test_a_full_disk_on_one_process_fails_on_all_and_keeps_the_older(two):
    for said in two["full"]:
        assert len(said) > 3 and said[-1] == "saved"
        assert all("No space left" in line and "on process 1" in line for line in said[:-1])


def test_a_bad_loss_on_one_process_stops_all(two):
    for said in two["bad loss"]:
        assert said.startswith("prior: loss must be finite, got nan at step 0")


def test_a_bad_gradient_in_the_part_of_one_process_stops_all(two):
    for said in two["bad rest"]:
        assert re.fullmatch(r"prior: gradient of .* at step 0 \(on process 1\)", said), said


def test_parts_sums_and_agreed_problems(two):
    first, second = two["sums"]
    assert first["part"] == [0, 5] and second["part"] == [5, 11]
    assert first["images"] == 3 and first["list"] == [1.0, 0.5]
    assert first["said"] == "cluster: batch_size must be at least the 2 processes, got 1"
    assert first["together"] == "CheckpointError: mine (on process 1)" == second["together"]


def test_a_checkpoint_of_one_process_goes_on_with_many(tmp_path, tmp_path_factory):
    task = small_task(Solo())
    train(task, LoopConfig(out=tmp_path, steps=3, picture_every=0))
    kept = [float(task.train_step(step)["loss"]) for step in range(3, 7)]
    calls = {"resumed": (resumed, str(tmp_path))}
    for found in run(2, calls, tmp_path_factory.mktemp("many"), joined=False)["resumed"]:
        assert_goes_on(found, kept)


def test_one_process_is_no_cluster(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join(ClusterConfig(), torch.device("cpu")) as cluster:
        assert isinstance(cluster, Solo)


def test_an_environment_that_is_not_torchruns(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    line = "cluster: RANK must be set where WORLD_SIZE is, as torchrun does, got none"
    with pytest.raises(UsageError, match=line), join(ClusterConfig(), torch.device("cpu")):
        pass
