"""A small ranker with all that it is trained on."""

from __future__ import annotations

import numpy as np
import torch

from dalle.data.pairs import ArrayPairs
from dalle.ranker.model import ContrastiveRanker
from dalle.tokenizer import Tokenizer
from dalle.train.ranker import RankerTask, RankerTrainConfig

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 80, 220),
    "pink": (250, 130, 190),
}
HALVES = ("left", "right")


def toy_pairs(count=160, seed=0):
    """One half of a 16-pixel picture in a colour: 8 captions, noisy pictures."""
    rng = np.random.default_rng(seed)
    names = [(c, h) for c in COLOURS for h in HALVES]
    chosen = [names[i % len(names)] for i in range(count)]
    images = rng.integers(90, 160, (count, 16, 16, 3))
    for image, (colour, half) in zip(images, chosen, strict=True):
        part = slice(0, 8) if half == "left" else slice(8, 16)
        image[:, part] = np.array(COLOURS[colour]) + rng.integers(-20, 20, (16, 8, 3))
    captions = [f"{colour} on the {half}" for colour, half in chosen]
    return ArrayPairs("toy", images.clip(0, 255).astype(np.uint8), captions)


def toy_task(config, seed=0, pairs=None, steps=60):
    pairs = pairs or toy_pairs()
    torch.manual_seed(seed)
    tokenizer = Tokenizer.train(pairs.captions, vocab_size=300)
    ranker = ContrastiveRanker.from_preset(
        "tiny", tokenizer=tokenizer, image_size=16, grid=4, width=32, depth=1, embed_dim=32
    )
    return RankerTask(ranker, pairs, config, steps=steps, seed=seed)


SMALL = RankerTrainConfig(batch_size=16, num_spliced=4, warmup=5, learning_rate=4e-3)
