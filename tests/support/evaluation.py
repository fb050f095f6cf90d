"""Sets of pictures and a pipeline for the tests of `dalle eval`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from dalle.cli import main
from dalle.data.augment import to_tensor
from dalle.data.shapes import COLOURS, Thing, parse, scenes
from dalle.data.shapes_pairs import render
from dalle.dvae.model import DiscreteVAE, DiscreteVAEConfig
from dalle.optional import load_module
from dalle.pipeline import Generation, Pipeline
from dalle.prior.config import PriorConfig
from dalle.prior.model import Prior
from dalle.ranker.model import ContrastiveRanker
from dalle.tokenizer import Tokenizer
from support.toy_pipeline import build


def write_pictures(folder, count, *, side=16, captions=True, seed=0, bright=0):
    """Noise of `side` pixels as PNG files, with or without captions."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = rng.integers(bright, 256, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
        if captions:
            (folder / f"{i:03}.txt").write_text(f"picture {i % 5}\n")
    return folder


def make_eval_home(root):
    """Fills `root`: real, fake (brighter, no captions), one, empty, broken, pipe."""
    write_pictures(root / "real", 24)
    write_pictures(root / "fake", 30, captions=False, seed=1, bright=120)
    write_pictures(root / "one", 1)
    (root / "empty").mkdir()
    write_pictures(root / "broken", 2)
    for path in (root / "broken").glob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    build().save_pretrained(root / "pipe")
    return root


def oracle(name):
    """A module of torch-fidelity or torchmetrics, which both import torchvision."""
    load_module("torchvision", "test", "eval")
    return load_module(name, "test", "eval")


def refused(capsys, words, code):
    """The one line of a refused command."""
    capsys.readouterr()
    assert main(words) == code, capsys.readouterr().err
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


def shapes_pipeline():
    """Draws 24 x 24 pixels for captions of `shapes`; random weights."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([scenes()[0].caption] * 4, vocab_size=280)
    vae = DiscreteVAE(
        DiscreteVAEConfig(stem="patch", patch=4, n_hid=8, n_blk_per_group=1, n_init=8,
                          vocab_size=16)
    )  # fmt: skip
    prior = Prior(
        PriorConfig(text_vocab=280, image_vocab=16, text_len=24, grid=(6, 6), d_model=32,
                    num_heads=2, num_layers=2, kernel_size=3)
    )  # fmt: skip
    ranker = ContrastiveRanker.from_preset(
        "tiny", tokenizer=tokenizer, image_size=24, grid=6, width=32, depth=1, embed_dim=16
    )
    return Pipeline(tokenizer, vae.eval(), prior.eval(), ranker.eval())


class RightFrom(Pipeline):
    """Its candidates from number `first` on show every fact, those before the wrong colours.

    Its scores, of a ranker that never errs, prefer the right ones.
    """

    first = 2

    @classmethod
    def make(cls, first=2):
        other = shapes_pipeline()
        made = cls(other.tokenizer, other.vae, other.prior, other.ranker)
        made.first = first
        return made

    def generate(self, captions, *, num_candidates, top, seed):
        return [self._one(parse(caption), num_candidates, top, seed) for caption in captions]

    def _one(self, scene, count, top, seed):
        rng, names = np.random.default_rng(seed), list(COLOURS)
        wrong = replace(scene, things=tuple(
            Thing(names[(names.index(thing.colour) + 1) % 6], thing.shape) for thing in scene.things
        ))  # fmt: skip
        images = [render(scene if i >= self.first else wrong, rng) for i in range(count)]
        scores = torch.tensor([float(i >= self.first) for i in range(count)])
        order = scores.argsort(descending=True, stable=True)[:top]
        pixels = to_tensor(images)
        return Generation(pixels[order], scores[order], torch.zeros(top, 6, 6).long(), order)
