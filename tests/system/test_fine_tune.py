"""`--init-from` and `--freeze`: what a training starts from, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dalle.dvae.model import PRESETS as DVAES
from dalle.dvae.model import DiscreteVAE
from dalle.errors import CheckpointError, UsageError
from dalle.prior.config import PRESETS as PRIORS
from dalle.prior.model import Prior
from dalle.ranker.blocks import PRESETS as RANKERS
from dalle.train.config import LoopConfig
from dalle.train.dvae import DvaeTask, DvaeTrainConfig
from dalle.train.fine_tune import (
    FineTuneConfig,
    check_trained_on,
    cut_or_lengthened,
    fill_from,
    freeze,
    interpolated,
    load_start,
    say_sizes_stay,
    start_from,
)
from dalle.train.loop import train
from dalle.train.prior import PriorTask
from support.prior import SMALL, make, make_parts, make_task
from support.ranker import SMALL as RANKER
from support.ranker import toy_task


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_all_weights_are_those_of_the_saved_model_and_its_hash_goes_with_them(tmp_path):
    make(seed=3).save_pretrained(tmp_path)
    saved, model = load_start(Prior, tmp_path), make(seed=4)
    assert not same(saved, model)
    lines = start_from("prior train", model, saved, FineTuneConfig(init_from=tmp_path))
    assert same(saved, model) and lines == [f"starts from {tmp_path}"]
    assert model.trained_on["init_from"].startswith("SHA-256 ")


def test_a_preset_of_other_sizes_is_said_to_do_nothing(capsys):
    for presets, one, other, line in (
        (PRIORS, "tiny", "small", "d_model 128, not 256; num_layers 4, not 8"),
        (DVAES, "small", "base", "n_hid 64, not 128; n_blk_per_group 1, not 2"),
        (RANKERS, "base", "tiny", "width 512, not 96; depth 6, not 2; embed_dim 512, not 256"),
    ):
        say_sizes_stay("x train", other, presets[other], presets[one])
        say_sizes_stay("x train", one, replace(presets[one]), presets[one])
        said = f"x train: note: sizes are those of init-from, not of preset {other}: {line}\n"
        assert capsys.readouterr().err == said


def test_position_tables_are_fitted_and_the_rest_is_kept():
    saved, model = make(seed=1), make(seed=2, grid=(6, 2), text_len=7)
    lines = fill_from("prior train", model, saved)
    assert torch.equal(model.image_embedding.weight, saved.image_embedding.weight)
    assert torch.equal(model.text_position[:5], saved.text_position)
    assert torch.equal(model.text_position[5:], saved.text_position[-1:].expand(2, -1))
    assert torch.equal(model.image_row[0], saved.image_row[0])
    torch.testing.assert_close(
        model.image_row[1], 0.75 * saved.image_row[0] + 0.25 * saved.image_row[1]
    )
    torch.testing.assert_close(model.image_column[0], saved.image_column[:2].mean(0))
    assert sorted(lines) == [
        "image_column: 2 positions interpolated from 4",
        "image_row: 6 positions interpolated from 3",
        "text_padding: 5 positions, and 2 that start as copies of the last",
        "text_position: 5 positions, and 2 that start as copies of the last",
    ]


def test_tables_of_equal_length_and_shorter_ones():
    table = torch.randn(6, 3)
    torch.testing.assert_close(interpolated(table, 6)[0], table)
    shorter, words = cut_or_lengthened(table, 2)
    assert torch.equal(shorter, table[:2]) and words == "the first 2 of 6 positions"


@pytest.mark.parametrize("changes", [{"d_model": 64}, {"num_layers": 4}, {"image_vocab": 8}])
def test_other_shapes_are_refused_and_nothing_changes(changes):
    model = make(seed=2, **changes)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UsageError, match=r"^prior train: \S+ (of init-from )?must be "):
        fill_from("prior train", model, make(seed=1))
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_another_tokenizer_or_dvae_is_refused_and_an_unknown_one_is_said():
    where, now = Path("saved"), {"tokenizer": "SHA-256 a", "vae": "SHA-256 b"}
    assert list(check_trained_on("prior train", where, now, now)) == []
    lines = list(check_trained_on("prior train", where, {"vae": "SHA-256 b"}, now))
    assert lines == ["saved does not say which tokenizer it was trained with"]
    with pytest.raises(UsageError, match="vae must be the one that saved was trained with"):
        list(check_trained_on("prior train", where, {**now, "vae": "SHA-256 c"}, now))


def test_a_model_of_another_class_is_refused(tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="class must be DiscreteVAE, got Prior"):
        load_start(DiscreteVAE, tmp_path)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw16", "muon"])
def test_frozen_parameters_keep_their_bits_while_the_others_move(tmp_path, optimizer):
    parts = make_parts()
    task = make_task(parts)
    patterns = ("layers.0.*", "*embedding*", "layers.1.attention.*", "layers.1.mlp.*")
    assert freeze("prior train", task.model, patterns)[0].endswith("parameters are frozen")
    config = replace(SMALL, optimizer=optimizer, parts=1)
    frozen = PriorTask(task.model, *parts, config)
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    train(frozen, LoopConfig(out=tmp_path, steps=2, picture_every=0))
    for name, parameter in task.model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == parameter.requires_grad, name
    names = {"layers.0.mlp.wide_in.weight", "image_embedding.weight"}
    assert names <= set(frozen.describe()["frozen"])


def test_frozen_parts_of_dvae_and_ranker_keep_their_bits(tmp_path):
    _, vae, pairs = make_parts()
    freeze("dvae train", vae, ["encoder*"])
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    config = DvaeTrainConfig(image_size=8, batch_size=4, augment="none")
    train(DvaeTask(vae, pairs, config), LoopConfig(out=tmp_path / "dvae", steps=1, picture_every=0))
    ranker = toy_task(RANKER).ranker
    freeze("ranker train", ranker, ["text.*"])
    before |= {name: p.detach().clone() for name, p in ranker.named_parameters()}
    task = toy_task(RANKER)
    task = type(task)(ranker, task.pairs, RANKER, steps=2)
    train(task, LoopConfig(out=tmp_path / "ranker", steps=1, picture_every=0))
    for name, parameter in [*vae.named_parameters(), *ranker.named_parameters()]:
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name]), name
    moved = [n for n, p in ranker.named_parameters() if not torch.equal(p, before[n])]
    assert moved and not [name for name in moved if name.startswith("text.")]


@pytest.mark.parametrize(
    ("patterns", "line"),
    [
        (["layers.9.*"], "freeze must be patterns of parameters, got 'layers.9.*', which fits"),
        (["*"], "freeze must leave a parameter to train, got all frozen"),
    ],
)
def test_patterns_that_fit_nothing_or_everything_are_refused(patterns, line):
    with pytest.raises(UsageError, match="^prior train: ") as caught:
        freeze("prior train", make(), patterns)
    assert line in str(caught.value)
