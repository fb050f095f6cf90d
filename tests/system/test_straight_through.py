"""Straight-through dVAE: nearest codes, its gradient, a codebook of moving averages, resuming."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dalle.cli import main
from dalle.config_files import read_options
from dalle.distributed.world import Solo
from dalle.dvae.blocks import straight_through
from dalle.dvae.bound import log_likelihood
from dalle.dvae.likelihood import map_pixels
from dalle.dvae.model import DiscreteVAE
from dalle.dvae.straight_through import (
    MovingCodebook,
    freeze_codebook,
    get_codebook,
    moved,
    set_codebook,
    takes_nearest,
)
from dalle.errors import UsageError
from dalle.pipeline import Pipeline
from dalle.train import late
from dalle.train.config import LoopConfig
from dalle.train.dvae import DvaeTrainConfig
from dalle.train.loop import train
from dalle.train.seeds import step_seed
from support.dvae import PATCH, SHORT, WARM, make_task, some_pairs
from support.toy_pipeline import CAPTION, build

CPU = torch.device("cpu")
VECTOR = replace(WARM, quantizer="straight-through", distortion="mse", health_every=4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def weights_of(task):
    return torch.cat([p.detach().flatten() for p in task.model.parameters()])


def vae_with_codebook(spread=1.0):
    torch.manual_seed(0)
    vae = DiscreteVAE(PATCH)
    set_codebook(vae, spread * torch.randn(16, 8, generator=generator(1)))
    return vae


def test_gradient_is_the_straight_through_one():
    """By hand in float64: a linear encoder and decoder, squared error, and the commitment."""
    w, v = (torch.randn(3, 3, dtype=torch.float64, generator=generator(i)) for i in (2, 3))
    x = torch.randn(5, 3, dtype=torch.float64, generator=generator(4))
    e = torch.randn(7, 3, dtype=torch.float64, generator=generator(5))
    w.requires_grad_()
    z = x @ w
    q = e[torch.cdist(z.detach(), e).argmin(1)]
    taken = straight_through(z, q)
    assert torch.equal(taken, q)
    loss = (taken @ v - x).square().sum() + 0.25 * (z - q).square().mean()
    (found,) = torch.autograd.grad(loss, w)
    of_output = 2 * (q @ v - x)
    want = x.T @ (of_output @ v.T + 0.25 * 2 * (z.detach() - q) / z.numel())
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


def test_the_models_gradient_passes_the_codes_unchanged():
    vae, images = vae_with_codebook(), torch.rand(2, 3, 8, 8, generator=generator(6))
    freeze_codebook(vae)
    out = vae.vector_quantized(images)
    assert torch.equal(out.codes, vae.encode(images))
    vectors = get_codebook(vae)[out.codes].permute(0, 3, 1, 2).clone().requires_grad_()
    maps = vae.decoder.from_codes(vectors)
    nll = vae.likelihood(images, maps)[1]
    torch.testing.assert_close(nll, out.nll, rtol=0, atol=0)
    (of_input,) = torch.autograd.grad(nll, vectors)
    weight = vae.encoder.blocks.get_submodule("code").w
    (found,) = torch.autograd.grad(out.nll, weight, retain_graph=True)
    z = vae.encoder.features(map_pixels(images))
    (want,) = torch.autograd.grad(z, weight, of_input)
    torch.testing.assert_close(found, want)
    out.commitment.backward()
    assert all(p.grad is None for p in (vae.encoder.logits_conv().w, vae.decoder.codebook_conv().w))


def test_encode_is_the_nearest_vector():
    vae, images = vae_with_codebook(0.7), torch.rand(6, 3, 16, 12, generator=generator(7))
    with torch.no_grad():
        z = vae.encoder.features(map_pixels(images)).permute(0, 2, 3, 1).double()
    distance = (z[..., None, :] - get_codebook(vae).double()).square().sum(-1)
    assert torch.equal(vae.encode(images), distance.argmin(-1))
    assert takes_nearest(vae)
    vae.encoder.logits_conv().b.data[3] += 0.5
    assert not takes_nearest(vae)


def test_the_codebook_is_the_moving_average_of_counts_and_sums():
    """Against counts N and sums S that are kept in float64 over 60 updates."""
    k, c, decay = 5, 3, 0.9
    e = torch.randn(k, c, generator=generator(8))
    counts = torch.full((k,), 40 / k)
    big_n = counts.double()
    big_s = e.double() * big_n[:, None]  # equal counts: smoothing leaves them
    for step in range(60):
        codes = torch.randint(k - (step > 30), (40,), generator=generator(step))
        z = torch.randn(40, c, generator=generator(100 + step)) + codes[:, None]
        n = torch.bincount(codes, minlength=k)
        s = torch.zeros(k, c).index_add_(0, codes, z)
        e, counts = moved(e, counts, n.float(), s, decay)
        big_n = decay * big_n + (1 - decay) * n
        big_s = decay * big_s + (1 - decay) * torch.zeros(k, c, dtype=torch.float64).index_add_(
            0, codes, z.double()
        )
        share = (big_n + 1e-5) / (big_n.sum() + k * 1e-5) * big_n.sum()
        torch.testing.assert_close(e.double(), big_s / share[:, None], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(counts.double(), big_n, rtol=1e-5, atol=1e-6)


def planted(device_codes):
    """Features around 8 far centres, and a codebook of which some vectors lie nowhere near."""
    vae = vae_with_codebook()
    vectors = get_codebook(vae)
    centers = 20 * torch.eye(8)
    vectors[:8] = centers
    vectors[8:] = 1e3 + torch.arange(8.0)[:, None]
    vectors[:device_codes] = centers[:device_codes]
    set_codebook(vae, vectors)
    codes = torch.arange(64) % 8
    return vae, centers[codes] + 0.1 * torch.randn(64, 8, generator=generator(9)), codes


def test_dead_codes_are_revived_as_points_of_the_update():
    vae, features, codes = planted(8)
    book = MovingCodebook(vae, 0.99, CPU, Solo().queue_sum_)
    book.reset(64)
    window = torch.zeros(16, dtype=torch.int64)
    window[9] = 1  # was taken before: alive
    revived = book.update(features, codes, 1.0, window=window, total=64, seed=3)
    assert int(revived) == 7
    after = get_codebook(vae)
    dead = [8, *range(10, 16)]
    nearest = torch.cdist(after[dead], features).min(1)
    assert float(nearest.values.max()) == 0 and len(nearest.indices.unique()) == 7
    assert float(after[9].min()) > 900
    torch.testing.assert_close(book.counts[dead], torch.full((7,), 0.01))
    same_seed, other_seed = (planted(8)[0] for _ in range(2))
    for other, seed in ((same_seed, 3), (other_seed, 4)):
        again = MovingCodebook(other, 0.99, CPU, Solo().queue_sum_)
        again.reset(64)
        again.update(features, codes, 1.0, window=window, total=64, seed=seed)
    assert torch.equal(get_codebook(same_seed), after)
    assert not torch.equal(get_codebook(other_seed), after)


@pytest.mark.parametrize("bad", ["norm", "features"])
def test_an_update_that_is_not_finite_moves_nothing(bad):
    vae, features, codes = planted(8)
    before, book = get_codebook(vae).clone(), MovingCodebook(vae, 0.99, CPU, Solo().queue_sum_)
    book.reset(64)
    if bad == "features":
        features[5, 2] = float("nan")
    norm = float("inf") if bad == "norm" else torch.tensor(1.0)
    book.update(features, codes, norm, window=torch.zeros(16), total=64, seed=0)
    assert torch.equal(get_codebook(vae), before) and float(book.counts.std()) == 0


def test_training_starts_from_kmeans_and_moves_the_codebook():
    for config in (VECTOR, replace(VECTOR, warm_start_steps=0)):
        task, first = make_task(config), config.warm_start_steps
        random = get_codebook(task.model).clone()
        for step in range(first):
            task.train_step(step)
        task._make_codebook()
        with torch.no_grad():
            features = task.model.vector_quantized(task.batch(first))
        assert float((get_codebook(task.model) - random).abs().mean()) > 0.1
        assert float(features.commitment) < 0.5 * float(features.features.var())
    task, seen = make_task(replace(VECTOR, lr_steps=60)), []
    for step in range(60):
        seen.append(task.train_step(step))
    assert takes_nearest(task.model) and "tau" not in seen[-1]
    assert {"commitment", "codes_used", "perplexity", "revived"} <= set(seen[-1])
    assert float(seen[-1]["psnr"]) > float(seen[6]["psnr"]) + 1
    assert 0 < float(task.codebook.counts.sum()) <= 4 * 4 + 1e-3


@pytest.mark.parametrize("cut", [6, 7, 11])
def test_resume_is_bit_for_bit(tmp_path, cut):
    direct = make_task(VECTOR)
    for step in range(14):
        direct.train_step(step)
    for steps in (cut, 14):
        task = make_task(VECTOR)
        train(task, LoopConfig(out=tmp_path / "cut", steps=steps, picture_every=0))
    assert torch.equal(weights_of(task), weights_of(direct))  # the loop reads a step later
    assert task.state() == direct.state() and "codebook_counts" in task.state()
    for name, tensor in direct.average.average.items():
        assert torch.equal(task.average.average[name], tensor), name
    assert not late._OPEN


def test_averaged_weights_have_the_codebook_as_it_is():
    task = make_task(VECTOR)
    for step in range(12):
        task.train_step(step)
    before = get_codebook(task.model).clone()
    with task.average.applied():
        assert takes_nearest(task.model) and torch.equal(get_codebook(task.model), before)
        averaged = task.model.decoder.blocks.get_submodule("widen").w.detach().clone()
    assert not torch.equal(task.model.decoder.blocks.get_submodule("widen").w, averaged)
    assert torch.equal(get_codebook(task.model), before)


def test_scores_count_all_bits_of_a_code():
    task = make_task(VECTOR)
    for step in range(8):
        task.train_step(step)
    task.validation = some_pairs(10, seed=5)
    found = task.evaluate(task.model, 8)
    images = task._held_out
    want = log_likelihood(task.model, images, task.model.encode(images)).double().mean()
    assert found["elb"] == pytest.approx(float(want) - 4 * np.log(16), rel=1e-5)


def test_gumbel_is_as_it_was():
    """Its description, by which a checkpoint is taken, its state, and its update by hand."""
    task, other = make_task(SHORT), make_task(SHORT)
    assert not {"quantizer", "commitment_weight", "codebook_decay"} & set(task.describe()["train"])
    assert set(task.state()) == {"counts", "tokens_counted", "health"}
    metrics = task.train_step(0)
    out = other.model(other.batch(0), tau=0.5, kl_weight=0.0, seed=step_seed(0, 0, 2))
    out.loss.backward()
    other.optimizer.step()
    assert float(metrics["loss"]) == float(out.loss.detach())
    assert torch.equal(weights_of(task), weights_of(other))


def test_bad_options_get_one_line():
    with pytest.raises(UsageError, match="quantizer must be one of gumbel, .*, got 'vq'"):
        DvaeTrainConfig(quantizer="vq")
    for name, value in (("commitment_weight", -1.0), ("codebook_decay", 1.0)):
        with pytest.raises(UsageError, match=f"dvae train: {name} must be"):
            DvaeTrainConfig(**{name: value})
    task = make_task(VECTOR)
    for counts in (None, [1.0], [float("nan")] * 16, ["x"] * 16, [-1.0] * 16):
        with pytest.raises(UsageError, match="codebook_counts must be 16 numbers"):
            task.load_state({**task.state(), "codebook_counts": counts})
    model = replace(PATCH, stem="released", group_count=2, n_init=8)
    with pytest.raises(UsageError, match="n_init must be 32, .* straight-through, got 8"):
        make_task(replace(VECTOR, warm_start_steps=0), model)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tau-start", "0.5"], "tau_start must be left out with quantizer straight-through"),
        (["--kl-weight", "0"], "kl_weight must be left out with quantizer straight-through"),
        (["--freeze", "*logits*", "*output.conv*"], "freeze must be patterns"),
        (["--freeze", "encoder.blocks.output*"], "freeze must leave the codebook free"),
        (["--quantizer", "gumbel", "--codebook-decay", "0.9"], "codebook_decay must be left out"),
        (["--quantizer", "vq"], "quantizer must be one of gumbel, straight-through"),
    ],
)
def test_command_refuses_what_has_no_effect(tmp_path, capsys, words, said):
    folder(tmp_path / "data")
    begin = ["dvae", "train", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert main([*begin, "--steps", "4", "--quantizer", "straight-through", *words]) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def folder(path):
    path.mkdir()
    for i, image in enumerate(some_pairs(20, size=48).images):
        Image.fromarray(image).save(path / f"{i}.png")
        (path / f"{i}.txt").write_text("squares")


@pytest.mark.parametrize("recipe", ["quick", "paper"])
def test_command_trains_and_its_config_repeats_it(tmp_path, capsys, recipe):
    folder(tmp_path / "data")
    out = tmp_path / "out"
    begin = ["dvae", "train", "--data", str(tmp_path / "data"), "--device", "cpu"]
    sizes = ["--vocab-size", "16", "--image-size", "16", "--batch-size", "4", "--recipe", recipe]
    words = [*begin, *sizes, "--steps", "6", "--quantizer", "straight-through"]
    assert main([*words, "--out", str(out)]) == 0, capsys.readouterr().err
    options = read_options(out / "config.yaml")
    assert str(options["quantizer"]) == "straight-through" and options["tau-start"].is_null
    again = ["dvae", "train", "--config", str(out / "config.yaml"), "--out", str(tmp_path / "two")]
    assert main(again) == 0, capsys.readouterr().err
    first, second = (DiscreteVAE.from_pretrained(tmp_path / x / "model") for x in ("out", "two"))
    assert takes_nearest(first)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    further = [*words[:-4], "--steps", "2", "--quantizer", "straight-through"]
    more = ["--init-from", str(out / "model"), "--out", str(tmp_path / "more"), "--validation", "0"]
    assert main([*further, *more]) == 0, capsys.readouterr().err
    moved_on = DiscreteVAE.from_pretrained(tmp_path / "more" / "model")
    assert takes_nearest(moved_on)
    gap = (get_codebook(moved_on) - get_codebook(first)).norm() / get_codebook(first).norm()
    assert float(gap) < 0.3  # goes on from the codebook, without k-means


def test_a_pipeline_of_such_a_model_draws(tmp_path):
    pipeline = build()
    set_codebook(pipeline.vae, torch.randn(16, 8, generator=generator(10)))
    pipeline.save_pretrained(tmp_path / "pipeline")
    again = Pipeline.from_pretrained(tmp_path / "pipeline")
    first, second = (
        x.generate(CAPTION, num_candidates=2, top=1, seed=0) for x in (pipeline, again)
    )
    assert takes_nearest(again.vae) and first.images.shape[-2:] == (16, 16)
    assert torch.equal(first.images, second.images)
