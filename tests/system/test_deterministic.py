"""R11: two runs of 50 updates with one seed and `deterministic` end with the same bits."""

from __future__ import annotations

import pytest
import torch

from dalle.train.config import LoopConfig
from dalle.train.loop import train
from support.repeatable import STEPS, dvae_task, prior_task, ranker_task
from support.tiny_task import state_hash


@pytest.mark.parametrize("make_task", [dvae_task, prior_task, ranker_task])
def test_same_seed_same_bits(tmp_path, make_task):
    hashes = []
    for run, seed in enumerate((0, 0, 1)):
        torch.manual_seed(seed)
        task = make_task(seed)
        loop = {"out": tmp_path / str(run), "steps": STEPS, "seed": seed, "picture_every": 0}
        train(task, LoopConfig(**loop, deterministic=True, checkpoint_every=STEPS))
        hashes.append(state_hash(task))
    assert hashes[0] == hashes[1] != hashes[2]
