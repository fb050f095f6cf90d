"""Sizes and numbers of updates for somebody's own pictures, from their number, size and the time.

The numbers of the tier "quick" were tried (docs/log.md); those above follow from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from dalle.configs import check_numbers, require
from dalle.data.pairs import Pairs, evenly_spaced
from dalle.dvae.model import DiscreteVAE
from dalle.errors import DataError, UsageError
from dalle.prior.sampling import SamplingConfig
from dalle.recipes import DemoRecipe, DvaeRecipe, quick_dvae, quick_prior, quick_ranker
from dalle.tokenizer import Tokenizer

SAMPLED = 64  # pictures whose sizes are looked at
CAPTIONS = 20_000  # captions whose lengths are looked at
POINTS_A_CODE = 24  # parts of pictures for each code, at least
SMALLEST = 8  # pixels
TRY = 8  # drawn pictures of a caption


class Tier(NamedTuple):
    """What a length of time pays for.

    Attributes:
        minutes: in all.
        side: pixels of a picture at most.
        grid: codes along a side.
        codes: at most.
        dvae_width: channels of the dVAE.
        prior_width, prior_layers: of the prior; heads of 32 channels.
        text_len: at most.
        dvae_steps, ranker_steps: updates.
        epochs: of the prior, as far as the time reaches.
    """

    minutes: float
    side: int
    grid: int
    codes: int
    dvae_width: int
    prior_width: int
    prior_layers: int
    text_len: int
    dvae_steps: int
    ranker_steps: int
    epochs: int


TIERS = {
    "quick": Tier(4.5, 36, 12, 1024, 96, 128, 4, 32, 800, 350, 40),
    "hour": Tier(57, 64, 16, 4096, 192, 256, 6, 48, 5_000, 2_500, 100),
    "night": Tier(480, 128, 16, 8192, 256, 384, 8, 64, 40_000, 20_000, 100),
}
# On a GPU the same time pays for the next larger models.
CUDA_TIERS = {
    "quick": TIERS["hour"]._replace(minutes=5),
    "hour": TIERS["night"]._replace(minutes=57),
    "night": Tier(480, 256, 32, 8192, 256, 768, 16, 128, 200_000, 50_000, 100),
}


@dataclass(frozen=True, kw_only=True)
class SizesConfig:
    """Sizes and numbers of updates; each that is left out is chosen.

    Args:
        image_size: side of the pictures in pixels, a multiple of twice the patch.
        patch: pixels along a side of what one code stands for.
        codes: in the codebook of the dVAE.
        dvae_width: channels of the dVAE.
        dvae_steps: its updates, two thirds of which make the autoencoder that it starts from.
        ranker_steps: updates of the ranker.
        prior_width: channels of the prior, a multiple of 32.
        prior_layers: resblocks of the prior.
        prior_steps: updates of the prior.
        text_len: tokens of a caption that the prior reads.
        temperature: of the drawing.
        cond_scale: strength of the guidance by the caption, 1 for none.
        num_samples: pictures drawn of a caption, of which the ranker chooses.
    """

    image_size: int | None = None
    patch: int | None = None
    codes: int | None = None
    dvae_width: int | None = None
    dvae_steps: int | None = None
    ranker_steps: int | None = None
    prior_width: int | None = None
    prior_layers: int | None = None
    prior_steps: int | None = None
    text_len: int | None = None
    temperature: float | None = None
    cond_scale: float | None = None
    num_samples: int | None = None

    def __post_init__(self) -> None:
        check_numbers("train", self)

        def at_least(low: int, *names: str) -> None:
            require("train", self, f"{low} or more", lambda x: x is None or x >= low, *names)

        at_least(1, "image_size", "patch", "ranker_steps", "prior_layers", "prior_steps")
        at_least(1, "num_samples", "dvae_width")
        at_least(2, "dvae_steps", "codes", "text_len")
        at_least(0, "temperature")
        require(
            "train",
            self,
            "a multiple of 32",
            lambda x: x is None or (x >= 32 and x % 32 == 0),
            "prior_width",
        )


def picture_side(pairs: Pairs) -> int:
    """The side that nineteen of twenty pictures have at least, from up to 64 of them.

    Raises:
        DataError: none decodes.
    """
    sides = []
    for item in evenly_spaced(len(pairs), SAMPLED):
        try:
            sides.append(min(pairs.load(int(item)).shape[:2]))
        except DataError:
            continue
    if not sides:
        raise DataError(f"train: {pairs.name} must hold a picture that decodes, got none that does")
    return int(np.quantile(sides, 0.05, method="lower"))


def text_length(captions: Sequence[str], limit: int) -> int:
    """Text positions for nineteen of twenty captions, start-of-text included, a multiple of 4."""
    some = captions[:: max(1, len(captions) // CAPTIONS)]
    tokenizer = Tokenizer.train(some, vocab_size=16_384)
    lengths = (tokenizer.encode(list(some), limit) >= 0).sum(1).numpy()
    needed = int(np.quantile(lengths, 0.95, method="higher")) + 1
    return min(limit, -(-needed // 4) * 4)


def choose(given: SizesConfig, pairs: Pairs, tier: Tier, *, ready: bool = False) -> SizesConfig:
    """Every size, as given or chosen for a folder's training pairs.

    Args:
        given: sizes that are settled; with codes those of their dVAE too.
        pairs: the training pairs.
        tier: what the time pays for.
        ready: whether the dVAE is ready, which has no settings of a training then.

    Raises:
        UsageError: sizes that do not fit each other.
        DataError: no picture decodes.
    """
    values = {f.name: getattr(given, f.name) for f in fields(given)}

    def fill(name: str, value: Any) -> Any:
        if values[name] is None:
            values[name] = value
        return values[name]

    if not ready:
        _choose_dvae(values, fill, pairs, tier)
    fill("ranker_steps", tier.ranker_steps)
    fill("prior_width", tier.prior_width)
    fill("prior_layers", tier.prior_layers)
    fill("prior_steps", max(500, tier.epochs * len(pairs) // 16))
    if values["text_len"] is None:
        values["text_len"] = text_length(pairs.captions, tier.text_len)
    fill("temperature", 0.5)
    fill("cond_scale", 1.0)
    fill("num_samples", TRY)
    return SizesConfig(**values)


def _choose_dvae(
    values: dict[str, Any], fill: Callable[[str, Any], Any], pairs: Pairs, tier: Tier
) -> None:
    """Fills in the sizes of pictures and dVAE."""
    if values["image_size"] is None:
        side = min(tier.side, picture_side(pairs))
        patch = fill("patch", max(1, -(-side // tier.grid)))
        grid = min(tier.grid, side // patch) // 2 * 2
        if side < SMALLEST or not grid:
            raise DataError(
                f"train: pictures must be at least {max(SMALLEST, 2 * patch)} pixels wide and "
                f"high, got {side} as the side of the smallest twentieth"
            )
        values["image_size"] = grid * patch
    sides = [p for p in range(1, values["image_size"]) if values["image_size"] % (2 * p) == 0]
    patch = fill(
        "patch", min(sides, key=lambda p: abs(values["image_size"] / p - tier.grid), default=1)
    )
    if values["image_size"] % (2 * patch):
        raise UsageError(
            f"train: image_size must be a multiple of {2 * patch}, twice the patch, "
            f"got {values['image_size']}"
        )
    points = len(pairs) * (values["image_size"] // patch) ** 2
    fill("codes", num_codes(points, tier, 2))
    if values["codes"] > points:
        raise UsageError(
            f"train: codes must be at most {points}, as many as the pictures have parts, "
            f"got {values['codes']}"
        )
    fill("dvae_width", tier.dvae_width)
    fill("dvae_steps", tier.dvae_steps)


def ranker_grid(image_size: int) -> int:
    """The even number of patches along an even side that is nearest to 8.

    Args:
        image_size: side of the pictures in pixels.

    Raises:
        UsageError: the side is odd or less than 2.
    """
    if image_size < 2 or image_size % 2:
        raise UsageError(f"ranker: image_size must be even and at least 2, got {image_size}")
    even = [g for g in range(2, image_size + 1, 2) if image_size % g == 0]
    return min(even, key=lambda g: max(g / 8, 8 / g))


def num_codes(points: int, tier: Tier, minimum: int) -> int:
    """The power of two of codes that so many parts of pictures can fill."""
    return 1 << (max(minimum, min(tier.codes, points // POINTS_A_CODE)).bit_length() - 1)


def fitted_dvae(
    steps: int, *, image_size: int, patch: int, width: int, codes: int, warm: int | None = None
) -> DvaeRecipe:
    """The quick recipe of a dVAE on a folder, at a step size and sharpness that are safe there.

    Args:
        steps: updates.
        image_size: side of the pictures in pixels, an even multiple of the patch.
        patch: pixels along a side of what one code stands for.
        width: channels.
        codes: in the codebook.
        warm: updates of the warm start; two thirds if left out.
    """
    return quick_dvae(
        steps,
        image_size=image_size,
        warm=warm,
        model={
            "patch": patch,
            "n_hid": width,
            "n_blk_per_group": 2,
            "n_init": min(32, width),
            "vocab_size": codes,
        },
        lr_start=4e-4,
        codebook_sharpness=1.0,
        codebook_points=max(codes, 40_000),
    )


def build(
    sizes: SizesConfig, num_pairs: int, vae: DiscreteVAE | None = None, augment: str = "none"
) -> DemoRecipe:
    """The recipe of all stages at sizes that are all chosen.

    Args:
        sizes: all of them.
        num_pairs: of the training.
        vae: the dVAE that is ready; None trains one.
        augment: which crops the prior learns from.
    """
    s: Any = sizes
    model, training = None if vae is None else vae.config, None
    if model is None:
        dvae = fitted_dvae(
            s.dvae_steps,
            image_size=s.image_size,
            patch=s.patch,
            width=s.dvae_width,
            codes=s.codes,
        )
        model, training = dvae.model, dvae.train
    return DemoRecipe(
        image_size=s.image_size,
        vocab_size=16_384,
        items=num_pairs,
        unseen_items=0,
        num_captions=96,
        num_samples=s.num_samples,
        vae=model,
        vae_train=training,
        vae_steps=s.dvae_steps or 0,
        ranker={"grid": ranker_grid(s.image_size), "text_len": s.text_len},
        ranker_train=quick_ranker(s.ranker_steps),
        ranker_steps=s.ranker_steps,
        prior={
            "text_len": s.text_len,
            "d_model": s.prior_width,
            "num_heads": max(1, s.prior_width // 32),
            "num_layers": s.prior_layers,
            "kernel_size": 5,
            "init_gain": 0.5,
        },
        prior_train=quick_prior(s.prior_steps, augment=augment),
        prior_steps=s.prior_steps,
        sampling=SamplingConfig(temperature=s.temperature, cond_scale=s.cond_scale),
    )


def within(sizes: SizesConfig, given: SizesConfig, factor: float) -> SizesConfig:
    """The sizes with every number of updates that was not given times `factor`, at most 1."""
    factor = min(1.0, factor)
    values: dict[str, Any] = {f.name: getattr(sizes, f.name) for f in fields(sizes)}
    for name in ("dvae_steps", "ranker_steps", "prior_steps"):
        if getattr(given, name) is None and values[name] is not None:
            values[name] = max(2, round(values[name] * factor))
    return SizesConfig(**values)
