"""Training on imperfect folders: small and broken pictures, several captions, too few pictures."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dalle.cli import main
from dalle.data.folder import FolderPairs
from dalle.dvae.codebook import init_codebook
from dalle.dvae.model import DiscreteVAE
from dalle.errors import DataError, UsageError
from dalle.tokenizer import Tokenizer
from dalle.train import read_captions
from dalle.train.dvae import DvaeTask
from support.dvae import PATCH, SHORT, WARM, some_pairs
from support.prior import SMALL as PRIOR
from support.prior import make_parts
from support.prior import make_task as prior_task
from support.ranker import SMALL as RANKER
from support.ranker import toy_task

SMALL = "smaller than the crop"


def make_folder(folder, count=10, side=16, small=(3,), broken=(5,), captions=("red", "blue")):
    """Flat pictures; `small` are of 6 pixels, `broken` end early."""
    for i in range(count):
        shape = (6 if i in small else side, side, 3)
        image = Image.fromarray(np.full(shape, (20 * i, 90, 200 - 20 * i), np.uint8))
        image.save(folder / f"{i}.png")
        if i in broken:
            content = (folder / f"{i}.png").read_bytes()
            (folder / f"{i}.png").write_bytes(content[:45])
        (folder / f"{i}.txt").write_text(captions[i % len(captions)])
    return FolderPairs(folder)


def test_the_dvae_leaves_out_what_is_too_small(tmp_path, capsys):
    pairs = make_folder(tmp_path)
    torch.manual_seed(0)
    task = DvaeTask(DiscreteVAE(PATCH), pairs, replace(SHORT, image_size=8, batch_size=5), seed=0)
    for step in range(6):
        assert float(task.train_step(step)["images"]) == 5
    assert pairs.skipped == {SMALL: 1, "does not decode": 1}
    said = capsys.readouterr().err
    assert f"left out: {tmp_path}/3.png: dvae_crop: image must have sides of at least 8" in said
    assert f"left out: {tmp_path}/5.png: image must decode whole" in said and said.count("\n") == 2


def test_the_prior_leaves_out_what_is_too_small_and_draws_captions(tmp_path):
    lines = "red\ngreen\nblue"
    pairs = make_folder(tmp_path, captions=(lines, "red"))
    tokenizer, vae, _ = make_parts()
    config = replace(PRIOR, augment="paper", batch_size=6)
    task = prior_task((tokenizer, vae, pairs), config)
    drawn = Counter()
    for step in range(12):
        text = task.batch(step).text
        drawn += Counter(tokenizer.decode(row) for row in text)
        assert torch.equal(text, task.batch(step).text)  # a function of seed and step
    assert pairs.skipped == {SMALL: 1, "does not decode": 1}
    assert sum(drawn.values()) == 72 and min(drawn[c] for c in ("red", "green", "blue")) > 5
    task.train_step(0)
    once = prior_task((tokenizer, vae, pairs), PRIOR)  # encoded once, of any size
    assert once.usable.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert {tokenizer.decode(row) for row in once.batch(0).text} > {"red"}


def test_the_ranker_keeps_its_batches_and_draws_captions(tmp_path, monkeypatch):
    pairs = make_folder(tmp_path, captions=("red\ngreen\nblue", "pink"))
    task = toy_task(replace(RANKER, batch_size=8, num_spliced=2), pairs=pairs)
    known = ["red", "pink", "green", "blue"]
    drawn = Counter()
    for step in range(8):
        items, images, _ = task.views(step)
        rows = task.caption_rows(items, step)
        captions = [task.ranker.tokenizer.decode(task.text[row]) for row in rows]
        for item, caption in zip(items.tolist(), captions, strict=True):
            assert (caption == "pink") == (item % 2 == 1)
        drawn += Counter(captions)
        assert len(items) == len(images) == 8 and 5 not in items
    assert set(drawn) == set(known) and pairs.skipped == {"does not decode": 1}
    assert float(task.train_step(0)["images"]) == 8
    monkeypatch.setattr(read_captions, "MAX_KEPT", 0)
    read = toy_task(replace(RANKER, batch_size=8, num_spliced=2), pairs=pairs)
    for step in range(4):
        rows = read.views(step)[0]
        assert torch.equal(read._text_of(rows, step)[0], task._text_of(rows, step)[0])


def test_too_few_pictures_for_the_codebook_are_said_before_the_training(tmp_path):
    pairs = make_folder(tmp_path, count=4, side=8, small=(), broken=(1,))
    model = replace(PATCH, vocab_size=14)  # 4 points a picture
    torch.manual_seed(0)
    line = r"must hold at least 4 pictures .* of 14 codes \(4 points a picture\), got 3"
    with pytest.raises(DataError, match=line):
        DvaeTask(DiscreteVAE(model), pairs, WARM)
    DvaeTask(DiscreteVAE(replace(PATCH, vocab_size=12)), pairs, WARM)
    for field, value, least in (("codebook_images", 3, 4), ("codebook_points", 15, 16)):
        config = replace(WARM, **{field: value})
        with pytest.raises(UsageError, match=f"{field} must be at least {least} for 16 codes"):
            DvaeTask(DiscreteVAE(PATCH), some_pairs(), config)


def test_too_few_different_features_leave_finite_logits(capsys):
    torch.manual_seed(0)
    vae, flat = DiscreteVAE(PATCH), torch.full((4, 3, 8, 8), 0.3)
    init_codebook(vae, flat, sharpness=4.0, iterations=3, max_points=99, seed=0)
    with torch.no_grad():
        assert vae.logits(flat).abs().max() < 1e6
    pairs = some_pairs(6)
    pairs.images[:] = 77
    task = DvaeTask(DiscreteVAE(PATCH), pairs, replace(WARM, warm_start_steps=1), seed=0)
    losses = [float(task.train_step(step)["loss"]) for step in range(4)]
    assert np.isfinite(losses).all()
    said = re.search(r"dvae train: only (\d+) of the 16 codes differ", capsys.readouterr().err)
    assert said and int(said[1]) < 16


def test_check_says_what_training_would_leave_out_or_cut(tmp_path, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    make_folder(folder, captions=("red green\nblue", "pink " * 9))
    Tokenizer.train(["red green blue pink"], vocab_size=256).save_pretrained(tmp_path / "tok")
    words = ["data", "check", "--folder", str(folder), "--image-size", "16"]
    assert main([*words, "--tokenizer", str(tmp_path / "tok")]) == 0
    shown = capsys.readouterr().out
    for line in (
        "9 pairs", "left out: 1\n  1 x does not decode\n",
        "files of several captions: 5, 14 captions", f"  {folder}/3.png: 16 x 6\n",
        "smaller than 16 pixels: 1 of 9 pictures (`dalle dvae train`",
        "cut at 15 tokens (presets tiny): 4 of 14 captions, 4 with the BPE dropout",
        "cut at 63 tokens (presets small): 0 of 14 captions, 0 with",
    ):  # fmt: skip
        assert line in shown, (line, shown)
    assert main([*words, "--tokenizer", str(tmp_path / "tok"), "--text-len", "5"]) == 0
    assert "cut at 4 tokens (this prior): 9 of 14 captions" in capsys.readouterr().out
    assert main([*words, "--show", "-1"]) == 2
    assert main([*words, "--tokenizer", str(folder)]) == 3
