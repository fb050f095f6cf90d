"""Training of the prior: what it learns, its recipe, resuming, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

from dalle.cli import main
from dalle.data.pairs import ArrayPairs
from dalle.errors import CheckpointError, OtherTrainingError, UsageError
from dalle.pipeline import Pipeline
from dalle.prior.config import PAD
from dalle.prior.model import Prior
from dalle.tokenizer import Tokenizer
from dalle.train.checkpoint import load_checkpoint, save_checkpoint
from dalle.train.config import LoopConfig
from dalle.train.loop import train
from dalle.train.prior_recipe import PriorTrainConfig, init_from_codebook, parameter_groups
from support.prior import COLOURS, SMALL, make_task


def changed_parts(parts, what):
    """The parts of a training of which one thing is another."""
    tokenizer, vae, pairs = parts
    name = "moved" if what is None else pairs.name  # which does not count
    images, captions = pairs.images.copy(), list(pairs.captions)
    if what == "data.pictures":
        images[3, 2, 1] ^= 1
    if what == "data.captions":
        captions[0], captions[1] = captions[1], captions[0]
    if what == "tokenizer":
        tokenizer = Tokenizer.train(["red green", "blue", "blue"], vocab_size=tokenizer.vocab_size)
    if what == "vae":
        vae = copy.deepcopy(vae)
        next(vae.parameters()).data.view(-1)[0] += 1e-6
    return tokenizer, vae, ArrayPairs(name, images, captions)


def test_resuming_with_other_data_or_models_is_refused_by_name(parts, tmp_path, capsys):
    path = save_checkpoint(make_task(parts), tmp_path, 1)
    assert load_checkpoint(make_task(changed_parts(parts, None)), path) == 1
    for what in ("data.pictures", "data.captions", "tokenizer", "vae"):
        other = make_task(changed_parts(parts, what), text_vocab=parts[0].vocab_size)
        with pytest.raises(OtherTrainingError, match=f': {what} must be "SHA-256 [^;]*$'):
            load_checkpoint(other, path)
        assert load_checkpoint(other, path, accept_changes=True) == 1
        assert f"with changes: {what} from" in capsys.readouterr().err
    with pytest.raises(OtherTrainingError, match="train.lr must be 0.02 as in this run, got 0.01$"):
        load_checkpoint(make_task(parts, replace(SMALL, lr=0.02)), path)


def test_a_pipeline_refuses_the_prior_of_another_dvae(parts, tmp_path):
    tokenizer, vae, _ = parts
    make_task(parts).model.save_pretrained(tmp_path)
    prior = Prior.from_pretrained(tmp_path)
    assert set(prior.trained_on) == {"vae", "tokenizer"}
    Pipeline(tokenizer, vae, prior).save_pretrained(tmp_path / "whole")
    again = Pipeline.from_pretrained(tmp_path / "whole")
    assert again.prior.trained_on == prior.trained_on
    Pipeline(tokenizer, copy.deepcopy(vae).half(), prior)  # a rounded copy cannot be told apart
    for what in ("vae", "tokenizer"):
        other_tokenizer, other_vae, _ = changed_parts(parts, what)
        with pytest.raises(UsageError, match=f"pipeline: {what} must be the one that the prior"):
            Pipeline(other_tokenizer, other_vae, prior)
    changed_parts(parts, "vae")[1].save_pretrained(tmp_path / "whole" / "vae")
    with pytest.raises(CheckpointError, match="vae must be the one that the prior was trained"):
        Pipeline.from_pretrained(tmp_path / "whole")
    head = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**head, "trained_on": ["x"]}))
    with pytest.raises(CheckpointError, match="trained_on must be hashes by name"):
        Prior.from_pretrained(tmp_path)


def test_training_learns_which_caption_has_which_picture(parts, tmp_path):
    task = make_task(parts)
    result = train(task, LoopConfig(out=tmp_path, steps=60, picture_every=60))
    assert result.metrics["image_loss"] < 0.5 * math.log(32)
    assert list((tmp_path / "pictures").glob("samples-*.png"))
    tokenizer = parts[0]
    wanted = task.tokens.view(-1, 3, 4, 4)  # pictures cycle through the colours
    with task.average.applied():
        text = tokenizer.encode(list(COLOURS), 3)
        found = task.model.generate(text, num_samples=4, temperature=0.5)
    shares = torch.stack([torch.bincount(w.flatten(), minlength=32) for w in wanted.unbind(1)])
    drawn = torch.stack([torch.bincount(f.flatten(), minlength=32) for f in found])
    agree = drawn.double() @ shares.double().t()  # caption against the codes of each colour
    assert torch.equal(agree.argmax(1), torch.arange(3))


def test_defaults_are_the_papers():
    c = PriorTrainConfig()
    assert (c.batch_size, c.lr, c.warmup_steps, c.max_halvings) == (1024, 4.5e-4, 5000, 5)
    assert (c.beta1, c.beta2, c.eps, c.weight_decay) == (0.9, 0.96, 1e-8, 4.5e-2)
    assert (c.clip_norm, c.average_decay, c.average_every) == (4.0, 0.99, 25)
    assert (c.augment, c.bpe_dropout, c.decay, c.image_init) == ("paper", 0.1, "plateau", "random")
    assert c.step_size(0) == pytest.approx(4.5e-4 / 5000) and c.step_size(5000) == 4.5e-4


def test_cosine_ends_at_zero():
    sizes = [SMALL.step_size(step) for step in range(61)]
    assert max(sizes) < 1e-2 and sizes[60] == 0 and sizes[4] > sizes[3] > 0


def test_only_matrices_of_resblocks_decay(parts):
    model = make_task(parts).model
    decayed, rest = parameter_groups(model, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    kinds = {names[id(p)].rsplit(".", 2)[-2] for p in decayed["params"]}
    assert kinds == {"qkv", "out", "wide_in", "wide_out"}
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(rest["params"]) == len(names)


def test_batches_are_a_function_of_seed_and_step(parts):
    for augment in ("none", "paper"):
        config = replace(SMALL, augment=augment, bpe_dropout=0.5)
        task, again = make_task(parts, config), make_task(parts, config)
        for step in (3, 0):
            for one, other in zip(task.batch(step)[:2], again.batch(step)[:2], strict=True):
                assert torch.equal(one, other)
        other = make_task(parts, config, seed=1)
        assert not torch.equal(task.batch(0)[1], other.batch(0)[1])


def test_tokens_are_the_argmax_and_captions_fit(parts):
    tokenizer, vae, pairs = parts
    task = make_task(parts)
    text, tokens, _ = task.batch(0)
    chosen = task.sampler.indices(0)
    images = torch.from_numpy(pairs.images[chosen]).permute(0, 3, 1, 2) / 255
    assert torch.equal(tokens, vae.encode(images).flatten(1))
    captions = [pairs.captions[i] for i in chosen]
    assert torch.equal(text, tokenizer.encode(captions, 3))


def test_caption_and_token_dropout_reach_the_model(parts):
    task = make_task(parts, replace(SMALL, caption_dropout=0.5, token_dropout=0.5))
    seen = []
    task.model.register_forward_pre_hook(
        lambda _, given, options: seen.append((*given, options["keep"])), with_kwargs=True
    )
    for step in range(6):
        task.train_step(step)
    text = torch.cat([call[0] for call in seen])
    keep = torch.cat([call[2] for call in seen]).float()
    assert 0.2 < float((text == PAD).all(1).float().mean()) < 0.8
    assert 0.4 < float(keep.mean()) < 0.6
    stored = task.tokenizer.encode(task.pairs.captions, 3)
    assert bool((stored != PAD).any(1).all())


def test_start_from_the_codebook_keeps_distances(parts):
    codes = parts[1].codebook().detach()
    centred = codes - codes.mean(0)
    wanted = torch.cdist(centred, centred) / centred.square().sum(1).mean().sqrt()
    for rank in (0, 8):
        model = make_task(parts, image_rank=rank).model
        init_from_codebook(model, codes, 0.5, 2.0, seed=1)
        table = model.image_widen(model.image_embedding.weight)
        torch.testing.assert_close(torch.cdist(table, table), 0.5 * wanted, atol=2e-3, rtol=1e-3)
        head = model.image_head.weight
        torch.testing.assert_close(torch.cdist(head, head), 2 * wanted, atol=8e-3, rtol=1e-3)


SIXTEEN = {"precision": "fp16-scaled", "half_weights": True}


@pytest.mark.parametrize(("cut", "sizes"), [(3, {}), (7, {}), (11, {}), (5, SIXTEEN)])
def test_resume_is_bit_for_bit(parts, tmp_path, cut, sizes):
    config = replace(SMALL, caption_dropout=0.2, token_dropout=0.1, bpe_dropout=0.1)
    config = replace(config, decay="plateau", plateau_window=2, plateau_patience=1)
    config = replace(config, stochastic_rounding=bool(sizes))
    options = {"picture_every": 0, "checkpoint_every": 100}
    whole = make_task(parts, config, dropout=0.1, **sizes)
    train(whole, LoopConfig(out=tmp_path / "whole", steps=14, **options))
    first = make_task(parts, config, dropout=0.1, **sizes)
    train(first, LoopConfig(out=tmp_path / "cut", steps=cut, **options))
    second = make_task(parts, config, dropout=0.1, **sizes)
    train(second, LoopConfig(out=tmp_path / "cut", steps=14, **options))
    assert second.state() == whole.state()
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
    for name, value in whole.average.average.items():
        assert torch.equal(value, second.average.average[name])


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"text_vocab": 9}, "prior train: text_vocab must be at least the tokenizer's"),
        ({"image_vocab": 31}, "prior train: image_vocab must be the dVAE's 32, got 31"),
        ({"grid": (4, 5)}, r"prior train: grid must be square, got \(4, 5\)"),
    ],
)
def test_sizes_must_fit(parts, overrides, line):
    with pytest.raises(UsageError, match=line):
        make_task(parts, **overrides)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"decay": "linear"}, "decay must be one of plateau, cosine, none, got 'linear'"),
        ({"decay": "cosine"}, "decay_steps must be 1 or more, got 0"),
        ({"caption_dropout": 1.0}, r"caption_dropout must be in \[0, 1\), got 1.0"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
    ],
)
def test_bad_recipe(values, line):
    with pytest.raises(UsageError, match=f"prior train: {line}"):
        PriorTrainConfig(**values)


def test_command(parts, tmp_path, capsys):
    tokenizer, vae, pairs = parts
    data = tmp_path / "data"
    data.mkdir()
    from PIL import Image

    for i, caption in enumerate(pairs.captions):
        Image.fromarray(pairs.images[i]).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(caption)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    vae.save_pretrained(tmp_path / "vae")
    words = ["prior", "train", "--data", str(data), "--image-size", "8", "--text-len", "6"]
    words += ["--tokenizer", str(tmp_path / "tokenizer"), "--vae", str(tmp_path / "vae")]
    words += ["--out", str(tmp_path / "out"), "--batch-size", "4", "--augment", "none"]
    assert main([*words, "--steps", "2", "--device", "cpu"]) == 0
    assert "2 updates" in capsys.readouterr().out
    prior = Prior.from_pretrained(tmp_path / "out" / "model")
    assert prior.config.grid == (4, 4) and prior.config.text_len == 6
    assert prior.config.precision == "fp32"  # the CPU's default
    words[words.index("--out") + 1] = str(tmp_path / "half")
    half = ["--precision", "fp16-scaled", "--half-weights"]
    assert main([*words, *half, "--steps", "2", "--device", "cpu"]) == 0
    prior = Prior.from_pretrained(tmp_path / "half" / "model")
    assert prior.layers[0].mlp.wide_in.weight.dtype == torch.float16
    assert main([*words, *half, "--steps", "2", "--optimizer", "adamw"]) == 2
    assert "optimizer must be adamw16 for half_weights, got adamw" in capsys.readouterr().err
    assert main([*words, "--steps", "2", "--preset", "huge"]) == 2
    assert "preset must be one of tiny" in capsys.readouterr().err
