"""Gumbel relaxation and straight-through gradients beside each other (paper 2.1).

`python -m benchmarks.quantizers` trains the demo's discrete VAE on shapes with each quantizer and
several seeds, everything else the same, then a prior on the codes of each, and scores both on
pictures that no training has seen. `--record` writes a dated result file, `--picture` the pictures
over their reconstructions. Run it in the repository's root.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle import pictures
from dalle.data.augment import to_tensor
from dalle.data.pairs import Pairs, all_captions
from dalle.data.shapes_pairs import ShapesPairs
from dalle.dvae.codebook import codebook_health
from dalle.dvae.likelihood import set_psnr
from dalle.dvae.model import DiscreteVAE
from dalle.prior.model import Prior
from dalle.recipes import DemoRecipe, load_recipe, scaled
from dalle.tokenizer import Tokenizer
from dalle.train.config import LoopConfig
from dalle.train.dvae import DvaeTask
from dalle.train.held_out import held_out_scores
from dalle.train.loop import train
from dalle.train.prior import PriorTask
from dalle.train.seeds import start_seed
from dalle.train.task import Task, averaged_model

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for `python -m`
from harness import record  # noqa: E402

QUANTIZERS = ("gumbel", "straight-through")
SHOWN = 12


def run(task: Task, steps: int) -> float:
    """Trains in the common loop and keeps nothing on the disk; seconds."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        loop = LoopConfig(
            out=Path(folder), steps=steps, log_every=max(1, steps // 4), checkpoint_every=steps,
            picture_every=0,
        )  # fmt: skip
        train(task, loop)
    return time.monotonic() - begin


def trained_dvae(
    recipe: DemoRecipe, pairs: Pairs, seed: int, quantizer: str
) -> tuple[DiscreteVAE, float]:
    """The averaged weights, in evaluation mode, and the seconds of the training."""
    torch.manual_seed(start_seed(seed, "dvae"))
    vae = DiscreteVAE(recipe.vae)
    task = DvaeTask(vae, pairs, replace(recipe.vae_train, quantizer=quantizer), seed=seed)
    seconds = run(task, recipe.vae_steps)
    with averaged_model(task) as model:
        assert isinstance(model, DiscreteVAE)
        averaged = {name: value.clone() for name, value in model.state_dict().items()}
    vae.load_state_dict(averaged)
    return vae.eval(), seconds


def measure(
    recipe: DemoRecipe, seed: int, quantizer: str, items: int
) -> tuple[dict[str, Any], Tensor]:
    """A row of the table, and the first reconstructions of unseen pictures."""
    size = recipe.image_size
    pairs, unseen = (
        ShapesPairs(split, image_size=size, seed=seed, size=count)
        for split, count in (("train", items), ("test", recipe.unseen_items))
    )
    vae, seconds = trained_dvae(recipe, pairs, seed, quantizer)
    images = to_tensor(list(unseen.images))
    decoded, tokens = vae.reconstruct(images)
    health = codebook_health(torch.bincount(tokens.flatten(), minlength=vae.num_tokens))
    tokenizer = Tokenizer.train(all_captions(pairs), vocab_size=recipe.vocab_size)
    torch.manual_seed(start_seed(seed, "prior"))
    prior = Prior(recipe.prior_config(tokenizer, vae))
    task = PriorTask(
        prior, tokenizer, vae, pairs, recipe.prior_train, seed=seed, validation=unseen
    )  # fmt: skip
    prior_seconds = run(task, recipe.prior_steps)
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
    return row, torch.cat([images[:SHOWN, None], decoded[:SHOWN, None]], 1)


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, of each quantizer."""
    summary = []
    for quantizer in QUANTIZERS:
        own = [row for row in rows if row["quantizer"] == quantizer]
        line: dict[str, Any] = {"quantizer": quantizer, "seeds": len(own)}
        for name in (
            "psnr",
            "codes_used",
            "perplexity",
            "prior_loss",
            "bits_a_picture",
            "joint_bits",
        ):
            values = np.array([row[name] for row in own], dtype=np.float64)
            deviation = float(values.std(ddof=1)) if len(own) > 1 else 0.0
            line[name] = [float(values.mean()), deviation]
        summary.append(line)
    return summary


def table(rows: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Quantizer -> column -> mean and standard deviation in words."""
    names = {
        "psnr": ("PSNR, dB", 2), "codes_used": ("codes used", 1), "perplexity": ("perplexity", 1),
        "prior_loss": ("prior, nats a code", 3), "bits_a_picture": ("bits of the codes", 0),
        "joint_bits": ("bits of codes and picture", 0),
    }  # fmt: skip
    return {
        line["quantizer"]: {
            words: f"{line[name][0]:.{digits}f} ± {line[name][1]:.{digits}f}"
            for name, (words, digits) in names.items()
        }
        for line in means(rows)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all numbers of updates")
    parser.add_argument("--prior-scale", type=float, default=0.4, help="also of the prior's")
    parser.add_argument("--picture", type=Path, help="PNG of the first seed to write")
    parser.add_argument("--record", action="store_true", help="write a dated result file")
    given = parser.parse_args()
    recipe = load_recipe("shapes", "default")
    factor = given.scale * given.prior_scale
    recipe = replace(
        recipe,
        vae_train=scaled(recipe.vae_train, given.scale),
        vae_steps=round(recipe.vae_steps * given.scale),
        prior_train=scaled(recipe.prior_train, factor),
        prior_steps=round(recipe.prior_steps * factor),
    )
    rows, sheets = [], []
    for seed in given.seeds:
        for quantizer in QUANTIZERS:
            row, sheet = measure(recipe, seed, quantizer, recipe.items)
            rows.append(row)
            print(row, flush=True)
            if seed == given.seeds[0]:
                sheets.append(sheet)
    for line in means(rows):
        print(line)
    if given.picture:  # rows: the pictures, gumbel, straight-through
        shown = torch.cat([sheets[0][:, 0], *(sheet[:, 1] for sheet in sheets)])
        pictures.save_png(given.picture, pictures.grid(shown, columns=SHOWN, scale=3))
    if given.record:
        more: dict[str, Any] = {
            "data": "shapes",
            "dvae_steps": recipe.vae_steps,
            "prior_steps": recipe.prior_steps,
            "codes": recipe.vae.vocab_size,
            "unseen_pictures": recipe.unseen_items,
            "means": means(rows),
            "table": table(rows),
        }
        print(f"recorded in {record('quantizers', rows, **more)}")


if __name__ == "__main__":
    main()
