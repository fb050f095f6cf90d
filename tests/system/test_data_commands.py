"""`dalle data make-shapes`, `dalle data check`, `dalle tokenizer train` on the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from dalle.cli import main
from dalle.data.folder import FolderPairs
from dalle.data.shapes import captions, parse
from dalle.data.shapes_check import check_batch
from dalle.data.shapes_pairs import ShapesPairs
from dalle.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "shapes"
    assert main(["data", "make-shapes", "--out", str(out), "--count", "30", "--split", "zero"]) == 0
    return out


def test_make_shapes_writes_pairs_with_facts(made):
    pairs = FolderPairs(made / "pairs", verify="full")
    assert len(pairs) == 30 and not pairs.skipped
    assert set(pairs.captions) <= set(captions("zero"))
    facts = json.loads((made / "facts.json").read_text())
    assert [facts[f"{i:06d}"]["caption"] for i in range(30)] == list(pairs.captions)
    images = np.stack([pairs.load(i) for i in range(30)])
    assert all(r.all_right for r in check_batch(images, [parse(c) for c in pairs.captions]))
    with Image.open(made / "contact.png") as sheet:
        assert sheet.width > 8 * 96


def test_make_shapes_overwrites_nothing(made, capsys):
    before = sorted(made.rglob("*"))
    assert main(["data", "make-shapes", "--out", str(made), "--count", "5"]) == 2
    assert "must be empty or new, got files in it" in capsys.readouterr().err
    assert sorted(made.rglob("*")) == before


def test_make_shapes_that_was_stopped_leaves_nothing_and_runs_again(tmp_path, monkeypatch, capsys):
    words, load = ["data", "make-shapes", "--out", str(tmp_path / "x"), "--count", "5"], []

    def stop(pairs, i):
        load.append(i)
        if i == 3:
            raise KeyboardInterrupt
        return drawn(pairs, i)

    drawn = ShapesPairs.load
    monkeypatch.setattr(ShapesPairs, "load", stop)
    assert main(words) == 130 and list((tmp_path / "x").iterdir()) == [] and len(load) == 4
    monkeypatch.setattr(ShapesPairs, "load", drawn)
    assert main(words) == 0 and len(list((tmp_path / "x/pairs").iterdir())) == 10
    (tmp_path / "y/facts.json").mkdir(parents=True)
    capsys.readouterr()
    assert main([*words[:3], str(tmp_path / "y"), *words[4:]]) == 4
    assert capsys.readouterr().err.startswith("data make-shapes: ")


def test_make_shapes_refuses(tmp_path, capsys):
    assert main(["data", "make-shapes", "--out", str(tmp_path / "x"), "--count", "0"]) == 2
    assert capsys.readouterr().err == "data make-shapes: count must be at least 1, got 0\n"
    (tmp_path / "file").write_text("")
    assert main(["data", "make-shapes", "--out", str(tmp_path / "file"), "--count", "1"]) == 4
    assert "must be writable" in capsys.readouterr().err


def test_check_reports_what_is_left_out(made, tmp_path, capsys):
    (made / "pairs" / "broken.jpg").write_bytes(b"no picture")
    (made / "pairs" / "broken.txt").write_text("a caption")
    contact = tmp_path / "contact.png"
    arguments = ["data", "check", "--folder", str(made / "pairs"), "--contact", str(contact)]
    try:
        assert main(arguments) == 0
    finally:
        (made / "pairs" / "broken.jpg").unlink()
        (made / "pairs" / "broken.txt").unlink()
    shown = capsys.readouterr().out
    for line in ("30 pairs", "PNG 30", "width: 24 to 24", "left out: 1", "1 x not a picture"):
        assert line in shown, shown
    assert contact.exists()


def test_check_of_an_empty_folder(tmp_path, capsys):
    assert main(["data", "check", "--folder", str(tmp_path)]) == 3
    assert capsys.readouterr().err.count("\n") == 1


def test_tokenizer_train(made, tmp_path, capsys):
    data, out = str(made / "pairs"), tmp_path / "tok"
    assert main(["tokenizer", "train", "--data", data, "--out", str(out)]) == 0
    assert "different captions" in capsys.readouterr().out
    tokenizer = Tokenizer.from_pretrained(out)
    caption = FolderPairs(made / "pairs").captions[0]
    assert tokenizer.decode(tokenizer.encode([caption], 16)[0]) == caption


def test_tokenizer_train_refuses(made, tmp_path, capsys):
    data = str(made / "pairs")
    words = ["tokenizer", "train", "--data", data, "--out", str(tmp_path), "--vocab-size", "9"]
    assert main(words) == 2
    (tmp_path / "file").write_text("")
    assert main(["tokenizer", "train", "--data", data, "--out", str(tmp_path / "file")]) == 4
    assert main(["tokenizer", "train", "--data", "nowhere", "--out", str(tmp_path)]) == 3
    assert capsys.readouterr().err.count("\n") == 3
