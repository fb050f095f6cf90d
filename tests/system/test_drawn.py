"""Two runs never draw into one folder, and a run that is refused leaves no empty one."""

from __future__ import annotations

import fcntl
import os

import pytest
from PIL import Image

import dalle_ext
from dalle import cli
from dalle.commands.drawn import RECORD, output_folder
from dalle.files import folders_of_failure_removed, make_folder
from support.toy_pipeline import CAPTION, build


def test_folders_of_runs_one_after_another(tmp_path, capsys):
    out = tmp_path / "samples"
    assert output_folder("sample", out, False) == out and capsys.readouterr().err == ""
    assert output_folder("sample", out, False) == out  # this process's, and nothing in it yet
    (out / RECORD).write_text("{}")
    assert output_folder("sample", out, False) == tmp_path / "samples-2"
    assert "holds samples of an earlier run; these go to" in capsys.readouterr().err
    assert output_folder("sample", out, True) == out


def test_folders_of_runs_that_begin_together(tmp_path, monkeypatch, capsys):
    out = tmp_path / "samples"
    out.mkdir()
    other = os.open(out, os.O_RDONLY)  # what another process holds
    fcntl.flock(other, fcntl.LOCK_EX)
    assert output_folder("sample", out, False) == tmp_path / "samples-2"
    said = capsys.readouterr().err
    assert "is drawn into by another process; these go to" in said and said.count("\n") == 1
    assert output_folder("sample", out, True) == out  # told to
    os.close(other)  # it has ended, and has left nothing
    assert output_folder("sample", out, False) == out
    monkeypatch.setattr(fcntl, "flock", _unsupported)
    assert output_folder("sample", tmp_path / "new", False) == tmp_path / "new"


def _unsupported(*_):
    raise OSError("no locks")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build(num_candidates=2).save_pretrained(path / "pipeline")
    (path / "pictures").mkdir()
    Image.new("RGB", (16, 16)).save(path / "pictures/0.png")
    return path


SAMPLE = ("sample", CAPTION, "--model", "pipeline")
EDIT = ("edit", "--image", "pictures/0.png", "--caption", CAPTION, "--model", "pipeline")
MAKE = ("pipeline", "make", "--tokenizer", "t", "--vae", "v", "--prior", "p")
TRAIN = ("prior", "train", "--data", "d", "--tokenizer", "t", "--vae", "v")
RERANK = ("rerank", CAPTION, "--data", "pictures", "--ranker")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((*SAMPLE, "--seed", "-1"), "sample: seed must be 0 or more, got -1"),
        ((*SAMPLE, "--scale", "0"), "sample: scale must be at least 1, got 0"),
        ((*SAMPLE, "--prime-rows", "2"), "sample: prime_rows must be 0 without a prime_image, got"),
        (
            (*SAMPLE, "--prime-rows", "4", "--prime-image", "pictures/0.png"),
            "sample: prime_rows must be 1 to 3, got 4",
        ),
        ((*SAMPLE[:-1], "none"), "none/config.json: must be a readable file"),
        ((*EDIT, "--seed", "-1"), "edit: seed must be 0 or more, got -1"),
        # Lines of Python's functions name the command that was typed.
        ((*SAMPLE, "--temperature", "-1"), "sample: temperature must be 0 or more, got -1.0"),
        ((*SAMPLE, "--cond-scale", "nan"), "sample: cond_scale must be a finite number, got nan"),
        ((*SAMPLE, "--weights", "bf16"), "sample: weights bf16 must have a CPU with bf16 dot prod"),
        ((*EDIT, "--top-k", "0"), "edit: top_k must be a whole number of at least 1, got 0"),
        ((*EDIT, "--top-p", "2"), "edit: top_p must be in (0, 1], got 2.0"),
        ((*EDIT, "--cache-bits", "4"), "edit: cache_bits must be 8 or left out, got 4"),
        ((*MAKE, "--temperature", "-1"), "pipeline make: temperature must be 0 or more, got -1.0"),
        ((*TRAIN, "--keep", "-1"), "prior train: keep must be 1 or more, got -1"),
        ((*EDIT, "--keep-rows", "4"), "edit: keep_rows must be 1 to 3, got 4"),
        ((*RERANK, "none"), "rerank: ranker: none/config.json: must be a readable file"),
    ],
)
def test_what_is_refused_leaves_no_folder(folder, tmp_path, monkeypatch, capsys, words, line):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(dalle_ext, "build_info", lambda: {"cpu_isa": "v3"})
    with dalle_ext.use_reference():
        assert cli.main([*words, "--out", str(tmp_path / "new/samples")]) in (2, 3, 4)
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith(line)
    assert not (tmp_path / "new").exists()


def test_folders_that_were_there_or_hold_something_stay(tmp_path):
    (tmp_path / "old").mkdir()
    with pytest.raises(KeyboardInterrupt), folders_of_failure_removed():
        make_folder(tmp_path / "old", "sample")
        make_folder(tmp_path / "old/a/b", "sample")
        (make_folder(tmp_path / "full/a", "sample").parent / "0.png").touch()
        raise KeyboardInterrupt
    assert {*tmp_path.rglob("*")} == {tmp_path / n for n in ("old", "full", "full/0.png")}
    with folders_of_failure_removed():
        make_folder(tmp_path / "new", "sample")
    assert (tmp_path / "new").is_dir()
