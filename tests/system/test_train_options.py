"""Impossible training options get one line from the config, before anything is built."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from dalle.data.shapes import ShapesConfig
from dalle.demo.config import DemoConfig
from dalle.distributed.config import ClusterConfig
from dalle.dvae.model import DiscreteVAEConfig
from dalle.errors import UsageError
from dalle.prior.config import PriorConfig
from dalle.ranker.blocks import RankerConfig
from dalle.train.config import LoopConfig
from dalle.train.dvae import DvaeTrainConfig
from dalle.train.prior_recipe import PriorTrainConfig
from dalle.train.ranker import RankerTrainConfig

KINDS = [
    (PriorTrainConfig, {}),
    (DvaeTrainConfig, {}),
    (RankerTrainConfig, {}),
    (LoopConfig, {"out": Path("out"), "steps": 1}),
    (ClusterConfig, {}),
    (PriorConfig, {}),
    (DiscreteVAEConfig, {}),
    (RankerConfig, {}),
    (ShapesConfig, {}),
    (DemoConfig, {"minutes": 1.0}),
]


def numbers(kind, given):
    """Name and value of the fields that hold a number."""
    config = kind(**given)
    for field in dataclasses.fields(kind):
        value = getattr(config, field.name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield field.name, value


@pytest.mark.parametrize(("kind", "given"), KINDS)
def test_no_number_may_be_nan_infinite_or_absurd(kind, given):
    for name, value in numbers(kind, given):
        wrong = [math.nan, math.inf, -math.inf]
        wrong += [2**63, -(2**63) - 1, value + 0.5] if isinstance(value, int) else []
        for bad in wrong:
            with pytest.raises(UsageError, match=f"{name} must be ") as caught:
                kind(**{**given, name: bad})
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "given"), KINDS)
def test_no_number_may_be_negative(kind, given):
    for name, _ in numbers(kind, given):
        with pytest.raises(UsageError, match=f"{name} must be "):
            kind(**{**given, name: -1})


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (PriorTrainConfig, "batch_size", 10**12),
        (PriorTrainConfig, "lr", 1e30),
        (PriorTrainConfig, "embedding_scale", 1e30),
        (PriorTrainConfig, "average_every", 0),
        (PriorTrainConfig, "plateau_window", 0),
        (PriorTrainConfig, "average_decay", 1.0),
        (DvaeTrainConfig, "image_size", 10**6),
        (DvaeTrainConfig, "codebook_iterations", 10**9),
        (DvaeTrainConfig, "codebook_points", 0),
        (RankerTrainConfig, "batch_size", 10**12),
        (RankerTrainConfig, "clip_norm", 0.0),
        (PriorConfig, "num_layers", 10**6),
        (PriorConfig, "text_len", 10**9),
        (PriorConfig, "grid", (4096, 4096)),
        (PriorConfig, "grid", (10**9, 1)),
        (DiscreteVAEConfig, "group_count", 60),
        (DiscreteVAEConfig, "n_blk_per_group", 10**6),
        (DiscreteVAEConfig, "vocab_size", 10**9),
        (RankerConfig, "depth", 10**6),
        (ShapesConfig, "canvas", 8 * 10**6),
        (ShapesConfig, "kind_weights", (math.inf, 1.0, 1.0, 1.0)),
    ],
)
def test_what_would_hang_or_lie_gets_its_line_at_once(kind, name, value):
    with pytest.raises(UsageError, match="must be"):
        kind(**{name: value})


def test_integers_of_any_kind_are_taken():
    assert PriorTrainConfig(batch_size=np.int64(8)).batch_size == 8
    assert LoopConfig(out=Path("x"), steps=np.int32(3), seed=np.uint64(7)).steps == 3
