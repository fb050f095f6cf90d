"""How fast this machine trains, measured on a few updates of the very models before they begin."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from dalle.data.decoded import decode_alone
from dalle.data.pairs import Pairs, all_captions
from dalle.data.split import Subset
from dalle.demo.sets import varied
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
SLOW = 0.01  # seconds of a decoded picture, above which an update decodes none
DECODE = "decode"  # a picture of codes, beside the stages
EXTRA = 1.1  # checkpoints, pictures and scores beside the updates


class _Few(Subset):
    """Some items for the trial, in one order: a part of a mixture may have none among them."""

    def mixture(self) -> None:
        return None


class Pace(NamedTuple):
    """Seconds of a stage: those of one update, and those that do not hang on their number."""

    update: float
    fixed: float

    def seconds(self, updates: int) -> float:
        """Of the stage with so many updates."""
        return self.fixed + EXTRA * updates * self.update


def measure(
    recipe: DemoRecipe,
    pairs: Pairs,
    device: torch.device,
    drawn: int,
    ready: DiscreteVAE | None = None,
) -> dict[str, Pace]:
    """The pace of every stage. Takes some seconds, and trains copies that are thrown away.

    Args:
        recipe: sizes of the models.
        pairs: the training pairs.
        device: where to compute.
        drawn: pictures that the samples' stage draws.
        ready: the dVAE, where it is trained already and `pairs` are codes; then `DECODE` has the
            seconds of a picture that is decoded, and the ranker's do not have them.
    """
    few = _Few(pairs, varied(pairs, ITEMS))
    paces: dict[str, Pace] = {}
    with torch.random.fork_rng(devices=[]):
        if ready is None:
            vae, paces["dvae"], trip = _of_dvae(recipe, few, len(pairs), device)
            read = trip * len(pairs)
        else:
            vae, read = ready, 0.0
            tokens = torch.zeros(vae.grid(recipe.image_size), dtype=torch.int64, device="cpu")
            trip = _fastest(lambda: decode_alone(vae, tokens), device)
            paces |= {"dvae": Pace(0.0, 1.0), DECODE: Pace(trip, 0.0)}
            few = few if trip <= SLOW else _Few(pairs, varied(pairs, DRAWN))
        tokenizer = Tokenizer.train(all_captions(few), vocab_size=recipe.vocab_size)
        ranker_model = ContrastiveRanker.from_preset(
            "tiny", tokenizer=tokenizer, image_size=recipe.image_size, **recipe.ranker
        ).to(device)
        ranker_model.train_precision = default_precision(device)
        of_ranker = vae if ready is None or trip <= SLOW else None
        ranker = RankerTask(ranker_model, few, recipe.ranker_train, of_ranker, steps=1000)
        sizes = recipe.prior_config(tokenizer, vae, default_precision(device))
        prior_model = Prior(sizes).to(device)
        prior = PriorTask(prior_model, tokenizer, vae, few, recipe.prior_train)
        text = tokenizer.encode(list(few.captions[:DRAWN]), prior_model.config.text_len - 1)
        paces |= {
            "ranker": Pace(_fastest(lambda: ranker.train_step(0), device), 1 + read),
            "prior": Pace(_fastest(lambda: prior.train_step(0), device), 1 + read / 2),
        }
        prior_model.eval()
        begin = time.perf_counter()
        prior_model.generate(text.to(device), seed=0)
        parts = PARTS if device.type == "cpu" else 1
        drawing = (time.perf_counter() - begin) / len(text) / parts
        guided = 1.0 if recipe.sampling.cond_scale == 1 else 2.0
        samples = Pace(0.0, 2 + drawn * (guided * drawing + trip))
    return {**paces, "data": Pace(0.0, 1.0), "samples": samples, "report": Pace(0.0, 2.0)}


def _of_dvae(
    recipe: DemoRecipe, few: Subset, num_pairs: int, device: torch.device
) -> tuple[DiscreteVAE, Pace, float]:
    """A new dVAE, the pace of its stage, and the seconds of a picture through it and back."""
    config = recipe.vae_train
    assert config is not None
    vae = DiscreteVAE(recipe.vae).to(device)
    vae.train_precision = default_precision(device)
    dvae = DvaeTask(vae, few, config)
    warm = config.warm_start_steps
    update = _fastest(lambda: dvae.train_step(warm + 1), device)
    if warm:
        share = min(1.0, warm / max(1, recipe.vae_steps))
        first = _fastest(lambda: dvae.train_step(0), device)
        update = share * first + (1 - share) * update
    vae.eval()
    trip = _fastest(lambda: vae.decode(vae.encode(dvae.images(np.arange(len(few)), 32))), device)
    trip /= min(32, len(few))
    points = min(config.codebook_points, num_pairs * math.prod(vae.grid(recipe.image_size)))
    codebook = 3e-12 * points * recipe.vae.vocab_size * recipe.vae.n_init if warm else 0.0
    return vae, Pace(update, 2 + codebook + 2 * trip * min(2048, num_pairs)), trip


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
