"""A checkpoint with valid hashes and a state of another form gets one line."""

from __future__ import annotations

import hashlib
import json
import random
import re

import pytest

from dalle.errors import CheckpointError
from dalle.files import to_json
from dalle.train.checkpoint import load_checkpoint, save_checkpoint
from dalle.train.config import LoopConfig
from dalle.train.loop import train
from dalle.train.manifest import checkpoints
from fuzz_damage import damage_json
from support.tiny_task import TinyTask, state_hash


def seal(folder, manifest):
    """Writes a manifest with the hashes that the files now have."""
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        entry |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest.pop("sha256", None)
    digest = hashlib.sha256(to_json(manifest)).hexdigest()
    (folder / "manifest.json").write_bytes(to_json({**manifest, "sha256": digest}))


@pytest.fixture
def saved(tmp_path):
    task = TinyTask()
    task.train_step(0)
    return save_checkpoint(task, tmp_path, 1)


@pytest.mark.parametrize(
    "state",
    [
        [], 3, "x", None, {}, {"average": None}, {"optimizer": {"dict": 3}},
        {"optimizer": {"tensor": "gone"}}, {"optimizer": {"list": [1]}}, {"optimizer": {}},
    ],
)  # fmt: skip
def test_states_of_another_form(saved, state):
    manifest = json.loads((saved / "manifest.json").read_bytes())
    whole = json.loads((saved / "state.json").read_bytes())
    mixed = whole | state if isinstance(state, dict) and state else state
    (saved / "state.json").write_bytes(to_json(mixed))
    seal(saved, manifest)
    with pytest.raises(CheckpointError, match="checkpoint .*step-00000001") as caught:
        load_checkpoint(TinyTask(), saved)
    assert not re.search(r"Error|object|indices", str(caught.value))
    with pytest.raises(CheckpointError, match="checkpoint .*step-00000001") as caught:
        train(TinyTask(), LoopConfig(out=saved.parent, steps=2, picture_every=0))
    assert not re.search(r"Error|object|indices", str(caught.value))


def test_100_random_forms_change_nothing_or_can_be_gone_on_from(saved):
    manifest = (saved / "manifest.json").read_bytes()
    state = (saved / "state.json").read_bytes()
    rng, refused = random.Random(0), 0
    task = TinyTask(seed=1)
    task.describe = TinyTask().describe
    task.train_step(0)
    before = state_hash(task)
    for _ in range(100):
        (saved / "state.json").write_bytes(damage_json(state, rng))
        seal(saved, json.loads(manifest))
        try:
            load_checkpoint(task, saved)
        except CheckpointError:
            refused += 1
            assert state_hash(task) == before
        else:
            task.train_step(1)
            before = state_hash(task)
    assert refused > 30


def optimizer_of(saved, change):
    """Changes the first group of the optimizer's state, and its first state."""
    state = json.loads((saved / "state.json").read_bytes())
    parts = dict(state["optimizer"]["dict"])
    first_state, first_group = parts["state"]["dict"][0][1], parts["param_groups"]["list"][0]
    change(first_state["dict"], first_group["dict"])
    return state


def set_to(place, key, value):
    def change(*both):
        (item,) = (item for item in both[place] if item[0] == key)
        item[1] = value

    return change


CHANGES = {
    "lr must be 0 or more": set_to(1, "lr", -1.0),
    "betas must be": set_to(1, "betas", {"tuple": [0.9]}),
    "betas must be 0 or more and below 1": set_to(1, "betas", {"tuple": [0.9, 1.0]}),
    "eps must be 1e-08, got x": set_to(1, "eps", "x"),
    "amsgrad must be False, got True": set_to(1, "amsgrad", True),
    "step must be 0 or more": set_to(0, "step", -1),
    r"exp_avg must be of shape \(4, 3\), got no tensor": set_to(0, "exp_avg", 3),
    r"exp_avg must be of shape \(4, 3\), got \(\)": set_to(
        0, "exp_avg", {"tensor": "optimizer.state.0.step"}
    ),
    "optimizer must hold all tensors": lambda state, _: state.pop(),
}


@pytest.mark.parametrize("match", CHANGES)
def test_an_optimizer_that_does_not_fit_leaves_all_as_it_was(saved, match):
    """Torch loads any of these; the weights were the checkpoint's by then."""
    manifest = json.loads((saved / "manifest.json").read_bytes())
    (saved / "state.json").write_bytes(to_json(optimizer_of(saved, CHANGES[match])))
    seal(saved, manifest)
    task = TinyTask(seed=1)
    task.describe = TinyTask().describe
    task.train_step(0)
    before, moments = state_hash(task), dict(task.optimizer.state)
    with pytest.raises(CheckpointError, match=f"optimizer.*{match}"):
        load_checkpoint(task, saved)
    assert state_hash(task) == before
    assert all(task.optimizer.state[p] is state for p, state in moments.items())


@pytest.mark.parametrize("part", ["average", "optimizer", "rng", "task"])
def test_an_older_one_is_named_where_a_part_has_another_form(tmp_path, part):
    task = TinyTask()
    task.train_step(0)
    older = save_checkpoint(task, tmp_path, 1)
    task.train_step(1)
    newest = save_checkpoint(task, tmp_path, 2)
    manifest = json.loads((newest / "manifest.json").read_bytes())
    state = json.loads((newest / "state.json").read_bytes())
    (newest / "state.json").write_bytes(to_json({**state, part: []}))
    seal(newest, manifest)
    hint = f"; --resume {older} goes on from an older one$"
    with pytest.raises(CheckpointError, match=f"state must have the form .*{hint}"):
        train(TinyTask(), LoopConfig(out=tmp_path, steps=3, picture_every=0))
    assert [p.name for p in checkpoints(tmp_path)] == [older.name, newest.name]
    again = train(TinyTask(), LoopConfig(out=tmp_path, steps=3, picture_every=0, resume=str(older)))
    assert again.step == 3
