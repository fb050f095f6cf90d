"""Gumbel relaxation and straight-through gradients beside each other (paper 2.1).

`python -m benchmarks.quantizers` makes the comparison of `dalle reproduce --full` (trainings on
shapes with each quantizer and several seeds). `--record` writes a dated result file, and the same
and its picture where `dalle reproduce --quick` shows them from; `--picture` the picture of the
documentation. Run it in the repository's root.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from dalle import pictures
from dalle.reproduce import quantizers
from dalle.reproduce.sizes import FULL, QuantizerSizes

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for `python -m`
from harness import record  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = FULL.quantizers or QuantizerSizes()
    parser.add_argument("--seeds", type=int, nargs="+", default=default.seeds)
    parser.add_argument(
        "--scale", type=float, default=default.scale, help="factor of all numbers of updates"
    )
    parser.add_argument(
        "--prior-scale", type=float, default=default.prior_scale, help="also of the prior's"
    )
    parser.add_argument("--picture", type=Path, help="PNG of the first seed to write")
    parser.add_argument("--record", action="store_true", help="write a dated result file")
    given = parser.parse_args()
    sizes = QuantizerSizes(
        seeds=tuple(given.seeds), scale=given.scale, prior_scale=given.prior_scale
    )
    recipe = quantizers.recipe_of(sizes)
    with tempfile.TemporaryDirectory() as folder:
        rows, sheets = quantizers.compare(sizes, torch.device("cpu"), Path(folder))
    for line in [*rows, *quantizers.means(rows)]:
        print(line)
    shown = quantizers.picture(sheets)
    if given.picture:
        pictures.save_png(given.picture, shown)
    if given.record:
        path = record(
            "quantizers",
            rows,
            data="shapes",
            dvae_steps=recipe.vae_steps,
            prior_steps=recipe.prior_steps,
            codes=recipe.vae.vocab_size,
            unseen_pictures=recipe.unseen_items,
            means=quantizers.means(rows),
            table=quantizers.in_words(rows),
        )
        shutil.copyfile(path, quantizers.RECORD)
        pictures.save_png(quantizers.PICTURE, shown)
        print(f"recorded in {path}")


if __name__ == "__main__":
    main()
