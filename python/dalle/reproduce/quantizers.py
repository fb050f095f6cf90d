"""The gumbel relaxation and straight-through beside each other (2.1).

A discrete VAE of the recipe of shapes is trained with each quantizer and several seeds, everything
else the same, then a prior on the codes of each; both are scored on pictures that no training has
seen. `python -m benchmarks.quantizers` records that; the record comes with the package.

Letters: S side of a picture in pixels.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dalle import pictures
from dalle.data.augment import to_tensor
from dalle.data.pairs import Pairs, all_captions
from dalle.data.shapes_pairs import ShapesPairs
from dalle.dvae.codebook import codebook_health
from dalle.dvae.likelihood import set_psnr
from dalle.dvae.model import DiscreteVAE
from dalle.dvae.straight_through import QUANTIZERS
from dalle.errors import DataError
from dalle.evaluate.cache import in_parts
from dalle.evaluate.results import table
from dalle.files import json_sha256, read_bytes, read_object
from dalle.prior.model import Prior
from dalle.recipes import DemoRecipe, load_recipe, scaled
from dalle.reproduce.context import OWNER, Context
from dalle.reproduce.figure import Figure
from dalle.reproduce.sizes import QuantizerSizes
from dalle.tokenizer import Tokenizer
from dalle.train.config import LoopConfig
from dalle.train.dvae import DvaeTask
from dalle.train.held_out import held_out_scores
from dalle.train.loop import train
from dalle.train.prior import PriorTask
from dalle.train.seeds import start_seed
from dalle.train.task import Task, averaged_model
from dalle.version import __version__

FOLDER = Path(__file__).parent
RECORD, PICTURE = FOLDER / "recorded_quantizers.json", FOLDER / "recorded_quantizers.png"
SHOWN = 12
NUMBERS = (
    "psnr", "codes_used", "perplexity", "prior_loss", "bits_a_picture", "joint_bits",
    "dvae_seconds", "prior_seconds",
)  # fmt: skip
COLUMNS = {
    "psnr": ("PSNR, dB", 2),
    "codes_used": ("codes used", 1),
    "perplexity": ("perplexity", 1),
    "prior_loss": ("prior, nats a code", 3),
    "bits_a_picture": ("bits of the codes", 0),
    "joint_bits": ("bits of codes and picture", 0),
}


def recipe_of(sizes: QuantizerSizes) -> DemoRecipe:
    """The recipe of shapes with the numbers of updates of `sizes`."""
    recipe = load_recipe("shapes", sizes.preset)
    factor = sizes.scale * sizes.prior_scale
    assert recipe.vae_train is not None  # of shapes
    return replace(
        recipe,
        vae_train=scaled(recipe.vae_train, sizes.scale),
        vae_steps=max(1, round(recipe.vae_steps * sizes.scale)),
        prior_train=scaled(recipe.prior_train, factor),
        prior_steps=max(1, round(recipe.prior_steps * factor)),
    )


def _run(task: Task, steps: int) -> float:
    """Trains in the common loop and keeps nothing on the disk; seconds."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dalle-quantizers-") as folder:
        loop = LoopConfig(
            out=Path(folder), steps=steps, log_every=max(1, steps // 4), checkpoint_every=steps,
            picture_every=0,
        )  # fmt: skip
        train(task, loop)
    return time.monotonic() - begin


def _trained_dvae(
    recipe: DemoRecipe, pairs: Pairs, seed: int, quantizer: str, device: torch.device
) -> tuple[DiscreteVAE, float]:
    """The averaged weights, in evaluation mode, and the seconds of the training."""
    torch.manual_seed(start_seed(seed, "dvae"))
    vae = DiscreteVAE(recipe.vae).to(device)
    assert recipe.vae_train is not None  # of shapes
    task = DvaeTask(vae, pairs, replace(recipe.vae_train, quantizer=quantizer), seed=seed)
    seconds = _run(task, recipe.vae_steps)
    with averaged_model(task) as model:
        assert isinstance(model, DiscreteVAE)
        averaged = {name: value.clone() for name, value in model.state_dict().items()}
    vae.load_state_dict(averaged)
    return vae.eval(), seconds


def measure(
    recipe: DemoRecipe, seed: int, quantizer: str, device: torch.device
) -> tuple[dict[str, Any], Tensor]:
    """Trains both models with one quantizer and seed.

    Returns:
        A row of numbers, and unseen pictures beside their reconstructions: (SHOWN, 2, 3, S, S)
        float32 in [0, 1], on the CPU.
    """
    pairs, unseen = (
        ShapesPairs(split, image_size=recipe.image_size, seed=seed, size=count)
        for split, count in (("train", recipe.items), ("test", recipe.unseen_items))
    )
    vae, seconds = _trained_dvae(recipe, pairs, seed, quantizer, device)
    images = to_tensor(list(unseen.images))
    decoded, tokens = vae.reconstruct(images)
    health = codebook_health(torch.bincount(tokens.flatten(), minlength=vae.num_tokens))
    tokenizer = Tokenizer.train(all_captions(pairs), vocab_size=recipe.vocab_size)
    torch.manual_seed(start_seed(seed, "prior"))
    prior = Prior(recipe.prior_config(tokenizer, vae)).to(device)
    task = PriorTask(
        prior, tokenizer, vae, pairs, recipe.prior_train, seed=seed, validation=unseen
    )  # fmt: skip
    prior_seconds = _run(task, recipe.prior_steps)
    scores = held_out_scores(task, recipe.prior_steps, averaged=True)
    psnr = float(set_psnr(images, decoded))
    bits = scores["image_loss"] * tokens[0].numel() / math.log(2)
    # Of the picture given its tokens: a Gaussian of the reconstructions' own error, 8-bit values.
    variance = 255**2 * 10 ** (-psnr / 10)
    left = images[0].numel() / 2 * math.log2(2 * math.pi * math.e * variance)
    row = {
        "quantizer": quantizer,
        "seed": seed,
        "psnr": psnr,
        "codes_used": health.used,
        "perplexity": health.perplexity,
        "prior_loss": scores["image_loss"],
        "bits_a_picture": bits,
        "joint_bits": bits + left,
        "dvae_seconds": round(seconds, 1),
        "prior_seconds": round(prior_seconds, 1),
    }
    return row, torch.stack([images[:SHOWN], decoded[:SHOWN]], 1)


def compare(
    sizes: QuantizerSizes, device: torch.device, cache: Path
) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """What `measure` gives for each seed and each of `QUANTIZERS`.

    Args:
        sizes: seeds and numbers of updates.
        device: where to train.
        cache: folder where each is kept at once; a stopped comparison goes on from there.

    Returns:
        The rows, and the pictures of the first seed, one of each quantizer.
    """
    recipe = recipe_of(sizes)
    jobs = [(seed, quantizer) for seed in sizes.seeds for quantizer in QUANTIZERS]
    side = recipe.image_size

    def compute(items: Sequence[int], done: Callable[[int], None]) -> dict[str, Tensor]:
        (item,) = items
        row, shown = measure(recipe, *jobs[item], device)
        numbers = torch.tensor([row[name] for name in NUMBERS], dtype=torch.float64, device="cpu")
        done(1)
        return {"numbers": numbers, "shown": shown.contiguous()}

    def whole(read: dict[str, Tensor], count: int) -> bool:
        numbers, shown = read.get("numbers"), read.get("shown")
        return (
            numbers is not None
            and shown is not None
            and numbers.shape == (len(NUMBERS),)
            and shown.shape[1:] == (2, 3, side, side)
        )

    about = {"recipe": repr(recipe), "jobs": jobs, "version": __version__, "device": device.type}
    parts, _ = in_parts(
        OWNER, cache / json_sha256(about)[:16], len(jobs), 1, compute,
        name="trainings with two quantizers", check=whole,
    )  # fmt: skip
    rows = [
        {"quantizer": quantizer, "seed": seed, **dict(zip(NUMBERS, each, strict=True))}
        for (seed, quantizer), each in zip(
            jobs, (part["numbers"].tolist() for part in parts), strict=True
        )
    ]
    return rows, [part["shown"] for part in parts[: len(QUANTIZERS)]]


def means(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, of each quantizer."""
    summary = []
    for quantizer in QUANTIZERS:
        own = [row for row in rows if row["quantizer"] == quantizer]
        line: dict[str, Any] = {"quantizer": quantizer, "seeds": len(own)}
        for name in COLUMNS:
            values = torch.tensor([row[name] for row in own], dtype=torch.float64, device="cpu")
            deviation = float(values.std()) if len(own) > 1 else 0.0
            line[name] = [float(values.mean()), deviation]
        summary.append(line)
    return summary


def in_words(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Quantizer -> column -> mean and standard deviation in words."""
    return {
        line["quantizer"]: {
            words: f"{line[name][0]:.{digits}f} ± {line[name][1]:.{digits}f}"
            for name, (words, digits) in COLUMNS.items()
        }
        for line in means(rows)
    }


def picture(sheets: Sequence[Tensor]) -> Image.Image:
    """Three rows: unseen pictures, then the reconstructions of each of `QUANTIZERS`.

    Args:
        sheets: of `measure`, one of each quantizer, of one seed.
    """
    shown = torch.cat([sheets[0][:, 0], *(sheet[:, 1] for sheet in sheets)])
    return pictures.grid(shown, columns=len(sheets[0]), scale=3)


def quantizers(context: Context) -> Figure:
    """The gumbel relaxation beside straight-through, trained here or as it was recorded."""
    sizes = context.sizes.quantizers
    if sizes is None:
        found = read_object(RECORD, DataError)
        machine = found["machine"]
        rows, image = found["rows"], read_bytes(PICTURE)
        name = context.save("quantizers.png", image)
        updates = {key: found[key] for key in ("dvae_steps", "prior_steps")}
        source = f"recorded on {machine['date']} ({machine['cpu']})"
        missing = (
            f"Not trained in this run: the table was {source} and comes with the package. "
            "--full trains both here."
        )
    else:
        recipe = recipe_of(sizes)
        rows, sheets = compare(sizes, context.device, context.cache / "quantizers")
        name = context.save("quantizers.png", picture(sheets))
        updates = {"dvae_steps": recipe.vae_steps, "prior_steps": recipe.prior_steps}
        source, missing = "trained here", ""
    words = in_words(rows)
    cells = [[quantizer, *columns.values()] for quantizer, columns in words.items()]
    seeds = len({row["seed"] for row in rows})
    return Figure(
        text="The same dVAE trained with the gumbel relaxation and with straight-through, then a "
        f"prior on the codes of each; mean and standard deviation over {seeds} "
        f"{'seeds' if seeds > 1 else 'seed'}. Unseen pictures over the reconstructions of both.",
        pictures=[name],
        ours={"table": words, "means": means(rows), "source": source, **updates},
        paper={"claim": "the relaxation, annealed to 1/16, is what the paper trains with; 2.1 "
               "names straight-through (VQ) as the other way"},
        tables=[table(["quantizer", *(title for title, _ in COLUMNS.values())], cells, source)],
        command=context.own_command("quantizers"),
        differs=f"Small dVAEs of the set shapes, {updates['dvae_steps']} updates, and priors of "
        f"{updates['prior_steps']}; the paper compares in words only.",
        missing=missing,
    )  # fmt: skip
