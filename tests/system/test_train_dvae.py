"""Training of the dVAE: the paper's recipe, warm start, codebook, resuming, commands."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import dalle.train.dvae as train_dvae
from dalle.cli import main
from dalle.dvae.model import DiscreteVAE, DiscreteVAEConfig
from dalle.errors import UsageError
from dalle.recipes import DVAE_RECIPES
from dalle.train.config import LoopConfig
from dalle.train.dvae import DvaeTrainConfig
from dalle.train.loop import train
from support.dvae import PATCH, SHORT, WARM, make_task, some_pairs


def weights_of(task):
    return torch.cat([p.detach().flatten() for p in task.model.parameters()])


def test_defaults_are_the_papers_numbers():
    c = DvaeTrainConfig()
    assert (c.image_size, c.batch_size) == (256, 512)
    assert (c.tau_start, c.tau_end, c.tau_steps) == (1.0, 1 / 16, 150_000)
    assert (c.kl_weight, c.kl_steps) == (6.6, 5_000)
    assert (c.lr_start, c.lr_end, c.lr_steps) == (1e-4, 1.25e-6, 1_200_000)
    assert (c.beta1, c.beta2, c.eps, c.weight_decay) == (0.9, 0.999, 1e-8, 1e-4)
    assert c.average_decay == 0.999 and c.augment == "paper"
    assert c.distortion == "logit_laplace" and not c.warm_start_steps and not c.average_warmup


def test_optimizer_takes_them():
    task = make_task(replace(SHORT, weight_decay=0.02, beta2=0.9))
    group = task.optimizer.param_groups[0]
    assert isinstance(task.optimizer, torch.optim.AdamW)
    assert group["betas"] == (0.9, 0.9) and group["weight_decay"] == 0.02 and group["eps"] == 1e-8


def test_ramps_follow_the_cosine_and_hold_their_ends():
    task = make_task(SHORT)
    seen = [task.train_step(step) for step in range(12)]
    assert seen[0]["tau"] == 0.5 and seen[0]["kl_weight"] == 0.0
    assert seen[5]["tau"] == pytest.approx((0.5 + 1 / 16) / 2)
    assert [m["tau"] for m in seen[10:]] == pytest.approx([1 / 16] * 2)
    assert [m["kl_weight"] for m in seen[5:7]] == pytest.approx([0.1] * 2)
    lr = task.optimizer.param_groups[0]["lr"]
    assert lr == pytest.approx(1e-4 + (1e-3 - 1e-4) * (1 + np.cos(np.pi * 11 / 20)) / 2)


def test_a_step_is_a_function_of_its_number():
    first, second = make_task(), make_task()
    for step in range(9):
        a, b = first.train_step(step), second.train_step(step)
        assert float(a["loss"]) == float(b["loss"])
    assert torch.equal(weights_of(first), weights_of(second))
    other = make_task(seed=1)
    assert not np.array_equal(other.sampler.indices(0), first.sampler.indices(0))


def test_augmentation_moves_the_crop_with_the_step():
    def batches(config, steps):
        task = make_task(config)
        task.sampler.indices = lambda _: np.arange(4)
        return [task.batch(step) for step in steps]

    same = batches(SHORT, (3, 3, 4))
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])
    assert same[0].shape == (4, 3, 8, 8)
    assert torch.equal(*batches(replace(SHORT, augment="none"), (3, 4)))


def test_warm_start_trains_continuously_then_makes_a_codebook():
    task = make_task()
    for step in range(6):
        before = task.model.codebook().detach().clone()
        metrics = task.train_step(step)
        assert "tau" not in metrics
        torch.testing.assert_close(task.model.codebook().detach(), before, atol=0.01, rtol=0)
    with torch.no_grad():
        spread = (task.model.codebook() - before).abs().mean()
    metrics = task.train_step(6)
    assert metrics["tau"] == 0.5
    after = (task.model.codebook().detach() - before).abs().mean()
    assert float(after) > 10 * float(spread) and task.average.copies == 1


@pytest.mark.parametrize("distortion", ["logit_laplace", "mse"])
def test_training_lowers_the_error(distortion):
    config = replace(
        WARM, distortion=distortion, warm_start_steps=30, lr_steps=60, tau_steps=40, kl_weight=0.0
    )
    task = make_task(config)
    seen = [float(task.train_step(step)["psnr"]) for step in range(90)]
    assert np.mean(seen[25:30]) > np.mean(seen[:5]) + 1.5  # continuous
    assert np.mean(seen[-5:]) > np.mean(seen[:5]) + 1.5  # through the codes


def test_squared_error_leaves_the_scale_alone_and_keeps_the_kl():
    task = make_task(replace(SHORT, distortion="mse", kl_weight=6.6, kl_steps=1, mse_weight=3.0))
    task.train_step(0)
    metrics = task.train_step(1)
    images = task.batch(1)
    kl_share = 6.6 * float(metrics["kl"]) * 4 / images[0].numel()
    error = float(metrics["loss"]) - kl_share
    assert 0 < error < 3.0 and abs(float(metrics["nll"]) - error) > 1e-3


def test_health_is_counted_over_a_window():
    task = make_task(SHORT)
    seen = [task.train_step(step) for step in range(5)]
    assert "codes_used" not in seen[2] and 1 <= seen[3]["codes_used"] <= 16
    assert 1 <= seen[3]["perplexity"] <= seen[3]["codes_used"] + 1e-6
    assert task.tokens_counted == 4 * 2 * 2  # the open window holds the last step alone


def planted_collapse(bias):
    """A task whose logits prefer code 0 by `bias`; 32 codes, so 1 is under 5 %."""
    task = make_task(SHORT, replace(PATCH, vocab_size=32))
    with torch.no_grad():
        task.model.encoder.logits_conv().w.zero_()
        task.model.encoder.logits_conv().b.zero_()
        task.model.encoder.logits_conv().b[0] = bias
    task.config = replace(SHORT, health_every=10, lr_start=1e-9, lr_end=1e-9)
    for step in range(10):
        metrics = task.train_step(step)
    return metrics


def test_a_collapse_is_reported_in_words(monkeypatch):
    said = []
    monkeypatch.setattr(train_dvae, "say", said.append)
    metrics = planted_collapse(bias=60.0)
    assert metrics["codes_used"] == 1 and metrics["perplexity"] == pytest.approx(1)
    assert len(said) == 1 and "\n" not in said[0]
    assert said[0].startswith("dvae: after step 10: the codebook has collapsed: 1 of 32 codes used")
    assert "lower the step size" in said[0]


def test_a_healthy_codebook_is_not_called_collapsed(monkeypatch):
    said = []
    monkeypatch.setattr(train_dvae, "say", said.append)
    assert planted_collapse(bias=0.0)["codes_used"] > 4
    assert said == []


def test_the_noise_does_not_hide_a_collapse(monkeypatch):
    """One code leads by less than the Gumbel noise, which would show nearly all of them."""
    said = []
    monkeypatch.setattr(train_dvae, "say", said.append)
    assert planted_collapse(bias=2.0)["codes_used"] == 1
    assert len(said) == 1


@pytest.mark.parametrize("cut", [3, 6, 7, 11])  # in the warm start, around the codebook, later
def test_resume_is_bit_for_bit(tmp_path, cut):
    whole = make_task()
    train(whole, LoopConfig(out=tmp_path / "whole", steps=14, picture_every=0))
    for steps in (cut, 14):
        task = make_task(seed=0)
        train(task, LoopConfig(out=tmp_path / "cut", steps=steps, picture_every=0))
    assert torch.equal(weights_of(task), weights_of(whole))
    for name, tensor in whole.average.average.items():
        assert torch.equal(task.average.average[name], tensor), name
    assert task.state() == whole.state()


def test_pictures_come_in_both_phases():
    task = make_task()
    for step in (2, 9):
        picture = task.pictures(step)["reconstructions"]
        assert picture.shape == (3, 16, 64)
        assert 0 <= float(picture.min()) and float(picture.max()) <= 1


def test_bad_recipes_get_one_line():
    with pytest.raises(UsageError, match="stem must be 'patch' for a warm start, got 'released'"):
        make_task(WARM, DiscreteVAEConfig(group_count=2, n_hid=8, vocab_size=8))
    with pytest.raises(UsageError, match="image_size must be a multiple of 4, got 10"):
        make_task(replace(WARM, image_size=10))
    with pytest.raises(UsageError, match="augment must be one of paper, none, got 'flip'"):
        DvaeTrainConfig(augment="flip")
    with pytest.raises(UsageError, match="distortion must be .*, got 'l1'"):
        DvaeTrainConfig(distortion="l1")
    with pytest.raises(UsageError, match="batch_size must be positive, got 0"):
        DvaeTrainConfig(batch_size=0)


def test_recipes_are_whole():
    assert set(DVAE_RECIPES) == {"emoji", "shapes"}
    for data, recipe in DVAE_RECIPES.items():
        assert recipe.train.image_size == recipe.image_size
        assert recipe.train.warm_start_steps < recipe.steps
        assert recipe.train.lr_steps == recipe.steps - recipe.train.warm_start_steps
        with torch.device("meta"):
            vae = DiscreteVAE(recipe.model)
        assert vae.grid(recipe.train.image_size) == {"emoji": (8, 8), "shapes": (12, 12)}[data]


def write_folder(folder, n=6):
    folder.mkdir()
    for i, image in enumerate(some_pairs(n, size=48).images):
        Image.fromarray(image).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("squares")


def test_commands_train_and_reconstruct(tmp_path, capsys):
    write_folder(tmp_path / "data")
    (tmp_path / "data" / "broken.png").write_bytes(b"no picture")
    out, png = tmp_path / "out", tmp_path / "sheet.png"
    words = ["dvae", "train", "--data", str(tmp_path / "data"), "--out", str(out)]
    sizes = ["--recipe", "paper", "--image-size", "16", "--steps", "2", "--batch-size", "2"]
    assert main([*words, *sizes, "--device", "cpu", "--deterministic"]) == 0, (
        capsys.readouterr().err
    )
    assert DiscreteVAE.from_pretrained(out / "model").num_tokens == 512
    words = ["dvae", "reconstruct", "--data", str(tmp_path / "data"), "--model", str(out / "model")]
    assert main([*words, "--out", str(png), "--image-size", "16", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "6 pictures: PSNR" in printed and "left out 1: 1 x not a picture" in printed
    with Image.open(png) as sheet:
        assert sheet.width > 6 * 96


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (["--preset", "tinny"], "preset must be one of", 2),
        (["--recipe", "paper", "--image-size", "18"], "multiple of 4, got 18", 2),
        (["--steps", "5", "--warm-start-steps", "5"], "steps must be more than", 2),
        (["--preset", "tiny", "--data", "/no/such/folder"], "no such folder", 3),
        (["--preset", "tiny", "--device", "warp"], "device: must be auto", 2),
    ],
)
def test_commands_refuse_in_one_line(tmp_path, capsys, words, said, code):
    write_folder(tmp_path / "data", 2)
    begin = ["dvae", "train", "--out", str(tmp_path / "out")]
    data = [] if "--data" in words else ["--data", str(tmp_path / "data")]
    assert main([*begin, *data, *words]) == code
    error = capsys.readouterr().err.strip()
    assert said in error.splitlines()[-1]
