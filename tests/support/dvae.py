"""Small discrete VAEs and pictures for them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import torch

from dalle.data.pairs import ArrayPairs
from dalle.dvae.model import DiscreteVAE, DiscreteVAEConfig
from dalle.train.dvae import DvaeTask, DvaeTrainConfig

PATCH = DiscreteVAEConfig(
    stem="patch", patch=4, n_hid=16, n_blk_per_group=1, n_init=8, vocab_size=16
)
SHORT = DvaeTrainConfig(
    image_size=8,
    batch_size=4,
    tau_start=0.5,
    tau_steps=10,
    kl_weight=0.1,
    kl_steps=5,
    lr_start=1e-3,
    lr_end=1e-4,
    lr_steps=20,
    health_every=4,
)
WARM = replace(SHORT, augment="none", warm_start_steps=6, average_decay=0.9, average_warmup=True)


def some_pairs(n=24, size=12, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 3, 3, 3), np.uint8).repeat(size // 3, 1).repeat(size // 3, 2)
    return ArrayPairs("squares", images, ["x"] * n, Counter())


def make_task(config=WARM, model=PATCH, seed=0):
    torch.manual_seed(seed)
    return DvaeTask(DiscreteVAE(model), some_pairs(), config, seed=seed)
