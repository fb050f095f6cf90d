"""What `--data` may be: several sources with weights, and which of a picture's captions count."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dalle.cli import main
from dalle.commands.prior import PriorCommandConfig
from dalle.config_files import write_resolved
from dalle.data import sources
from dalle.data.mixture import MixedPairs, with_choice
from dalle.data.pairs import ArrayPairs, Pairs, all_captions, captions_of, fingerprints
from dalle.data.shapes_pairs import ShapesPairs
from dalle.data.sources import is_picture_folder, load_pairs, split_specs
from dalle.data.split import hold_out
from dalle.errors import DataError, UsageError
from dalle.options import parse_options
from support.pictures import PNG
from support.shards import write_shards


def plain(folder, *captions):
    folder.mkdir()
    for i, caption in enumerate(captions):
        (folder / f"{i}.png").write_bytes(PNG)
        (folder / f"{i}.txt").write_text(caption)
    return folder


def test_a_source_is_one_line_of_the_registry():
    names = [source.name for source in sources.SOURCES]
    assert len(set(names)) == len(names) and {"shapes", "emoji"} <= set(names)
    assert {source.name for source in sources.SOURCES if source.held_out} == {"shapes", "emoji"}
    assert set(sources.BUILT_IN) == {"shapes", "emoji"}


def test_several_sources_with_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain(Path("a"), "one", "two")
    write_shards(Path("b"), 1, 3)
    plain(Path("c=0.5"), "a folder with a weight in its name")
    pairs = load_pairs("a=0.25\nb=0.75", image_size=8)
    assert isinstance(pairs, MixedPairs) and pairs.mixture() == ([2, 5], [0.25, 0.75])
    assert list(pairs.captions) == ["one", "two", "picture 0", "picture 1", "picture 2"]
    assert load_pairs("a\nb", image_size=8).mixture() is None
    assert split_specs("c=0.5") == [("c=0.5", None)]
    assert split_specs("c=0.5=2\na=1e-3") == [("c=0.5", 2.0), ("a", 1e-3)]
    assert split_specs("a=1") == [("a", 1.0)] and len(load_pairs("a=1", image_size=8)) == 2
    few = partial(ShapesPairs, image_size=24, size=3)
    monkeypatch.setitem(sources.BUILT_IN, "shapes", lambda size, split, seed: few(split))
    both = load_pairs("a=1\nshapes=1", image_size=24)
    assert both.image_size == 0 and len(both) == 5
    for spec, line in {
        "a=0.5\nb": "data: weights must be given for all or for none, got none for b",
        "a=0\nb=1": "data: weight must be positive and finite, got 0 for a",
        "a=-1\nb=1": "data: weight must be positive and finite, got -1 for a",
        "a=nan\nb=1": "data: weight must be positive and finite, got nan for a",
        "a=1\na=2": "data: sources must differ, got a twice",
        "a=1\n./a=2": "data: sources must differ, got a twice",
        "shapes=1\nshapes:train=2": "data: sources must differ, got shapes twice",
        "a=x\nb=1": "data: weight must be a number, got 'x' for a",
        "a=\nb=1": "data: weight must be a number, got '' for a",
        "shapes:test=many": "data: weight must be a number, got 'many' for shapes:test",
    }.items():
        with pytest.raises(UsageError, match=line):
            load_pairs(spec, image_size=8)
    for name in ("none.csv", "none.parquet", "none.tar"):
        assert not is_picture_folder(name)
        with pytest.raises(DataError, match=f"got '{name}' \\(no such file\\)"):
            load_pairs(name, image_size=0)
    with pytest.raises(DataError, match="got 'none' \\(no such folder\\)"):
        load_pairs("a=1\nnone=1", image_size=8)
    Path("x.xlsx").touch()
    with pytest.raises(DataError, match=r"\(a file; those that are taken are .csv, .*, .tar\)"):
        load_pairs("x.xlsx", image_size=8)
    every = [pairs, *pairs.items_of, with_choice(pairs, "join"), *hold_out(both, 0.3)]
    assert all(isinstance(one, Pairs) and set(fingerprints(one)) > {"captions"} for one in every)
    copy = pickle.loads(pickle.dumps(pairs))
    np.testing.assert_array_equal(copy.load(4), pairs.load(4))


def test_data_may_be_given_several_times(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plain(Path("a"), "red", "green")
    plain(Path("b"), "blue")
    words = ["--data", "a=0.7", "--tokenizer", "t", "--data=b=0.3", "--vae", "v"]
    config = parse_options(PriorCommandConfig, words, prog="dalle prior train")
    assert config.data == "a=0.7\nb=0.3" and config.captions == "draw"
    write_resolved(config, Path("config.yaml"))
    assert "data:\n- a=0.7\n- b=0.3\n" in Path("config.yaml").read_text()
    again = ["--config", "config.yaml"]
    assert parse_options(PriorCommandConfig, again, prog="p").data == config.data
    assert parse_options(PriorCommandConfig, [*again, "--data", "b"], prog="p").data == "b"
    some = parse_options(PriorCommandConfig, [*words, "--data", "c"], prog="p")
    assert some.data == "a=0.7\nb=0.3\nc"  # refused when it is opened
    none = parse_options(PriorCommandConfig, [*again, "--data", "a", "--data", "b"], prog="p")
    assert none.data == "b"
    assert main(["tokenizer", "train", "--data", "a=1", "--data", "b=2", "--out", "run/tok"]) == 0
    out = capsys.readouterr().out
    assert " from 3 different captions" in out
    assert "dalle dvae train --data a=1 --data b=2 --preset" in out
    assert main(["tokenizer", "train", "--data", "a=1", "--data"]) == 2
    assert main(["tokenizer", "train", "--data", "a=1", "--data="]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and err[1].endswith("--data must have a value, got an empty one")
    assert sources.data_here("a=1\nbuilt-in:shapes=2") == "a=1\nshapes=2"


def test_a_set_may_be_named_with_its_split(tmp_path, monkeypatch):
    """One rule for every command; of a training on another split, no split is held out."""
    monkeypatch.chdir(tmp_path)
    few = partial(ShapesPairs, image_size=24, size=3)
    monkeypatch.setitem(sources.BUILT_IN, "shapes", lambda size, split, seed: few(split, seed=seed))
    for spec, split in {
        "shapes": "train",
        "shapes:test": "test",
        "built-in:shapes:zero": "zero",
    }.items():
        pairs = load_pairs(spec, image_size=24, seed=3)
        assert pairs.name == f"shapes ({split})"
        assert fingerprints(pairs) == fingerprints(few(split, seed=3))
        assert not is_picture_folder(spec) and sources.has_built_in(spec)
        assert sources.absolute(spec) == spec
    assert load_pairs("shapes:test", image_size=24, split="train").name == "shapes (test)"
    both = load_pairs("shapes:test=0.5\nshapes=2", image_size=24)
    assert both.mixture() == ([3, 6], [0.5, 2.0]) and both.name == "shapes (test) + shapes (train)"
    assert split_specs("shapes:test=1") == [("shapes:test", 1.0)]
    assert sources.data_here("built-in:shapes:test=2\nshapes") == "shapes:test=2\nshapes"
    with pytest.raises(
        UsageError, match="shapes: split must be one of train, test, zero, got 'no'"
    ):
        load_pairs("shapes:no", image_size=24)
    with pytest.raises(DataError, match=r"got 'folder:test' \(no such folder\)"):
        load_pairs("folder:test", image_size=24)
    plain(Path("shapes:test"), "a folder of that name")
    assert load_pairs("shapes:test", image_size=24).captions[0] == "a folder of that name"
    assert sources.data_here("built-in:shapes:test") == "built-in:shapes:test"
    assert load_pairs("built-in:shapes:test", image_size=24).name == "shapes (test)"
    assert sources.absolute("shapes:test") == str(tmp_path / "shapes:test")
    (tmp_path / "loop").symlink_to("loop")  # opening it is refused later, in one line
    assert sources.absolute("loop") == str(tmp_path / "loop")
    sources.check_apart("dvae train", str(tmp_path), tmp_path / "loop")


def test_the_held_out_split_is_of_the_training_one():
    specs = ("shapes", "shapes:train", "shapes:test", "emoji", "emoji:heldout", "nowhere")
    held = [sources.held_out_split(spec) for spec in specs]
    assert held == ["test", "test", "", "heldout", "", ""]


def test_which_captions_count():
    images = np.zeros((3, 4, 4, 3), np.uint8)
    several = {0: ("a", "b"), 2: ("d", "e", "f")}
    pairs = ArrayPairs("toy", images, ["a", "c", "d"], None, several)
    first, joined = with_choice(pairs, "first"), with_choice(pairs, "join")
    assert with_choice(pairs, "draw") is pairs
    assert all_captions(first) == list(first.captions) == ["a", "c", "d"]
    assert all_captions(joined) == list(joined.captions) == ["a b", "c", "d e f"]
    assert captions_of(joined, 2) == ["d e f"] and joined.captions[-1] == "d e f"
    assert joined.name == "toy" and len(joined) == 3 and joined.skipped is pairs.skipped
    prints = [fingerprints(p) for p in (pairs, first, joined)]
    assert prints[0] != prints[1] != prints[2] and prints[0]["pictures"] == prints[2]["pictures"]
    assert pickle.loads(pickle.dumps(joined)).captions[0] == "a b"


def test_what_is_taken_of_several_captions_is_said(tmp_path, capsys):
    plain(tmp_path / "a", "one\ntwo", "three")
    for choice, words in sources.TAKEN.items():
        pairs = load_pairs(str(tmp_path / "a"), image_size=8, captions=choice)
        assert capsys.readouterr().err.endswith(f"3 captions in all; {words}\n")
        assert len(all_captions(pairs)) == (3 if choice == "draw" else 2)
