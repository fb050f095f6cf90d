"""How fast this machine trains, measured on a few updates of the very models before they begin."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from dalle.data.pairs import Pairs, all_captions, evenly_spaced
from dalle.data.split import Subset
from dalle.devices import default_precision
from dalle.dvae.model import DiscreteVAE
from dalle.prior.model import Prior
from dalle.ranker.model import ContrastiveRanker
from dalle.recipes import DemoRecipe
from dalle.tokenizer import Tokenizer
from dalle.train.dvae import DvaeTask
from dalle.train.parts import PARTS
from dalle.train.prior import PriorTask
from dalle.train.ranker import RankerTask

ITEMS = 64  # pictures of the trial
ROUNDS = 8  # updates timed of each kind, after two that are not
DRAWN = 16  # pictures drawn in the trial
EXTRA = 1.1  # checkpoints, pictures and scores beside the updates


class Pace(NamedTuple):
    """Seconds of a stage: those of one update, and those that do not hang on their number."""

    update: float
    fixed: float

    def seconds(self, updates: int) -> float:
        """Of the stage with so many updates."""
        return self.fixed + EXTRA * updates * self.update


def measure(recipe: DemoRecipe, pairs: Pairs, device: torch.device, drawn: int) -> dict[str, Pace]:
    """The pace of every stage. Takes some seconds, and trains copies that are thrown away.

    Args:
        recipe: sizes of the models.
        pairs: the training pairs.
        device: where to compute.
        drawn: pictures that the samples' stage draws.
    """
    few = Subset(pairs, evenly_spaced(len(pairs), ITEMS))
    tokenizer = Tokenizer.train(all_captions(few), vocab_size=recipe.vocab_size)
    with torch.random.fork_rng(devices=[]):
        vae = DiscreteVAE(recipe.vae).to(device)
        vae.train_precision = default_precision(device)
        dvae = DvaeTask(vae, few, recipe.vae_train)
        warm = recipe.vae_train.warm_start_steps
        update = _fastest(lambda: dvae.train_step(warm + 1), device)
        if warm:
            share = min(1.0, warm / max(1, recipe.vae_steps))
            first = _fastest(lambda: dvae.train_step(0), device)
            update = share * first + (1 - share) * update
        vae.eval()
        trip = _fastest(
            lambda: vae.decode(vae.encode(dvae.images(np.arange(len(few)), 32))), device
        )
        trip /= min(32, len(few))
        points = min(
            recipe.vae_train.codebook_points, len(pairs) * math.prod(vae.grid(recipe.image_size))
        )
        codebook = 3e-12 * points * recipe.vae.vocab_size * recipe.vae.n_init if warm else 0.0
        ranker_model = ContrastiveRanker.from_preset(
            "tiny", tokenizer=tokenizer, image_size=recipe.image_size, **recipe.ranker
        ).to(device)
        ranker_model.train_precision = default_precision(device)
        ranker = RankerTask(ranker_model, few, recipe.ranker_train, vae, steps=1000)
        sizes = recipe.prior_config(tokenizer, vae, default_precision(device))
        prior_model = Prior(sizes).to(device)
        prior = PriorTask(prior_model, tokenizer, vae, few, recipe.prior_train)
        text = tokenizer.encode(list(few.captions[:DRAWN]), prior_model.config.text_len - 1)
        paces = {
            "dvae": Pace(update, 2 + codebook + 2 * trip * min(2048, len(pairs))),
            "ranker": Pace(_fastest(lambda: ranker.train_step(0), device), 1 + trip * len(pairs)),
            "prior": Pace(_fastest(lambda: prior.train_step(0), device), 1 + trip * len(pairs) / 2),
        }
        prior_model.eval()
        begin = time.perf_counter()
        prior_model.generate(text.to(device), seed=0)
        parts = PARTS if device.type == "cpu" else 1
        drawing = (time.perf_counter() - begin) / len(text) / parts
        guided = 1.0 if recipe.sampling.cond_scale == 1 else 2.0
        samples = Pace(0.0, 2 + drawn * (guided * drawing + trip))
    return {**paces, "data": Pace(0.0, 1.0), "samples": samples, "report": Pace(0.0, 2.0)}


def with_pace(recipe: DemoRecipe, pace: dict[str, Pace]) -> DemoRecipe:
    """The recipe with the seconds that its stages take at this pace."""
    updates = {
        "dvae": recipe.vae_steps,
        "ranker": recipe.ranker_steps,
        "prior": recipe.prior_steps,
    }
    seconds = {stage: p.seconds(updates.get(stage, 0)) for stage, p in pace.items()}
    return replace(
        recipe,
        seconds={stage: round(s, 1) for stage, s in seconds.items()},
        fixed={stage: round(p.fixed, 1) for stage, p in pace.items()},
    )


def _fastest(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some calls: other work on the machine, which may be gone a moment
    later, slows the others down, and a training planned for it would be cut too short."""
    seconds = []
    for number in range(ROUNDS + 2):
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= 2:  # the first are slower
            seconds.append(time.perf_counter() - begin)
    return min(seconds)
