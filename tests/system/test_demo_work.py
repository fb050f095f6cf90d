"""The demo's work files: a damaged one is reported, set aside and made again."""

from __future__ import annotations

import json
import os

import pytest
import torch

from dalle.cli import main
from dalle.demo.context import Demo
from dalle.demo.plots import draw_plots
from dalle.demo.report import write_report
from dalle.demo.run import built_in
from dalle.demo.score import stored_tokens
from dalle.demo.workspace import Workspace
from dalle.errors import DataError
from dalle.pretrained import tensors_to_bytes
from dalle.recipes import load_recipe

DAMAGE = [
    b"", b"{", b"[]", b"null", b"3", b'{"dvae": 3}', b'{"seconds": "x"}', b"\xff\xfe{", b"[" * 9999,
    b'{"code_use": {"rank": 1}, "psnr": "high"}', b'{"strips": [{"picture": 3}]}',
]  # fmt: skip


def make_space(out):
    options = {"data": "shapes", "minutes": None, "preset": "smoke"}
    return Workspace("demo", out, options, 0)


@pytest.fixture
def space(tmp_path):
    """A demo's folder with something in every work file."""
    space = make_space(tmp_path / "demo")
    space.claim()
    space.add_time("dvae", 3.0, 4.0, done=True)
    space.add_scores({"psnr": 22.5})
    strips = [{"caption": "caf\udce9 <b>", "split": "zero", "picture": "pictures/strip-00.png"}]
    space.write(space.work / "strips.json", {"strips": strips})
    return space


def report(space):
    draw_plots(space)
    recipe = load_recipe("shapes", "smoke")
    demo = Demo(space, recipe, built_in("shapes", recipe, 0), torch.device("cpu"))
    return write_report(demo, complete=False)


def test_whole_files_are_read(space, capsys):
    assert space.timings() == {"dvae": {"seconds": 3.0, "cpu_seconds": 4.0, "done": 1.0}}
    summary = report(space)
    assert (summary["psnr"], summary["seconds"]) == (22.5, 3.0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["timings.json", "scores.json", "strips.json"])
@pytest.mark.parametrize("damage", [*DAMAGE, "pipe", "device", "folder"])
def test_damaged_files_are_set_aside_and_said(space, capsys, name, damage):
    path = space.work / name
    path.unlink()
    if damage == "pipe":
        os.mkfifo(path)
    elif damage == "device":
        path.symlink_to("/dev/zero")
    elif damage == "folder":
        path.mkdir()
    else:
        path.write_bytes(damage)
    summary = report(space)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and f"{name} was not as dalle demo wrote it; set aside as" in said[0]
    assert summary["seconds"] == (0 if name == "timings.json" else 3.0)
    assert ("psnr" in summary) == (name != "scores.json")
    assert len(list(space.work.glob(f"damaged-{name}*"))) == 1 and not path.exists()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_demo_json_is_refused(space, damage):
    (space.work / "demo.json").write_bytes(damage)
    with pytest.raises(DataError, match="demo.json must be as dalle demo wrote it"):
        make_space(space.out)
    out = str(space.out)
    assert main(["demo", "--data", "shapes", "--preset", "smoke", "--out", out]) == 3


def test_one_changed_number_is_noticed(space, capsys):
    path = space.work / "timings.json"
    values = json.loads(path.read_text())
    values["dvae"]["seconds"] = 4.0
    path.write_text(json.dumps(values))
    assert space.timings() == {}
    assert "timings.json was not" in capsys.readouterr().err


@pytest.mark.parametrize(
    "tokens",
    [
        torch.zeros(2, 3, 4, 4),
        torch.zeros(2, 3, 4, dtype=torch.int64),
        torch.full((2, 3, 4, 4), 9),
        torch.full((2, 3, 4, 4), -1),
        None,
        b"\0" * 100,
    ],
)
def test_damaged_samples_are_drawn_anew(space, capsys, tokens):
    if isinstance(tokens, bytes):
        space.samples.write_bytes(tokens)
    else:
        named = {"x": torch.zeros(1)} if tokens is None else {"tokens": tokens}
        space.samples.write_bytes(tensors_to_bytes(named))
    assert stored_tokens(space, (2, 3, 4, 4), 9) is None
    assert "must hold this run's samples, got others" in capsys.readouterr().err
    good = torch.randint(0, 9, (2, 3, 4, 4))
    space.samples.write_bytes(tensors_to_bytes({"tokens": good}))
    assert torch.equal(stored_tokens(space, (2, 3, 4, 4), 9), good)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pipeline/prior", "its folder is a file"),
        ("pipeline/vae/config.json", "it is a folder, not a regular file"),
        ("summary.json", "it is a folder, not a regular file"),
    ],
)
def test_what_lies_in_the_way_is_found_before_the_training(space, capsys, name, reason):
    path = space.out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if reason.startswith("its"):
        path.touch()
    else:
        path.mkdir()
    words = ["demo", "--data", "shapes", "--preset", "smoke", "--out", str(space.out)]
    assert main(words) == 4
    said = capsys.readouterr().err
    assert f"must be writable, got {reason}" in said and "stage" not in said
