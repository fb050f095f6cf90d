"""A batch in micro-batches trains as one batch so many times as large, in all three trainings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dalle.dvae.model import DiscreteVAE
from dalle.errors import UsageError
from dalle.train.accumulate import micro_batches
from dalle.train.config import LoopConfig
from dalle.train.dvae import DvaeTask, DvaeTrainConfig
from dalle.train.fine_tune import freeze
from dalle.train.loop import train
from dalle.train.metrics import read_metrics
from dalle.train.prior_recipe import PriorTrainConfig
from dalle.train.ranker import RankerTrainConfig
from support.dvae import PATCH, WARM, some_pairs
from support.prior import SMALL, make_parts, make_task
from support.ranker import SMALL as RANKER
from support.ranker import toy_task

STEPS = 4
DROPS = {"caption_dropout": 0.3, "token_dropout": 0.2, "bpe_dropout": 0.2, "augment": "paper"}
SCALED = {"precision": "fp16-scaled", "d_model": 64}


def values_of(task, keys):
    found = [task.train_step(step) for step in range(STEPS)]
    return {key: [float(values[key]) for values in found] for key in keys}


def same(one, other, first=1e-6, later=1e-5):
    for key, values in one.items():
        assert values[0] == pytest.approx(other[key][0], rel=first), key
        assert values == pytest.approx(other[key], rel=later), key


@pytest.mark.parametrize(
    ("changes", "sizes", "later"),
    [
        (DROPS, {}, 1e-5),
        ({"parts": 2}, {}, 1e-5),
        ({}, {"text_targets": "padded", "checkpointing": True}, 1e-5),
        ({"optimizer": "adamw16"}, {}, 1e-5),
        ({}, SCALED, 2e-3),  # sums of fp16 gradients in another order
    ],
)
def test_prior(changes, sizes, later):
    keys = ("loss", "text_loss", "image_loss")
    whole = make_task(make_parts(), replace(SMALL, batch_size=12, **changes), **sizes)
    cut = replace(SMALL, batch_size=4, accumulate=3, **changes)
    ours = values_of(make_task(make_parts(), cut, **sizes), keys)
    same(ours, values_of(whole, keys), later=later)


def test_dvae_through_warm_start_and_codes():
    def task(**changes):
        torch.manual_seed(0)
        config = replace(WARM, warm_start_steps=2, **changes)
        return DvaeTask(DiscreteVAE(PATCH), some_pairs(), config)

    keys = ("loss", "psnr", "grad_norm")
    whole, cut = task(batch_size=4), task(batch_size=2, accumulate=2)
    same(values_of(cut, keys), values_of(whole, keys))
    assert torch.equal(cut.counts, whole.counts)


@pytest.mark.parametrize("patterns", [(), ("log_scale", "text.*")])
def test_ranker_has_the_negatives_of_the_whole_batch(patterns):
    def task(**changes):
        made = toy_task(replace(RANKER, **changes))
        freeze("ranker train", made.model, patterns)
        return type(made)(made.ranker, made.pairs, made.config, steps=60)

    keys = ("loss", "accuracy", "scale", "grad_norm")
    whole = task(batch_size=24, num_spliced=6)
    cut = task(batch_size=8, num_spliced=2, accumulate=3)
    same(values_of(cut, keys), values_of(whole, keys))


def test_the_loop_writes_what_one_large_batch_writes(tmp_path):
    for name, sizes in (
        ("whole", {"batch_size": 8}),
        ("cut", {"batch_size": 2, "accumulate": 4}),
    ):
        task = make_task(make_parts(), replace(SMALL, **sizes))
        train(task, LoopConfig(out=tmp_path / name, steps=3, log_every=1, picture_every=0))
    records = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut")]
    for one, other in zip(*records, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_all_processes_take_as_many_micro_batches():
    for total in range(2, 20):
        for accumulate in range(1, 9):
            parts = [total // 2, total - total // 2]
            counts = {len(micro_batches(size, total, accumulate, 2)) for size in parts}
            assert len(counts) == 1 and counts.pop() <= accumulate


@pytest.mark.parametrize("kind", [PriorTrainConfig, DvaeTrainConfig, RankerTrainConfig])
def test_number_of_micro_batches(kind):
    with pytest.raises(UsageError, match="accumulate must be "):
        kind(accumulate=0)
