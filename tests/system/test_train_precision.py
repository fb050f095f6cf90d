"""Training the prior in 16 bits, and the messages when numbers are not finite."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

import dalle_ext
from dalle.cli import main
from dalle.errors import NumericalError
from dalle.train.config import LoopConfig
from dalle.train.loop import train
from dalle.train.metrics import read_metrics
from support.dvae import make_task as dvae_task
from support.prior import SMALL, make_task


def weights(task):
    return {n: p.detach().clone() for n, p in task.model.named_parameters()}


def unchanged(task, before):
    return all(torch.equal(p, before[n]) for n, p in task.model.named_parameters())


@pytest.mark.parametrize("half_weights", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16-scaled"])
def test_sixteen_bits_learn_what_fp32_learns(parts, tmp_path, precision, half_weights):
    task = make_task(parts, precision=precision, half_weights=half_weights)
    assert isinstance(task.optimizer, dalle_ext.AdamW16)
    if task.scaler is not None:
        task.scaler.sample_every = 20
    result = train(task, LoopConfig(out=tmp_path, steps=60, picture_every=0))
    assert result.metrics["image_loss"] < 0.5 * math.log(32)
    sixteen = torch.bfloat16 if precision == "bf16" else torch.float16
    stored = {p.dtype for n, p in task.model.named_parameters() if n.startswith("layers.")}
    assert stored == ({torch.float32, sixteen} if half_weights else {torch.float32})
    embedding = task.optimizer.state[task.model.text_embedding.weight]
    assert embedding["exp_avg"].dtype == torch.float32  # appendix D, guideline 2
    records = read_metrics(tmp_path / "metrics.jsonl")
    if precision == "bf16":
        assert "block_scale" not in records[-1]
        return
    blocks = len(task.model.resblocks())
    assert blocks == 4 and records[-1]["skipped"] == 0
    for name in ("scale", "overflow", "underflow", "subnormal", "nonfinite"):
        assert len(records[-1][f"block_{name}"]) == blocks
    assert records[-1]["block_scale"][0] == pytest.approx(13 + 55.5 / 1000, abs=1e-3)
    sampled = [r["step"] for r in records if "block_exponents" in r]
    assert sampled == [20, 40, 60] and len(records[-1]["block_exponents"]) == blocks


def test_masters_get_matrices_in_fp16_and_keep_everything_else(parts):
    task = make_task(parts, precision="fp16-scaled")
    seen = {}
    block = task.model.layers[1].mlp
    block.norm.register_forward_hook(lambda *given: seen.update(norm=given[2].dtype))
    block.register_forward_hook(lambda *given: seen.update(block=given[2].dtype))
    out = task.model(*task.batch(0)[:2])
    assert seen == {"norm": torch.float32, "block": torch.float32}
    assert out.image_logits.dtype == out.text_logits.dtype == torch.float32


def test_inf_in_a_blocks_gradient_skips_that_update_only(parts):
    task = make_task(parts, precision="fp16-scaled")
    for step in range(3):
        task.train_step(step)
    before, average = weights(task), {n: t.clone() for n, t in task.average.average.items()}
    scales = task.scaler.scales.clone()
    hook = task.model.layers[1].mlp.wide_in.weight.register_hook(lambda grad: grad * math.inf)
    values = task.train_step(3)
    hook.remove()
    assert float(values["skipped"]) == 1 and unchanged(task, before)
    assert all(torch.equal(t, average[n]) for n, t in task.average.average.items())
    fell = (task.scaler.scales < scales).tolist()
    assert fell == [False, False, False, True, False]
    assert float(task.train_step(4)["skipped"]) == 0 and not unchanged(task, before)


def test_nonfinite_gradients_that_no_scale_can_mend_are_named(parts):
    task = make_task(parts, precision="fp16-scaled")
    before = weights(task)
    hook = task.model.image_head.bias.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(NumericalError, match="gradient of image_head.bias must be finite"):
        task.train_step(0)
    hook.remove()
    scaler = task.scaler
    scaler.scales[:4] = scaler.low
    task.model.layers[0].mlp.wide_in.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(NumericalError) as caught:
        for step in range(200):
            task.train_step(step)
    line = "prior: gradients of layers.0.mlp must be finite at the smallest scale, got nonfinite "
    assert str(caught.value) == line + "values in 125 updates in a row, the last at step 124"
    assert unchanged(task, before)


def test_scales_of_a_run_are_drawn(parts, tmp_path, capsys):
    task = make_task(parts, precision="fp16-scaled")
    task.scaler.sample_every = 10
    train(task, LoopConfig(out=tmp_path / "run", steps=20, picture_every=0))
    capsys.readouterr()
    words = ["plot", "scales", "--run", str(tmp_path / "run")]
    assert main(words) == 0 and "scales.png" in capsys.readouterr().out
    with Image.open(tmp_path / "run" / "scales.png") as picture:
        assert picture.size[0] > 1000 and len(picture.convert("RGB").getcolors(2**20)) > 50
    assert main([*words, "--out", str(tmp_path / "other.png")]) == 0
    assert (tmp_path / "other.png").read_bytes() == (tmp_path / "run/scales.png").read_bytes()
    assert main(["plot", "scales", "--run", str(tmp_path)]) == 3
    assert "plot scales: run must hold metrics.jsonl, got" in capsys.readouterr().err
    plain = make_task(parts)
    train(plain, LoopConfig(out=tmp_path / "plain", steps=10, picture_every=0))
    capsys.readouterr()
    assert main(["plot", "scales", "--run", str(tmp_path / "plain")]) == 3
    assert "metrics must hold block_scale, got none (fp16-scaled only)" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16-scaled"])
def test_nan_in_an_activation_names_the_module(parts, precision):
    task = make_task(parts, replace(SMALL, token_dropout=0.3), precision=precision, dropout=0.1)
    task.train_step(0)
    before = weights(task)
    task.model.layers[1].attention.norm.register_forward_hook(
        lambda *given: given[2].index_fill(1, torch.tensor([2]), math.nan)
    )
    with pytest.raises(NumericalError) as caught:
        task.train_step(1)
    wanted = "prior: loss must be finite, got nan at step 1 "
    assert str(caught.value) == wanted + "(first nonfinite: output of layers.1.attention.norm)"
    assert unchanged(task, before)


@pytest.mark.parametrize(("step", "where"), [(0, "input of encoder"), (9, "input of model")])
def test_nan_pixels_are_named(monkeypatch, step, where):
    task = dvae_task()
    for done in range(step):
        task.train_step(done)
    before, batch = weights(task), task.batch
    monkeypatch.setattr(task, "batch", lambda step: batch(step) * math.nan)
    with pytest.raises(NumericalError, match=rf"dvae: loss must be finite, got nan .*{where}"):
        task.train_step(step)
    assert unchanged(task, before)
