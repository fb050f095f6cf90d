"""A prior trained on pictures beside one trained on their codes: steps a second and memory.

    python -m benchmarks.bench_codes FOLDER --record

writes 32 pictures with their shards of codes into FOLDER, and trains the presets tiny and base on
each of both, with two crops of each picture, each in a process of its own. The dVAE has the
paper's stem and a small width, so its share of the time is a lower bound. Under two minutes on two
cores; `--preset tiny` takes seconds.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dalle.commands.encode import EncodeConfig, encode
from dalle.data.sources import load_pairs
from dalle.dvae.model import DiscreteVAE
from dalle.prior.config import PRESETS
from dalle.prior.model import Prior
from dalle.tokenizer import Tokenizer
from dalle.train.prior import PriorTask
from dalle.train.prior_recipe import PriorTrainConfig

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for `python -m`
import harness  # noqa: E402

PICTURES, CROPS = 32, 2
STEPS = {"tiny": (40, 8), "base": (2, 1)}  # preset -> (timed steps, pictures an update)


def prepare(folder: Path, preset: str) -> None:
    """Pictures, a tokenizer, an untrained dVAE of the preset's grid, and the codes."""
    pairs = folder / "pairs"
    if not pairs.exists():
        pairs.mkdir(parents=True)
        for i in range(PICTURES):
            rng = np.random.default_rng(i)
            coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8))
            coarse.resize((400, 300), Image.Resampling.BICUBIC).save(pairs / f"{i:03d}.jpg")
            (pairs / f"{i:03d}.txt").write_text(f"picture number {i}")
    if not (folder / "tokenizer").exists():
        Tokenizer.train(["picture number 0123456789"], 280).save_pretrained(folder / "tokenizer")
    vae, shape = folder / f"vae-{preset}", PRESETS[preset]
    if not vae.exists():
        torch.manual_seed(0)
        sizes = {"n_hid": 16, "n_init": 16, "vocab_size": shape.image_vocab}
        DiscreteVAE.from_preset(preset, **sizes).save_pretrained(vae)
    side = shape.grid[0] * DiscreteVAE.from_pretrained(vae).factor
    encode(
        EncodeConfig(
            data=str(pairs), vae=vae, out=folder / f"codes-{preset}", image_size=side,
            augment="paper", crops=CROPS, batch_size=16,
        )
    )  # fmt: skip


def measure(folder: Path, preset: str, kind: str) -> dict[str, Any]:
    """Median seconds of an update, and how much memory the process took at most."""
    torch.manual_seed(0)
    steps, batch = STEPS[preset]
    source = folder / ("pairs" if kind == "pictures" else f"codes-{preset}")
    vae = DiscreteVAE.from_pretrained(folder / f"vae-{preset}")
    tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
    prior = Prior.from_preset(preset, text_vocab=tokenizer.vocab_size)
    config = PriorTrainConfig(batch_size=batch, augment="paper")
    task = PriorTask(prior, tokenizer, vae, load_pairs(str(source), image_size=0), config)
    seconds = []
    for step in range(steps + 1):
        start = time.perf_counter()
        task.train_step(step)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return {
        "case": f"{preset}, batch {batch}",
        "data": kind,
        "steps_per_second": 1 / statistics.median(seconds[1:]),
        "peak_megabytes": peak,
    }


def main() -> None:
    """Prints the figures, and writes results/<date>_codes.json with --record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", choices=sorted(STEPS), action="append")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a measurement in this process
    words = parser.parse_args()
    if words.one:
        print(json.dumps(measure(words.folder, words.preset[0], words.one)))
        return
    rows = []
    for preset in words.preset or ["tiny", "base"]:
        prepare(words.folder, preset)
        for kind in ("pictures", "codes"):
            run = [sys.executable, "-m", "benchmarks.bench_codes", str(words.folder)]
            run += ["--preset", preset, "--one", kind]
            done = subprocess.run(run, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            row = rows[-1]
            print(
                f"{row['case']}, {kind}: {row['steps_per_second']:.3g} steps/s, "
                f"{row['peak_megabytes']:,} MB"
            )
    if words.record:
        print(harness.record("codes", rows))


if __name__ == "__main__":
    main()
