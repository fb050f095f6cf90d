"""Training on tar shards: the losses of the plain folder, exact resume, damage that is counted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dalle.cli import main
from dalle.data.folder import FolderPairs
from dalle.data.mixture import MixedPairs
from dalle.data.pairs import input_files
from dalle.data.shards import ShardPairs
from dalle.data.split import hold_out
from dalle.dvae.model import DiscreteVAE
from dalle.errors import OtherTrainingError
from dalle.train.config import LoopConfig
from dalle.train.dvae import DvaeTask
from dalle.train.loop import train
from dalle.train.metrics import read_metrics
from support.dvae import PATCH, SHORT
from support.prior import SMALL, make_parts
from support.prior import make_task as prior_task
from support.shards import picture, tar_of, write_shards

COLOURS = ("red", "green", "blue")


def text(number):
    """One caption, or two lines of it for every third picture."""
    return COLOURS[number % 3] + ("\nred" if number % 3 == 2 else "")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DALLE_CACHE", str(tmp_path / "cache"))


def dvae_task(pairs, seed=0, **changes):
    torch.manual_seed(seed)
    return DvaeTask(DiscreteVAE(PATCH), pairs, replace(SHORT, **changes), seed=seed)


def losses(task, steps):
    return [float(task.train_step(step)["loss"]) for step in range(steps)]


@pytest.mark.parametrize("steps", [6, pytest.param(200, marks=pytest.mark.night)])
def test_losses_on_shards_are_those_of_the_folder_bit_for_bit(steps, tmp_path):
    plain = write_shards(tmp_path / "set", 3, 7, text=text)
    folder, shards = FolderPairs(plain), ShardPairs(tmp_path / "set")
    assert losses(dvae_task(folder), steps) == losses(dvae_task(shards), steps)
    parts = [hold_out(pairs, 0.2) for pairs in (folder, shards)]
    assert losses(dvae_task(parts[0][0]), 4) == losses(dvae_task(parts[1][0]), 4)
    tokenizer, vae, _ = make_parts()
    config = replace(SMALL, augment="paper")
    found = []
    for train_part, held in parts:
        task = prior_task((tokenizer, vae, train_part), config)
        task.validation = held
        found.append((losses(task, 4), task.evaluate(task.model.eval(), 4)))
    assert found[0] == found[1] and found[0][1]["loss"] > 0
    assert len(parts[1][0]) + len(parts[1][1]) == len(shards) and len(parts[1][1]) >= 2


@pytest.mark.parametrize("kind", ["shards", "mixture"])
def test_resume_in_the_middle_of_an_epoch_is_exact(kind, tmp_path):
    write_shards(tmp_path / "set", 2, 7)
    write_shards(tmp_path / "other", 1, 5)

    def task():
        pairs = ShardPairs(tmp_path / "set")
        if kind == "mixture":
            pairs = MixedPairs([pairs, ShardPairs(tmp_path / "other")], [0.7, 0.3])
        return dvae_task(pairs)

    def run(out, steps):
        train(task(), LoopConfig(out=tmp_path / out, steps=steps, picture_every=0, log_every=1))
        return [record["loss"] for record in read_metrics(tmp_path / out / "metrics.jsonl")]

    whole = run("whole", 9)
    run("cut", 5)  # 4 pictures an update, 14 an epoch
    assert run("cut", 9) == whole


def test_shards_that_were_added_or_changed_are_said(tmp_path, capsys):
    write_shards(tmp_path / "set", 2, 6)
    config = LoopConfig(out=tmp_path / "run", steps=2, picture_every=0)
    train(dvae_task(ShardPairs(tmp_path / "set")), config)
    write_shards(tmp_path / "more", 4, 5, text="new {}".format)
    for i in range(4):
        (tmp_path / "more" / f"0000{i}.tar").rename(tmp_path / "set" / f"1000{i}.tar")
    (tmp_path / "set" / "00000.tar").unlink()
    changed = tmp_path / "set" / "00001.tar"
    changed.write_bytes(changed.read_bytes().replace(b"picture 7", b"picture 9"))
    words = (
        "data since the checkpoint: 4 added (10000.tar, 10001.tar, 10002.tar and 1 more), "
        "1 removed (00000.tar), 1 changed (00001.tar)"
    )
    longer = replace(config, steps=4)
    with pytest.raises(OtherTrainingError) as refused:
        train(dvae_task(ShardPairs(tmp_path / "set")), longer)
    line = str(refused.value)
    assert "data.pairs must be 26 as in this run, got 12; " in line and words in line
    assert line.endswith("--accept-changes goes on with this run's") and "\n" not in line
    capsys.readouterr()
    result = train(dvae_task(ShardPairs(tmp_path / "set")), replace(longer, accept_changes=True))
    assert result.step == 4 and words in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_members_are_counted_exactly_and_the_training_ends(workers, tmp_path, capsys):
    entries = []
    for i in range(200):
        content = picture(i)
        if i % 100 == 7:
            content = content[:-30]  # does not decode: found when it is read
        entries += [(f"{i:04d}.png", content), (f"{i:04d}.txt", b"a picture")]
    tar = bytearray(tar_of(entries))
    for i in (50, 150):  # a header without its checksum: the member is not there
        place = bytes(tar).index(b"%04d.png" % i)
        tar[place + 150] ^= 1
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "0.tar").write_bytes(tar)
    pairs = ShardPairs(tmp_path / "set")
    found = {"damaged header in the tar": 2, "caption without picture": 2}
    assert len(pairs) == 198 and pairs.skipped == found
    torch.manual_seed(0)
    config = replace(SHORT, batch_size=66)
    task = DvaeTask(DiscreteVAE(PATCH), pairs, config, seed=0, workers=workers)
    result = train(task, LoopConfig(out=tmp_path / "run", steps=6, picture_every=0))
    assert result.step == 6
    assert pairs.skipped == found | {"does not decode": 2}
    said = capsys.readouterr().err
    assert said.count("left out: ") == 2 and "0.tar/0007.png: image must decode whole" in said


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("held_out", [False, True])
def test_a_shard_that_disappears_during_training(held_out, closed, tmp_path, capsys):
    write_shards(tmp_path / "set", 2, 10)
    pairs = ShardPairs(tmp_path / "set")
    trained = hold_out(hold_out(pairs, 0.2)[0], 0.2)[0] if held_out else pairs
    assert input_files(trained) == pairs.files
    task = dvae_task(trained)
    step = task.train_step

    def train_step(number):
        if number == 1:
            (tmp_path / "set" / "00001.tar").unlink()
            if closed:
                pairs._open.clear()  # as where more shards are read than are held open
        return step(number)

    task.train_step = train_step
    result = train(task, LoopConfig(out=tmp_path / "run", steps=6, picture_every=0))
    assert result.step == 6 and set(trained.skipped) == {"shard has gone"}
    assert capsys.readouterr().err.count("left out: ") == 1


def test_a_shard_that_disappears_after_its_pictures_were_encoded(tmp_path, capsys):
    """Its captions are read at each update: other pairs are drawn in the place of its own."""
    write_shards(tmp_path / "set", 2, 10, text=text)
    pairs = ShardPairs(tmp_path / "set")
    tokenizer, vae, _ = make_parts()
    task = prior_task((tokenizer, vae, pairs), SMALL)
    assert task.tokens is not None and len(task.usable) == 20
    before = task.batch(0)
    (tmp_path / "set" / "00001.tar").unlink()
    batch = task.batch(0)
    assert batch.text.shape == before.text.shape and bool((batch.text != -1).any(1).all())
    known = {tuple(row) for row in task.tokens[:10].tolist()}
    assert {tuple(row) for row in batch.tokens.tolist()} <= known
    assert task.batch(0).tokens.equal(batch.tokens)
    result = train(task, LoopConfig(out=tmp_path / "run", steps=6, picture_every=0))
    assert result.step == 6 and set(pairs.skipped) == {"shard has gone"}
    assert capsys.readouterr().err.count("left out: ") == 1


def test_commands_train_on_shards_and_hold_out_a_part(tmp_path, capsys):
    write_shards(tmp_path / "set", 2, 20, text=text)
    out = tmp_path / "run"
    words = ["dvae", "train", "--data", str(tmp_path / "set"), "--image-size", "16"]
    words += ["--batch-size", "4", "--vocab-size", "8", "--out", str(out)]
    words += ["--validation", "0.1", "--picture-every", "0"]
    assert main([*words, "--steps", "6", "--validate-every", "3"]) == 0, capsys.readouterr().err
    records = [r for r in read_metrics(out / "metrics.jsonl") if "val_loss" in r]
    assert [r["step"] for r in records] == [6]  # there are no codes before
    assert np.isfinite(records[0]["val_elb"])
    said = capsys.readouterr()
    assert " pairs of set and " in said.err and "data: indexed 2 shards of 40 pairs" in said.err
    words = ["dvae", "reconstruct", "--data", str(tmp_path / "set"), "--model", str(out / "model")]
    sheet = ["--out", str(tmp_path / "sheet.png"), "--image-size", "8", "--limit", "5"]
    assert main([*words, *sheet]) == 0  # of pictures that have another size
    assert capsys.readouterr().out.startswith("5 pictures: PSNR ")
    shard = tmp_path / "set" / "00000.tar"
    assert main([*words, "--out", str(shard)]) == 2 and shard.stat().st_size > 9000
