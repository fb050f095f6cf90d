"""Small trainings of each kind, with everything random that there is."""

from __future__ import annotations

from collections import Counter

import numpy as np

from dalle.data.pairs import ArrayPairs
from dalle.dvae.model import DiscreteVAE
from dalle.prior.model import Prior
from dalle.ranker.model import ContrastiveRanker
from dalle.tokenizer import Tokenizer
from dalle.train.dvae import DvaeTask, DvaeTrainConfig
from dalle.train.prior import PriorTask
from dalle.train.prior_recipe import PriorTrainConfig
from dalle.train.ranker import RankerTask, RankerTrainConfig

STEPS = 50


def squares():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 4, 4, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    return ArrayPairs("squares", images, [f"square {i % 7}" for i in range(24)], Counter())


def small_vae():
    sizes = {"stem": "patch", "patch": 4, "n_hid": 16, "n_blk_per_group": 1, "n_init": 8}
    return DiscreteVAE.from_preset("tiny", **sizes, vocab_size=32)


def dvae_task(seed):
    """Continuous codes, k-means, then the relaxation, with the paper's crops."""
    config = DvaeTrainConfig(image_size=16, batch_size=4, warm_start_steps=20, health_every=10)
    return DvaeTask(small_vae(), squares(), config, seed=seed)


def prior_task(seed):
    """With everything random that there is: crops, merges, captions, tokens, residual branches."""
    tokenizer = Tokenizer.train(squares().captions, vocab_size=270)
    sizes = {"text_vocab": 270, "image_vocab": 32, "text_len": 8, "grid": (4, 4), "dropout": 0.1}
    sizes |= {"d_model": 32, "num_heads": 2, "num_layers": 3, "kernel_size": 3}
    config = PriorTrainConfig(batch_size=4, caption_dropout=0.1, token_dropout=0.1)
    prior = Prior.from_preset("tiny", **sizes)
    return PriorTask(prior, tokenizer, small_vae(), squares(), config, seed=seed)


def ranker_task(seed):
    tokenizer = Tokenizer.train(squares().captions, vocab_size=270)
    sizes = {"image_size": 16, "grid": 4, "width": 32, "depth": 1, "embed_dim": 16}
    ranker = ContrastiveRanker.from_preset("tiny", tokenizer=tokenizer, **sizes)
    config = RankerTrainConfig(batch_size=8, num_spliced=4)
    return RankerTask(ranker, squares(), config, steps=STEPS, seed=seed)
