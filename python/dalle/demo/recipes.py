"""One recipe of the demo: sizes, numbers of updates, how samples are drawn.

The numbers of each model stand in `recipes_dvae`, `recipes_ranker` and `recipes_prior`; what was
tried is in docs/log.md. All of them are step counts, so that results do not hang on the machine's
load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from dalle.demo.parts import PARTS
from dalle.demo.recipes_dvae import DVAE_RECIPES
from dalle.demo.recipes_prior import PRIOR_RECIPES
from dalle.demo.recipes_ranker import RANKER_RECIPES
from dalle.dvae import DiscreteVAE, DiscreteVAEConfig
from dalle.errors import UsageError
from dalle.prior import PriorConfig
from dalle.tokenizer import Tokenizer
from dalle.train.dvae import DvaeTrainConfig
from dalle.train.prior_recipe import PriorTrainConfig
from dalle.train.ranker import RankerTrainConfig

LEAST = 0.01  # of the default numbers of updates
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DemoRecipe:
    """Everything the demo's stages need to know.

    Attributes:
        image_size: side of a picture in pixels.
        vocab_size: ids of the tokenizer.
        items: training pictures drawn (shapes only).
        unseen_items: pictures of each unseen split that are reconstructed (shapes only).
        num_captions: captions drawn per split and kind at most.
        num_samples: samples of each.
        vae, vae_train, vae_steps: the discrete VAE and its training.
        ranker, ranker_train: overrides of the ranker's preset "tiny", and its training.
        prior, prior_train, prior_steps: sizes without vocabularies and grid, and its training.
        sampling: options of `Pipeline.sample`.
        seconds: what each stage takes; of the default recipes on two idle cores with AVX-512.
        fixed: how many of these do not hang on the number of updates.
    """

    image_size: int
    vocab_size: int
    items: int
    unseen_items: int
    num_captions: int
    num_samples: int
    vae: DiscreteVAEConfig
    vae_train: DvaeTrainConfig
    vae_steps: int
    ranker: dict[str, int]
    ranker_train: RankerTrainConfig
    prior: dict[str, Any]
    prior_train: PriorTrainConfig
    prior_steps: int
    sampling: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    fixed: dict[str, float] = field(default_factory=dict)

    def prior_config(self, tokenizer: Tokenizer, vae: DiscreteVAE) -> PriorConfig:
        """The prior's sizes, with the vocabularies and the grid of the other parts."""
        return PriorConfig(
            text_vocab=tokenizer.vocab_size,
            image_vocab=vae.num_tokens,
            grid=vae.grid(self.image_size),
            **self.prior,
        )


def scaled(config: T, factor: float) -> T:
    """A training config whose numbers of updates (`steps`, `..._steps`, `warmup`) are scaled."""
    changes = {
        f.name: max(1, round(getattr(config, f.name) * factor))
        for f in fields(config)  # type: ignore[arg-type]
        if (f.name == "steps" or f.name.endswith("_steps") or f.name == "warmup")
        and getattr(config, f.name)
    }
    return replace(config, **changes)  # type: ignore[type-var]


def smoke_recipe(data: str) -> DemoRecipe:
    """A few updates of the smallest sizes: shows that all parts work, teaches nothing."""
    ranker = RANKER_RECIPES[data, "smoke"]
    return DemoRecipe(
        image_size=32,
        vocab_size=512,
        items=256,
        unseen_items=16,
        num_captions=8,
        num_samples=8,
        vae=DiscreteVAEConfig(
            stem="patch", patch=8, n_hid=32, n_blk_per_group=1, n_init=16, vocab_size=64
        ),
        vae_train=DvaeTrainConfig(
            image_size=32,
            batch_size=8,
            tau_steps=10,
            kl_weight=0.0,
            lr_start=1e-3,
            lr_end=1e-4,
            lr_steps=20,
            augment="none",
            average_warmup=True,
            warm_start_steps=10,
            codebook_images=64,
            parts=PARTS,
        ),
        vae_steps=20,
        ranker=ranker.model,
        ranker_train=ranker.train,
        prior={"text_len": 24, "d_model": 32, "num_heads": 2, "num_layers": 2, "kernel_size": 3},
        prior_train=PriorTrainConfig(
            batch_size=8,
            lr=1e-3,
            warmup_steps=2,
            optimizer="muon",
            augment="none",
            average_warmup=True,
            parts=PARTS,
        ),
        prior_steps=20,
        seconds=dict.fromkeys(("dvae", "ranker", "prior", "samples"), 1.0),
    )


def load_recipe(
    data: str, preset: str, minutes: float | None, pace: Mapping[str, float] | None = None
) -> DemoRecipe:
    """The recipe of a demo; `minutes` scales every number of updates.

    Args:
        data: "emoji" or "shapes".
        preset: "default" or "smoke".
        minutes: wanted; None takes the recipe as it is.
        pace: stage -> how many times the recipe's seconds this machine takes, 1 where left out.

    Raises:
        UsageError: fewer minutes than the rest takes without any update.
    """
    recipe = smoke_recipe(data) if preset == "smoke" else default_recipe(data)
    pace = pace or {}
    seconds = {stage: pace.get(stage, 1.0) * s for stage, s in recipe.seconds.items()}
    fixed = {stage: pace.get(stage, 1.0) * recipe.fixed.get(stage, 0.0) for stage in seconds}
    if minutes is None:
        return replace(recipe, seconds=seconds, fixed=fixed)
    rest = sum(fixed.values())
    factor = (60 * minutes - rest) / max(sum(seconds.values()) - rest, 1.0)
    if factor < LEAST:
        least = (rest + LEAST * (sum(seconds.values()) - rest)) / 60
        raise UsageError(f"demo: minutes must be {least:.2g} or more here, got {minutes}")
    return replace(
        recipe,
        vae_train=scaled(recipe.vae_train, factor),
        vae_steps=max(1, round(recipe.vae_steps * factor)),
        ranker_train=scaled(recipe.ranker_train, factor),
        prior_train=scaled(recipe.prior_train, factor),
        prior_steps=max(1, round(recipe.prior_steps * factor)),
        seconds={stage: fixed[stage] + factor * (s - fixed[stage]) for stage, s in seconds.items()},
        fixed=fixed,
    )


def default_recipe(data: str) -> DemoRecipe:
    """The demo of minutes."""
    vae, ranker, prior = (
        DVAE_RECIPES[data],
        RANKER_RECIPES[data, "default"],
        PRIOR_RECIPES[data],
    )
    return DemoRecipe(
        image_size=vae.image_size,
        vocab_size=16_384,
        items=36_000,
        unseen_items=500,
        num_captions=144 if data == "emoji" else 96,
        num_samples=8,
        vae=vae.model,
        vae_train=vae.train,
        vae_steps=vae.steps,
        ranker=ranker.model,
        ranker_train=ranker.train,
        prior=prior.model,
        prior_train=prior.train,
        prior_steps=prior.steps,
        sampling=prior.sampling,
        seconds={
            "data": 3.0,
            "dvae": vae.seconds,
            "ranker": ranker.seconds,
            "prior": prior.seconds,
            "samples": prior.samples_seconds,
            "report": 2.0,
        },
        fixed={
            "data": 3.0,
            "dvae": vae.fixed,
            "ranker": ranker.fixed,
            "prior": prior.fixed,
            "samples": prior.samples_seconds,
            "report": 2.0,
        },
    )
