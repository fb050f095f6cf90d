"""Copies of models, by `copy` and by pickle, compute what the original does."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from dalle.dvae.model import DiscreteVAE, DiscreteVAEConfig
from dalle.prior.config import PriorConfig
from dalle.prior.model import Prior
from dalle.ranker.model import ContrastiveRanker
from dalle.tokenizer import Tokenizer
from dalle.train.averaging import IterateAverage

COPY = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}
IMAGES = torch.linspace(0, 1, 2 * 3 * 16 * 16, dtype=torch.float32).view(2, 3, 16, 16)


def tokenizer():
    return Tokenizer.train(["a red square", "a blue circle"], 270)


def prior():
    sizes = {"text_vocab": 20, "image_vocab": 16, "text_len": 4, "grid": (3, 3)}
    return Prior(PriorConfig(d_model=32, num_heads=2, num_layers=3, **sizes))


def vae():
    config = {"n_hid": 8, "n_blk_per_group": 1, "n_init": 8, "vocab_size": 16}
    return DiscreteVAE(DiscreteVAEConfig(stem="patch", patch=8, **config))


def ranker():
    return ContrastiveRanker.from_preset("tiny", tokenizer=tokenizer(), image_size=16)


MADE = {
    "Prior": (prior, lambda m: m.generate(torch.tensor([[1, 2, -1]]), num_samples=2, seed=1)),
    "DiscreteVAE": (vae, lambda m: m(IMAGES, tau=1.0, kl_weight=1.0, seed=3).loss),
    "ContrastiveRanker": (ranker, lambda m: m.scores(["a red square", "a circle"], IMAGES)),
    "Tokenizer": (tokenizer, lambda m: m.encode(["a red"], 5, dropout=0.5, seed=2)),
    "IterateAverage": (
        lambda: IterateAverage(prior(), 0.9),
        lambda m: torch.cat([tensor.flatten() for tensor in m.average.values()]),
    ),
}


@pytest.mark.parametrize("way", COPY)
@pytest.mark.parametrize("name", MADE)
def test_copies_compute_the_same(name, way):
    make, use = MADE[name]
    torch.manual_seed(0)
    original = make()
    wanted = use(original)
    assert torch.equal(use(COPY[way](original)), wanted)
    assert torch.equal(use(original), wanted)
