"""A checkpoint with valid hashes and a state of another form gets one line."""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from pathlib import Path

import pytest
from tiny_task import TinyTask

sys.path.append(str(Path(__file__).resolve().parents[1]))
from dalle.errors import CheckpointError  # noqa: E402
from dalle.files import to_json  # noqa: E402
from dalle.train.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from dalle.train.config import LoopConfig  # noqa: E402
from dalle.train.loop import train  # noqa: E402
from fuzz_damage import damage_json  # noqa: E402


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


def test_100_random_forms_are_a_checkpoint_error_or_load(saved):
    manifest = (saved / "manifest.json").read_bytes()
    state = (saved / "state.json").read_bytes()
    rng, refused = random.Random(0), 0
    for _ in range(100):
        (saved / "state.json").write_bytes(damage_json(state, rng))
        seal(saved, json.loads(manifest))
        try:
            load_checkpoint(TinyTask(), saved)
        except CheckpointError:
            refused += 1
    assert refused > 30
