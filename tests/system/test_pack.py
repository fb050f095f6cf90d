"""`dalle data pack`: shards that train as the set they came from, whole after any stop."""

from __future__ import annotations

import os
import shlex
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dalle.commands import data_pack
from dalle.commands.data_pack import PackConfig, pack
from dalle.data.folder import FolderPairs
from dalle.data.pairs import captions_of
from dalle.data.shards import ShardPairs
from dalle.data.split import hold_out
from dalle.errors import EnvironmentProblem, UsageError
from dalle.train.config import LoopConfig
from dalle.train.loop import train
from dalle.train.metrics import read_metrics
from dalle.train.prior import PriorTask
from support.prior import SMALL, make_parts, make_task


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Thirteen pictures in three formats, one broken, one with two captions."""
    home = tmp_path_factory.mktemp("home")
    (home / "pairs").mkdir()
    for i in range(13):
        rng = np.random.default_rng(i)
        picture = Image.fromarray(rng.integers(0, 255, (9 + i % 3, 12, 3), np.uint8))
        path = home / f"pairs/{i:02d}.{('jpg', 'png', 'webp')[i % 3]}"
        picture.save(path)
        if i == 7:
            path.write_bytes(path.read_bytes()[:90])
        path.with_suffix(".txt").write_text("red" + "\ngrün" * (i == 2), encoding="utf-8")
    pack(options(home))
    return home


def options(home, **changes):
    folders = {"data": str(home / "pairs"), "out": home / "packed"}
    return PackConfig(**(folders | {"shard_size": 5} | changes))


@pytest.mark.parametrize("weights", [("", ""), ("=0.5", "=2")])
def test_a_copy_of_sources_with_weights_says_that_it_has_none(weights, home, tmp_path, capsys):
    both = f"{home / 'pairs'}{weights[0]}\n{home / 'packed'}{weights[1]}"
    pack(options(home, data=both, out=tmp_path / "both"))
    assert len(ShardPairs(tmp_path / "both")) == 26
    said = (
        "data pack: note: weights are of trainings and are not written" in capsys.readouterr().err
    )
    assert said == bool(weights[0])


def files(folder):
    """Everything in a folder but the indexes, which hold times."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".index"}


def test_pictures_captions_and_order_are_those_of_the_folder(home):
    folder, packed = FolderPairs(home / "pairs"), ShardPairs(home / "packed")
    assert len(packed) == len(folder) == 13
    for i in range(13):
        assert list(captions_of(packed, i)) == list(captions_of(folder, i))
        assert packed.read_bytes(i)[0] == folder.paths[i].read_bytes()
    assert list(packed.digests()) == list(folder.digests())  # so dedup finds copies among both
    one, other = (hold_out(pairs, 0.2)[1].items for pairs in (folder, packed))
    assert list(one) == list(other)


def test_the_loss_curve_is_that_of_the_folder_bit_for_bit(home, tmp_path):
    curves = []
    for pairs in (FolderPairs(home / "pairs"), ShardPairs(home / "packed")):
        parts = make_parts()
        model = make_task(parts).model
        config = replace(SMALL, augment="paper", bpe_dropout=0.1)
        task = PriorTask(model, parts[0], parts[1], pairs, config)
        out = tmp_path / pairs.name
        train(task, LoopConfig(out=out, steps=5, log_every=1, picture_every=0))
        curves.append([record["loss"] for record in read_metrics(out / "metrics.jsonl")])
        assert set(pairs.left_out) == {7}
    assert curves[0] == curves[1] and len(curves[0]) == 5


def test_the_same_bytes_again_also_after_a_stop(home, tmp_path, monkeypatch):
    out, whole = tmp_path / "packed", files(home / "packed")
    add, calls = data_pack._add, []

    def stop(tar, pairs, item, verify):
        calls.append(item)
        if item == 6 and len(calls) < 9:
            raise KeyboardInterrupt
        add(tar, pairs, item, verify)

    monkeypatch.setattr(data_pack, "_add", stop)
    with pytest.raises(KeyboardInterrupt, match="^data pack: stopped .* the same command goes"):
        pack(options(home, out=out))
    assert sorted(files(out)) == ["00000.json", "00000.tar", "pack.json"]
    (left := out / "00001.tar.tmp-0123abcd").write_bytes(b"of a process that was killed")
    os.utime(left, (0, 0))
    (busy := out / "00002.tar.tmp-0123abcd").write_bytes(b"of another that is at work")
    pack(options(home, out=out))
    assert busy.exists() and not left.exists()
    busy.unlink()
    assert calls.count(0) == 1 and files(out) == whole
    os.truncate(out / "00000.tar", 512)
    (out / "00002.tar").unlink()
    pack(options(home, out=out))  # both are made anew
    assert calls.count(6) == 2 and files(out) == whole
    pack(options(home, out=out))  # nothing left to do
    assert files(out) == whole
    with pytest.raises(UsageError, match="^data pack: out must hold shards of this data and these"):
        pack(options(home, out=out, shard_size=6))
    with pytest.raises(UsageError, match="^data pack: out must be a new or empty folder, got "):
        pack(options(home, out=home / "pairs"))


def test_a_full_disk_gives_one_line_and_the_command_goes_on(home, tmp_path, monkeypatch):
    out, add = tmp_path / "packed", data_pack._add

    def full(tar, pairs, item, verify):
        if item == 6:
            raise OSError(28, "No space left on device")
        add(tar, pairs, item, verify)

    monkeypatch.setattr(data_pack, "_add", full)
    with pytest.raises(EnvironmentProblem, match="No space left on device") as caught:
        pack(options(home, out=out))
    assert str(caught.value).startswith("data pack: ") and "\n" not in str(caught.value)
    monkeypatch.setattr(data_pack, "_add", add)
    pack(options(home, out=out))
    assert files(out) == files(home / "packed")


def test_the_next_command_takes_a_path_with_spaces(home, tmp_path, capsys):
    out = tmp_path / "my shards"
    pack(options(home, out=out))
    words = shlex.split(capsys.readouterr().out.split(": next: ")[1])
    assert words == ["dalle", "data", "stats", "--data", str(out), "--out", f"{out}-stats"]


def test_verify_leaves_out_what_does_not_decode(home, tmp_path, capsys):
    pack(options(home, out=tmp_path / "packed", verify="full"))
    assert len(ShardPairs(tmp_path / "packed")) == 12
    assert "12 pairs in 3 shards of " in (text := capsys.readouterr().out)
    assert "; left out 1: 1 x " in text


def test_built_in_sets_and_shards_are_packed_too(home, tmp_path):
    pack(PackConfig(data=str(home / "packed"), out=tmp_path / "again", shard_size=100))
    assert len(ShardPairs(tmp_path / "again")) == 13
    with tarfile.open(tmp_path / "again/00000.tar") as tar:
        info = tar.getmembers()[0]
        assert (info.mtime, info.uid, info.name) == (0, 0, "000000000.jpg")


@pytest.mark.parametrize("name", ["shard_size", "image_size", "seed"])
def test_options_out_of_range(home, name):
    with pytest.raises(UsageError, match=f"^data pack: {name} must be at least "):
        options(home, **{name: -1})
