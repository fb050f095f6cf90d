"""Processes that differ: pictures that do not decode on one, other data, delays."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from dalle.data.pairs import ArrayPairs, load_or_draw
from dalle.errors import CheckpointError, DataError
from dalle.train.checkpoint import load_checkpoint
from dalle.train.loop import write_pictures
from dalle.train.seeds import step_seed
from support.cluster_apart import (
    RECIPES,
    STEPS,
    Broken,
    better,
    broken_codebook,
    dvae_losses,
    locked,
    other_data,
    other_shapes,
    own_part_gone,
    pictures,
    prior_losses,
    rescued,
    saved,
    time_apart,
    told_apart,
)
from support.prior import SMALL, make_parts, make_task
from support.processes import run


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    calls = {name: (prior_losses, name) for name in RECIPES}
    calls |= {"dvae": (dvae_losses,), "gone": (own_part_gone,), "other": (other_data,)}
    calls |= {"shapes": (other_shapes,), "pictures": (pictures,), "told": (told_apart,)}
    calls |= {"better": (better,), "codebook": (broken_codebook,)}
    calls |= {"locked": (locked,), "rescued": (rescued,)}
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


def test_all_processes_write_the_better_weights(two):
    for found in two["better"]:
        assert found[0] == "with" and found[1] in ("with-averaged", "with-last")
        assert found[2:] == ["without"]


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
