"""A small prior with all that it is trained on."""

from __future__ import annotations

import numpy as np
import torch

from dalle.data.pairs import ArrayPairs
from dalle.distributed.parallelize import parallelize
from dalle.distributed.world import Solo
from dalle.dvae.codebook import init_codebook
from dalle.dvae.model import DiscreteVAE
from dalle.prior.config import PAD, PriorConfig
from dalle.prior.model import Prior
from dalle.tokenizer import Tokenizer
from dalle.train.prior import PriorTask
from dalle.train.prior_recipe import PriorTrainConfig

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 80, 220)}
SMALL = PriorTrainConfig(
    batch_size=8,
    lr=1e-2,
    warmup_steps=5,
    decay="cosine",
    decay_steps=60,
    augment="none",
    bpe_dropout=0.0,
    average_every=1,
    average_decay=0.9,
    weight_decay=0.0,
)


def make_parts():
    """Twelve flat pictures of 8 pixels, a tokenizer, and a dVAE with a 4 x 4 grid."""
    rng = np.random.default_rng(0)
    names = list(COLOURS) * 4
    images = np.array([COLOURS[n] for n in names])[:, None, None] + rng.integers(
        -3, 3, (12, 8, 8, 3)
    )
    pairs = ArrayPairs("toy", images.clip(0, 255).astype(np.uint8), names)
    tokenizer = Tokenizer.train(names, vocab_size=300)
    torch.manual_seed(0)
    vae = DiscreteVAE.from_preset(
        "tiny", stem="patch", patch=2, n_hid=16, n_blk_per_group=1, n_init=8, vocab_size=32
    )
    pictures = torch.from_numpy(pairs.images).permute(0, 3, 1, 2) / 255
    init_codebook(vae, pictures, sharpness=4.0, iterations=3, max_points=192, seed=0)
    return tokenizer, vae.eval(), pairs


def make_task(parts, config=SMALL, seed=0, world=None, **overrides):
    tokenizer, vae, pairs = parts
    torch.manual_seed(seed)
    sizes = {"text_vocab": tokenizer.vocab_size, "image_vocab": 32, "text_len": 4, "grid": (4, 4)}
    sizes |= {"d_model": 32, "num_heads": 2, "num_layers": 2, "kernel_size": 3, "init_gain": 1.0}
    prior = Prior.from_preset("tiny", **(sizes | overrides))
    world = world or Solo()
    parallelize(prior, world, prior.resblocks().values(), owner="prior train", compressible=True)
    return PriorTask(prior, tokenizer, vae, pairs, config, seed=seed, world=world)


def make(seed: int = 0, **overrides) -> Prior:
    """A small model whose outputs differ from zero, in evaluation mode."""
    torch.manual_seed(seed)
    sizes = {"text_vocab": 11, "image_vocab": 7, "text_len": 5, "grid": (3, 4), "d_model": 32}
    sizes |= {"num_heads": 2, "num_layers": 3, "kernel_size": 3, "init_gain": 1.0}
    model = Prior(PriorConfig(**(sizes | overrides)))
    for head in (model.text_head, model.image_head):
        torch.nn.init.normal_(head.weight, std=0.3)
    return model.eval()


def sample(model: Prior, batch: int = 2, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    c = model.config
    text = torch.randint(c.text_vocab, (batch, c.text_len - 1), generator=rng)
    text[0, 2:] = PAD
    return text, torch.randint(c.image_vocab, (batch, c.num_image_tokens), generator=rng)
