"""Scores on the held-out part, and which weights are saved by them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import dalle_ext
from dalle.data.augment import center_crop, load_cropped, to_tensor
from dalle.data.pairs import evenly_spaced
from dalle.data.split import hold_out
from dalle.dvae.model import DiscreteVAE
from dalle.errors import DataError, UsageError
from dalle.pretrained import fingerprint
from dalle.train.config import LoopConfig
from dalle.train.held_out import held_out_scores, save_better
from dalle.train.loop import train
from dalle.train.metrics import read_metrics
from support.dvae import WARM, make_task, some_pairs
from support.prior import make_task as make_prior_task
from support.ranker import SMALL, toy_pairs, toy_task
from support.tiny_task import TinyTask


def test_pictures_that_are_scored_are_evenly_spaced_and_usable():
    assert evenly_spaced(5, 3).tolist() == [0, 2, 4] and evenly_spaced(2, 9).tolist() == [0, 1]
    pairs = some_pairs(6, 12)
    load = pairs.load

    def broken(item):
        if item == 5:
            raise DataError("5.png: does not decode")
        return load(item)

    pairs.load = broken
    crops, items = load_cropped(pairs, [5, 1], 12)
    assert items == [1] and len(crops) == 1 and (crops[0] == load(1)).all()
    with pytest.raises(DataError, match="must hold a picture that can be used"):
        load_cropped(pairs, [5], 12)


def test_scores_of_the_dvae_are_those_of_its_reconstructions_of_held_out_pictures():
    task = make_task(WARM)
    task.validation = some_pairs(9, 9, seed=7)
    assert held_out_scores(task, WARM.warm_start_steps) == {}  # no codes yet
    scores = held_out_scores(task, WARM.warm_start_steps + 1)
    images = to_tensor([center_crop(task.validation.load(i), 8) for i in range(9)])
    vae = task.model.eval()
    error = (vae.decode(vae.encode(images)).clamp(0, 1) - images).square().mean()
    assert scores["loss"] == pytest.approx(float(error), rel=1e-5)
    assert scores["psnr"] == pytest.approx(-10 * math.log10(float(error)), rel=1e-5)
    assert scores["codes_used"] == len(vae.encode(images).unique())
    logits = vae.logits(images).double()
    q = logits.softmax(1)
    kl = (q * (logits.log_softmax(1) + math.log(vae.num_tokens))).sum((1, 2, 3))
    tokens = dalle_ext.gumbel_softmax(logits.float(), 1.0, dim=1, seed=0).index
    one_hot = F.one_hot(tokens, vae.num_tokens).permute(0, 3, 1, 2).float()
    nll = [vae.likelihood(images[i : i + 1], vae.decoder(one_hot[i : i + 1]))[1] for i in range(9)]
    bound = -torch.stack(nll).double() * 3 * 8 * 8 - kl
    assert scores["elb"] == pytest.approx(float(bound.mean().detach()), rel=1e-5)
    assert held_out_scores(task, WARM.warm_start_steps + 1) == scores  # draws nothing new


def test_scores_of_the_prior_are_its_losses_and_leave_the_training_as_it_was(parts):
    tokenizer, vae, pairs = parts
    task = make_prior_task(parts)
    assert held_out_scores(task, 0) == {}
    task.validation = hold_out(pairs, 0.3)[1]
    state = torch.get_rng_state()
    scores = held_out_scores(task, 0)
    assert torch.equal(state, torch.get_rng_state()) and task.model.training
    text, tokens, _ = task._held_out
    with torch.no_grad():
        output = task.model.eval()(text, tokens)
    assert scores["text_loss"] == pytest.approx(float(output.text_loss), rel=1e-5)
    assert scores["image_loss"] == pytest.approx(float(output.image_loss), rel=1e-5)
    expected = (output.text_loss + 7 * output.image_loss) / 8
    assert scores["loss"] == pytest.approx(float(expected), rel=1e-5)
    images = to_tensor([center_crop(task.validation.load(i), 8) for i in range(len(text))])
    maps = vae.decoder(F.one_hot(tokens.view(-1, 4, 4), 32).permute(0, 3, 1, 2).float())
    likelihood = -float(vae.likelihood(images, maps)[1].detach()) * 3 * 8 * 8
    written = task._text_targets(text) / len(text)
    prior = float(output.text_loss) * written + float(output.image_loss) * 16
    assert scores["elb"] == pytest.approx(likelihood - prior, rel=1e-4)


def test_the_loop_writes_the_scores_and_the_ranker_finds_captions_again(tmp_path):
    task = toy_task(SMALL)
    task.validation = toy_pairs(count=24, seed=5)
    train(task, LoopConfig(out=tmp_path, steps=40, validate_every=20, log_every=30))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if "val_accuracy" in r] == [20, 40]
    assert records[-1]["val_accuracy"] > 0.8 and records[-1]["val_choices"] == 24


@pytest.mark.parametrize("better", ["averaged", "last"])
def test_the_better_weights_are_the_model_and_the_others_are_kept(better, tmp_path, capsys):
    task = make_task(WARM)
    task.validation = some_pairs(4)
    for parameter in task.model.parameters():
        parameter.data.add_(0.01)
    weights = {"last": fingerprint(task.model)}
    with task.average.applied():
        weights["averaged"] = fingerprint(task.model)
    other = "last" if better == "averaged" else "averaged"

    def evaluate(model, step):
        return {"loss": 0.1 if fingerprint(model) == weights[better] else 0.2, "psnr": 3.0}

    task.evaluate = evaluate
    assert save_better("dvae train", task, tmp_path / "model", 20)["loss"] == 0.1
    saved = fingerprint(DiscreteVAE.from_pretrained(tmp_path / "model"))
    kept = fingerprint(DiscreteVAE.from_pretrained(tmp_path / f"model-{other}"))
    assert (saved, kept) == (weights[better], weights[other])
    line = f"dvae train: the {better} weights are the model, held-out loss 0.1; the {other} ones"
    said = capsys.readouterr().err
    assert line in said and f"(0.2) are in {tmp_path / 'model'}-{other}" in said


@pytest.mark.parametrize("copies", [0, 10_000])
def test_without_a_held_out_part_the_average_is_saved_if_it_forgot(copies, tmp_path, capsys):
    task = make_task(WARM)
    for parameter in task.model.parameters():
        parameter.data.add_(0.01)
    task.average.copies = copies
    with task.average.applied():
        average = fingerprint(task.model)
    if not copies:  # the average is still what the training began with
        assert save_better("dvae train", task, tmp_path / "model", 20) == {}
        assert fingerprint(DiscreteVAE.from_pretrained(tmp_path / "model")) != average
        assert fingerprint(DiscreteVAE.from_pretrained(tmp_path / "model-averaged")) == average
        assert "the averaged ones (which still hold much" in capsys.readouterr().err
        return
    assert save_better("dvae train", task, tmp_path / "model", 20) == {}
    assert fingerprint(DiscreteVAE.from_pretrained(tmp_path / "model")) == average
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_task_that_cannot_be_scored_and_a_bad_interval(tmp_path):
    assert held_out_scores(TinyTask(), 1) == {}
    with pytest.raises(UsageError, match="train: validate_every must be 0 or more, got -1"):
        LoopConfig(out=tmp_path, steps=1, validate_every=-1)
