"""Recipes for the built-in data sets: sizes, numbers of updates, how samples are drawn.

Numbers of updates, not minutes, so that results do not depend on the machine's load. What was
tried is in docs/log.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from dalle.dvae.model import DiscreteVAE, DiscreteVAEConfig
from dalle.errors import UsageError
from dalle.prior.config import PriorConfig
from dalle.prior.sampling import SamplingConfig
from dalle.tokenizer import Tokenizer
from dalle.train.dvae import DvaeTrainConfig
from dalle.train.parts import PARTS
from dalle.train.prior_recipe import PriorTrainConfig
from dalle.train.ranker import RankerTrainConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True, kw_only=True)
class DvaeRecipe:
    """Canvas in pixels, sizes, training, number of updates."""

    image_size: int
    model: DiscreteVAEConfig
    train: DvaeTrainConfig
    steps: int


def quick_dvae(
    steps: int,
    *,
    image_size: int,
    warm: int | None = None,
    model: Mapping[str, int] | None = None,
    **changes: Any,
) -> DvaeRecipe:
    """The recipe of runs that take minutes, for any number of updates.

    From scratch they collapse to a few dozen codes, so a continuous autoencoder comes first; mean
    squared error sharpens the picture faster than the likelihood does; and the KL term, which the
    paper needs to spread the codes, has nothing to do where k-means has spread them.

    Args:
        steps: updates, those of the warm start included; at least 2.
        image_size: side of the pictures in pixels, a multiple of the patch.
        warm: updates of the warm start; two thirds if left out.
        model: fields of `DiscreteVAEConfig` beside the patch stem.
        changes: fields of `DvaeTrainConfig`.
    """
    if warm is None:
        warm = max(1, round(0.67 * steps))
    options: dict[str, Any] = {
        "batch_size": 16,
        "tau_start": 0.3,
        "tau_steps": round(0.6 * (steps - warm)),
        "kl_weight": 0.0,
        "kl_steps": 0,
        "lr_end": 5e-5,
        "lr_steps": steps - warm,
        "beta2": 0.99,
        "average_decay": 0.99,
        "average_warmup": True,
        "augment": "none",
        "distortion": "mse",
        "warm_start_steps": warm,
        "parts": PARTS,
    }
    return DvaeRecipe(
        image_size=image_size,
        model=DiscreteVAEConfig(stem="patch", **(model or {})),
        train=DvaeTrainConfig(image_size=image_size, **(options | changes)),
        steps=steps,
    )


DVAE_RECIPES: dict[str, DvaeRecipe] = {
    "emoji": quick_dvae(
        1000,
        image_size=40,
        warm=700,
        model={"patch": 5, "n_hid": 128, "n_blk_per_group": 2, "n_init": 32, "vocab_size": 2048},
        lr_start=1e-3,
        codebook_sharpness=4.0,
    ),
    "shapes": quick_dvae(
        1000,
        image_size=24,
        warm=600,
        model={"patch": 2, "n_hid": 48, "n_blk_per_group": 1, "n_init": 16, "vocab_size": 128},
        lr_start=4e-4,
        codebook_sharpness=1.0,
    ),
}


@dataclass(frozen=True, kw_only=True)
class PriorRecipe:
    """Sizes, training and sampling of the demo's prior.

    Attributes:
        model: fields of `PriorConfig`; vocabularies and grid come from tokenizer and dVAE.
        train: the training recipe.
        steps: updates.
        sampling: how a code is drawn.
    """

    model: dict[str, Any] = field(default_factory=dict)
    train: PriorTrainConfig = field(default_factory=PriorTrainConfig)
    steps: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


def quick_prior(steps: int, **changes: Any) -> PriorTrainConfig:
    """The recipe that all short runs share: a cosine to zero, one code per image, a warm start.

    The paper's augmentation and BPE dropout blur what a few epochs have to learn by heart; its
    warm-up alone would outlast the run; and Muon needs half of AdamW's updates.

    Args:
        steps: updates.
        changes: fields of `PriorTrainConfig`.
    """
    options: dict[str, Any] = {
        "batch_size": 16,
        "lr": 4e-3,
        "warmup_steps": max(1, min(60, steps // 10)),
        "decay": "cosine",
        "decay_steps": steps,
        "augment": "none",
        "bpe_dropout": 0.0,
        "caption_dropout": 0.05,
        "average_every": max(1, min(5, steps // 100)),
        "average_warmup": True,
        "image_init": "codebook",
        "optimizer": "muon",
        "parts": PARTS,
    }
    return PriorTrainConfig(**(options | changes))


def _sizes(text_len: int, **changes: Any) -> dict[str, Any]:
    sizes = {"text_len": text_len, "d_model": 128, "num_heads": 4, "num_layers": 4}
    return {**sizes, "kernel_size": 5, "init_gain": 0.5, **changes}


EMOJI_STEPS, SHAPES_STEPS = 1500, 750

PRIOR_RECIPES: dict[str, PriorRecipe] = {
    "emoji": PriorRecipe(
        model=_sizes(16),
        train=quick_prior(EMOJI_STEPS),
        steps=EMOJI_STEPS,
        sampling=SamplingConfig(temperature=0.5),
    ),
    "shapes": PriorRecipe(
        model=_sizes(16, d_model=192, num_heads=6, num_layers=2, attention=("causal",) * 2),
        train=quick_prior(SHAPES_STEPS, lr=2.5e-3),
        steps=SHAPES_STEPS,
        sampling=SamplingConfig(temperature=0.5, cond_scale=1.5),
    ),
}


@dataclass(frozen=True, kw_only=True)
class RankerRecipe:
    """Sizes (overrides of the preset "tiny"), training, number of updates."""

    model: dict[str, int] = field(default_factory=dict)
    train: RankerTrainConfig = field(default_factory=RankerTrainConfig)
    steps: int = 500


def quick_ranker(steps: int, **changes: Any) -> RankerTrainConfig:
    """The ranker's recipe with a warm-up that fits the number of updates.

    Args:
        steps: updates.
        changes: fields of `RankerTrainConfig`.
    """
    options: dict[str, Any] = {"warmup": max(1, min(50, steps // 10)), "parts": PARTS}
    return RankerTrainConfig(**(options | changes))


RANKER_RECIPES: dict[tuple[str, str], RankerRecipe] = {
    ("emoji", "default"): RankerRecipe(train=quick_ranker(500)),
    ("shapes", "default"): RankerRecipe(train=quick_ranker(600), steps=600),
    ("emoji", "smoke"): RankerRecipe(
        model={"width": 32, "depth": 1, "embed_dim": 32},
        train=RankerTrainConfig(batch_size=16, num_spliced=4, warmup=2, parts=PARTS),
        steps=12,
    ),
    ("shapes", "smoke"): RankerRecipe(
        model={"width": 32, "depth": 1, "embed_dim": 32},
        train=RankerTrainConfig(batch_size=16, num_spliced=4, warmup=2, parts=PARTS),
        steps=12,
    ),
}


LEAST = 0.01  # of the default numbers of updates
T = TypeVar("T", bound="DataclassInstance")


@dataclass(frozen=True, kw_only=True)
class DemoRecipe:
    """Sizes and numbers of updates of all stages of the demo.

    Attributes:
        image_size: side of a picture in pixels.
        vocab_size: ids of the tokenizer.
        items: training pictures drawn (shapes only).
        unseen_items: pictures of each unseen split that are reconstructed (shapes only).
        num_captions: captions drawn per split and kind at most.
        num_samples: samples of each.
        vae, vae_train, vae_steps: the discrete VAE and its training; None and 0 of one that is
            ready.
        ranker, ranker_train, ranker_steps: overrides of the ranker's preset "tiny", its training.
        prior, prior_train, prior_steps: sizes without vocabularies and grid, and its training.
        sampling: how a code is drawn.
        num_candidates: drawn of a caption by `dalle sample` with the finished pipeline.
        seconds: what each stage takes on this machine, once that is measured.
        fixed: how many of these do not hang on the number of updates.
    """

    image_size: int
    vocab_size: int
    items: int
    unseen_items: int
    num_captions: int
    num_samples: int
    vae: DiscreteVAEConfig
    vae_train: DvaeTrainConfig | None
    vae_steps: int
    ranker: dict[str, int]
    ranker_train: RankerTrainConfig
    ranker_steps: int
    prior: dict[str, Any]
    prior_train: PriorTrainConfig
    prior_steps: int
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    num_candidates: int = 64
    seconds: dict[str, float] = field(default_factory=dict)
    fixed: dict[str, float] = field(default_factory=dict)

    def prior_config(
        self, tokenizer: Tokenizer, vae: DiscreteVAE, precision: str = "fp32"
    ) -> PriorConfig:
        """The prior's sizes, with the vocabularies and the grid of the other parts."""
        return PriorConfig(
            text_vocab=tokenizer.vocab_size,
            image_vocab=vae.num_tokens,
            grid=vae.grid(self.image_size),
            precision=precision,
            **self.prior,
        )


