"""A training over many processes: the losses of one process, sharded checkpoints, failures."""

from __future__ import annotations

import re

import pytest
import torch

from dalle.distributed.config import ClusterConfig
from dalle.distributed.world import Solo, join
from dalle.errors import UsageError
from dalle.train.config import LoopConfig
from dalle.train.loop import train
from support.cluster import (
    HALF,
    VARIANTS,
    WHOLE,
    bad_loss,
    bad_rest,
    clipped,
    damaged,
    dvae_losses,
    full_disk,
    losses,
    read_late,
    resumed,
    saved,
    small_task,
    sums,
)
from support.processes import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def one():
    found = {name: losses(0, name) for name in [*VARIANTS, HALF[0], WHOLE[0]]}
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
        "late": (read_late, str(folder / "late"), "plain"),
        "late, half": (read_late, str(folder / "late half"), HALF[0]),
    }  # fmt: skip
    return run(2, calls, tmp_path_factory.mktemp("two"), joined=False)


@pytest.fixture(scope="module")
def four(folder, two, tmp_path_factory):
    """Two machines of two processes, gradients whole."""
    calls = {name: (losses, name, 2) for name in ("plain", "crops and dropouts")}
    calls |= {"resumed": (resumed, str(folder / "saved")), "clipped": (clipped,)}
    return run(4, calls, tmp_path_factory.mktemp("four"), joined=False)


@pytest.fixture(scope="module")
def machines(folder, tmp_path_factory):
    """Two machines of two processes with PowerSGD between them."""
    (folder / "psgd").mkdir()
    calls = {"saved": (saved, str(folder / "psgd"), 2, 2)}
    calls |= {name: (losses, name, 2, 2) for name in ("plain", "not recomputed", "recomputed")}
    calls |= {name: (losses, name, 2, 2) for name in (WHOLE[0], "in three micro-batches")}
    calls["late"] = (read_late, str(folder / "late psgd"), HALF[0], 2, 2)
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
    for first, second in (four["clipped"][::2], four["clipped"][1::2]):
        assert first == second


def test_compressed_gradients_train_alike_with_recomputed_blocks(one, machines):
    """The same losses; and near those of whole gradients."""
    for found, other in zip(machines["recomputed"], machines["not recomputed"], strict=True):
        assert found["loss"] == pytest.approx(other["loss"], rel=1e-5)
    for found in machines["plain"]:
        assert found["loss"] == pytest.approx(one["plain"]["loss"], rel=0.1)
        assert found["loss"] != pytest.approx(one["plain"]["loss"], rel=1e-5)


def test_a_batch_in_micro_batches_trains_as_a_whole_one_compressed_or_not(one, two, machines):
    """Compressed, a rounding of the gradients grows from update to update."""
    whole = one[WHOLE[0]]["loss"]
    for found in (one["in three micro-batches"], *two["in three micro-batches"]):
        assert found["loss"] == pytest.approx(whole, rel=1e-5)
        assert found["loss"][0] == pytest.approx(whole[0], rel=1e-6)
    for found, other in zip(machines["in three micro-batches"], machines[WHOLE[0]], strict=True):
        assert found["loss"][:3] == pytest.approx(other["loss"][:3], rel=1e-5)
        assert found["loss"] == pytest.approx(other["loss"], rel=1e-3)


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


def test_dvae_with_straight_through(one, two):
    """One codebook, moved by the points of all processes, revived codes among them."""
    first, second = two["dvae"]
    assert first["vector_loss"] == pytest.approx(one["dvae"]["vector_loss"], rel=1e-4)
    for name in ("vectors", "averaged", "codebook_counts"):
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], one["dvae"][name], rtol=1e-3, atol=1e-4)
    assert torch.equal(first["vectors"], first["averaged"])
    assert first["nearest"] and second["nearest"]


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


@pytest.mark.parametrize("name", ["late", "late, half", "late, compressed"])
def test_updates_that_are_read_a_step_later_train_alike(two, machines, name):
    """Bit for bit, with a plateau; a signal and a bad loss of one process stop all at one step."""
    found = machines["late"] if name == "late, compressed" else two[name]
    for process in found:
        assert process["same"] and process["steps"] == [2, 4, 5] and process["halvings"] > 0
        stopped, spoilt = process["said"]
        assert "stopped by" in stopped and "after step 3 of 9" in stopped
        assert spoilt.startswith("prior: loss must be finite, got nan at step 2")


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
