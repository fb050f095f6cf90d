"""Pairs, loading by name, skipping, and the order of batches (R23)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle.cli import main
from dalle.commands import dvae, prior, ranker, tokenizer
from dalle.data import sources
from dalle.data.augment import dvae_crop
from dalle.data.pairs import ArrayPairs, BatchSampler, Pairs, left_out, load_or_draw, load_or_skip
from dalle.data.sources import load_pairs
from dalle.demo.config import TrainConfig
from dalle.errors import DataError, UsageError

ROOT = Path(__file__).resolve().parents[2]
TAKE_DATA = (
    TrainConfig,
    dvae.DvaeCommandConfig,
    dvae.ReconstructConfig,
    prior.PriorCommandConfig,
    ranker.RankerCommandConfig,
    tokenizer.TokenizerTrainConfig,
)


@pytest.mark.parametrize(
    ("items", "batch"), [(1, 1), (10, 5), (10, 3), (7, 7), (7, 20), (101, 16), (64, 64), (5, 13)]
)
def test_each_item_once_an_epoch(items, batch):
    sampler = BatchSampler(items, batch, seed=3)
    epochs = 4
    stream = np.concatenate([sampler.indices(s) for s in range(-(-epochs * items // batch))])
    for epoch in range(epochs):
        part = stream[epoch * items : (epoch + 1) * items]
        assert Counter(part.tolist()) == Counter(range(items))


def test_batches_are_a_pure_function_of_seed_and_step():
    forward = BatchSampler(23, 5, seed=1)
    expected = [forward.indices(step) for step in range(40)]
    jumping = BatchSampler(23, 5, seed=1)
    for step in (39, 0, 17, 4, 38, 17):
        got = jumping.indices(step)
        assert got.dtype == np.int64 and got.shape == (5,)
        assert (got == expected[step]).all()


def test_epochs_and_seeds_differ():
    sampler = BatchSampler(1000, 1000, seed=0)
    assert (sampler.indices(0) != sampler.indices(1)).any()
    assert (sampler.indices(0) != BatchSampler(1000, 1000, seed=1).indices(0)).any()


def test_a_far_step_costs_one_epoch_only():
    sampler = BatchSampler(1000, 32, seed=0)
    assert len(sampler.indices(10**12)) == 32
    assert len(sampler._orders) <= 2


@pytest.mark.parametrize(("items", "batch"), [(0, 1), (1, 0), (-3, 2)])
def test_sampler_refuses_sizes(items, batch):
    with pytest.raises(UsageError, match="must be at least 1, got"):
        BatchSampler(items, batch, 0)
    with pytest.raises(UsageError, match="step must be at least 0, got -1"):
        BatchSampler(2, 2, 0).indices(-1)


def test_array_pairs_hold_what_they_got():
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    pairs = ArrayPairs("toy", images, ["a", "b", "c"], Counter({"no picture": 2}))
    assert isinstance(pairs, Pairs)
    assert (len(pairs), pairs.image_size, pairs.captions[1]) == (3, 8, "b")
    assert (pairs.load(2) == images[2]).all()
    assert pairs.skipped == {"no picture": 2}


def test_array_pairs_refuse_what_does_not_fit():
    images = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(DataError, match="captions must be 2 strings, got 1"):
        ArrayPairs("toy", images, ["a"])
    for bad in (images.astype(np.float32), images[:, :4], images[0]):
        with pytest.raises(DataError, match=r"images must be \(N, S, S, 3\) uint8"):
            ArrayPairs("toy", bad, ["a", "b"])


def test_load_pairs_refuses_unknown_sets():
    names = ", ".join(sources.BUILT_IN)
    with pytest.raises(DataError, match=f"spec must be one of {names} or a folder"):
        load_pairs("/nowhere/at/all", image_size=32)
    with pytest.raises(UsageError, match="split must be one of train, test, zero, got 'dev'"):
        load_pairs("shapes", image_size=32, split="dev")
    with pytest.raises(UsageError, match="split must be one of train, heldout, got 'zero'"):
        load_pairs("emoji", image_size=32, split="zero")


def toy_pairs(name="toy"):
    images = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    return ArrayPairs(name, images, list("abcd"))


def test_a_built_in_set_is_one_entry(monkeypatch):
    def opens(image_size, split, seed):
        assert (image_size, split, seed) == (8, "train", 3)
        return toy_pairs()

    monkeypatch.setitem(sources.BUILT_IN, "toy", opens)
    assert load_pairs("toy", image_size=8, seed=3).captions == list("abcd")
    with pytest.raises(DataError, match="spec must be one of .*, toy or a folder"):
        load_pairs("/nowhere/at/all", image_size=32)


def test_a_folder_format_is_one_entry(monkeypatch, tmp_path, capsys):
    """Commands that read plain pictures ask the set for them where the folder has a format."""
    picture = tmp_path / "0.png"

    def opens(path):
        pairs = toy_pairs(path.name)
        pairs.paths = [picture]
        pairs.skipped["no caption"] = 2
        return pairs

    form = (lambda path: (path / "toy.index").is_file(), opens)
    monkeypatch.setattr(sources, "FOLDER_FORMATS", (form, *sources.FOLDER_FORMATS))
    assert sources.is_picture_folder(str(tmp_path))
    (tmp_path / "toy.index").touch()
    assert load_pairs(str(tmp_path), image_size=8).name == tmp_path.name
    with pytest.raises(UsageError, match="split of a folder must be 'train', got 'test'"):
        load_pairs(str(tmp_path), image_size=8, split="test")
    config = dvae.ReconstructConfig(data=str(tmp_path))
    assert dvae.load_pictures(config, 8).shape == (4, 3, 8, 8)
    said = f"data: 4 pairs in {tmp_path.name}, left out 2: 2 x no caption\n"
    assert capsys.readouterr().err == 2 * said
    picture.touch()
    with pytest.raises(UsageError, match=f"dvae reconstruct: .*{picture}"):
        dvae.load_pictures(dvae.ReconstructConfig(data=str(tmp_path), out=picture), 8)


@pytest.mark.parametrize("name", sources.BUILT_IN)
def test_every_built_in_set_is_described(name):
    """By a section of the data card, and by the help of each command that takes `--data`."""
    with pytest.raises(UsageError, match=f"{name}: split must be one of .*, got 'no such'"):
        load_pairs(name, image_size=24, split="no such")
    assert f"\n## {name}\n" in (ROOT / "docs/data_card.md").read_text()
    for config in TAKE_DATA:
        data = (config.__doc__ or "").split(" data: ")[1].split("\n")[0]
        assert name in data, config.__name__


class Spoiled(ArrayPairs):
    """Pictures of odd index do not decode."""

    def load(self, i):
        if i % 2:
            raise DataError(f"{i}: image must decode")
        return super().load(i)


def test_bad_pictures_are_skipped_counted_and_named(capsys):
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    pairs = Spoiled("toy", images, list("abcdef"))
    loaded, kept = load_or_skip(
        pairs, np.array([0, 1, 4, 3, 1]), lambda image, place: image + place
    )
    assert kept == [0, 2]
    assert [int(image[0, 0, 0]) for image in loaded] == [0, 6]
    assert pairs.skipped == {"does not decode": 2}  # each once
    assert left_out(pairs) == "; left out: 2 x does not decode"
    said = capsys.readouterr().err.splitlines()
    assert said == [f"toy: left out: picture {i}: {i}: image must decode" for i in (1, 3)]
    with pytest.raises(DataError, match="hold a picture that can be used, got picture 3: "):
        load_or_skip(pairs, [1, 3])
    assert load_or_skip(pairs, [1, 3], require_any=False) == ([], [])
    assert load_or_skip(pairs, range(6), limit=2)[1] == [0, 2]


def test_only_some_of_many_are_named(capsys):
    pairs = Spoiled("toy", np.zeros((60, 8, 8, 3), np.uint8), ["x"] * 60)
    load_or_skip(pairs, range(60))
    said = capsys.readouterr().err.splitlines()
    assert pairs.skipped == {"does not decode": 30} and len(said) == 10
    assert said[-1].endswith("; further ones are counted, not named")


def test_what_a_transform_refuses_is_left_out_as_what_does_not_decode(capsys):
    sides = [40, 20, 40, 40]

    class Mixed(ArrayPairs):
        def load(self, i):
            return super().load(i)[: sides[i]]

    pairs = Mixed("toy", np.zeros((4, 40, 40, 3), np.uint8), list("abcd"))

    def crop(image, place):
        return dvae_crop(image, 32, np.random.default_rng(place))

    assert load_or_skip(pairs, range(4), crop)[1] == [0, 2, 3]
    images, items = load_or_draw(pairs, [0, 1, 2, 3] * 5, lambda place: place, crop)
    assert len(images) == 20 and 1 not in items
    assert {image.shape for image in images} == {(32, 32, 3)}
    assert pairs.skipped == {"smaller than the crop": 1}
    line = "toy: left out: picture 1: dvae_crop: image must have sides of at least 32, got 20 x 40"
    assert capsys.readouterr().err.splitlines() == [line]
    with pytest.raises(UsageError, match="size must be at least 1"):  # no fault of a picture
        load_or_draw(pairs, [0], lambda place: place, lambda image, _: dvae_crop(image, 0, None))


def test_a_folder_here_with_the_name_of_a_set(tmp_path, monkeypatch, capsys):
    """Is the folder, which is said with what gives the set; elsewhere the name is the set."""
    monkeypatch.chdir(tmp_path)
    assert [sources.data_here(spec) for spec in ("shapes", "built-in:shapes")] == ["shapes"] * 2
    Path("emoji").touch()
    assert sources.data_here("emoji") == "emoji"
    assert capsys.readouterr().err == ""
    Path("shapes").mkdir()
    Image.new("RGB", (8, 8)).save("shapes/0.png")
    Path("shapes/0.txt").write_text("mine")
    words = ["tokenizer", "train", "--out", "tok", "--data"]
    assert main([*words, "shapes"]) == 0
    captured = capsys.readouterr()
    assert captured.err == (
        "data: shapes is the folder ./shapes, since it is here; "
        "for the built-in set: --data built-in:shapes\n"
    )
    assert " from 1 different captions" in captured.out
    assert main([*words, "./shapes"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and " from 1 different captions" in captured.out
    assert sources.data_here("built-in:shapes") == "shapes" and capsys.readouterr().err == ""
    assert sources.data_here("shapes", folders=False) == "shapes"  # `dalle demo`
    assert "for the folder: dalle train --data ./shapes" in capsys.readouterr().err