def scaled(config: T, factor: float) -> T:
    """A training config whose numbers of updates (`steps`, `..._steps`, `warmup`) are scaled."""
    changes = {
        f.name: max(1, round(getattr(config, f.name) * factor))
        for f in fields(config)
        if (f.name == "steps" or f.name.endswith("_steps") or f.name == "warmup")
        and getattr(config, f.name)
    }
    return replace(config, **changes)


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
        ranker_steps=ranker.steps,
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
    )


def load_recipe(data: str, preset: str) -> DemoRecipe:
    """The recipe of a demo.

    Args:
        data: "emoji" or "shapes".
        preset: "default" or "smoke".
    """
    return smoke_recipe(data) if preset == "smoke" else default_recipe(data)


def factor_for(
    recipe: DemoRecipe, minutes: float, command: str = "demo", least: float | None = None
) -> float:
    """The factor of every number of updates by which all stages together take `minutes`.

    Args:
        recipe: with its `seconds` and `fixed`.
        minutes: wanted.
        command: begins the error's line.
        least: the factor where the minutes are too few for it; None raises.

    Raises:
        UsageError: fewer minutes than the rest takes without any update.
    """
    rest, total = sum(recipe.fixed.values()), sum(recipe.seconds.values())
    factor = (60 * minutes - rest) / max(total - rest, 1.0)
    if least is not None:
        return max(factor, least)
    if factor < LEAST:
        minimum = (rest + LEAST * (total - rest)) / 60
        raise UsageError(f"{command}: minutes must be {minimum:.2g} or more here, got {minutes}")
    return factor


def scale_to(
    recipe: DemoRecipe, minutes: float, command: str = "demo", least: float | None = None
) -> DemoRecipe:
    """The recipe with every number of updates times `factor_for`. Raises as that does."""
    factor, fixed = factor_for(recipe, minutes, command, least), recipe.fixed
    seconds = recipe.seconds
    return replace(
        recipe,
        vae_train=None if recipe.vae_train is None else scaled(recipe.vae_train, factor),
        vae_steps=recipe.vae_steps and max(1, round(recipe.vae_steps * factor)),
        ranker_train=scaled(recipe.ranker_train, factor),
        ranker_steps=max(1, round(recipe.ranker_steps * factor)),
        prior_train=scaled(recipe.prior_train, factor),
        prior_steps=max(1, round(recipe.prior_steps * factor)),
        seconds={stage: fixed[stage] + factor * (s - fixed[stage]) for stage, s in seconds.items()},
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
        ranker_steps=ranker.steps,
        prior=prior.model,
        prior_train=prior.train,
        prior_steps=prior.steps,
        sampling=prior.sampling,
    )
