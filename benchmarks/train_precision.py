"""Does 16-bit training end where fp32 does, and does one global scale lose gradients?

    dalle demo --data shapes --out out/shapes            # trains the dVAE and tokenizer used
    python -m benchmarks.train_precision same --demo out/shapes --out out/precision
    python -m benchmarks.train_precision deep --demo out/shapes --out out/precision

`same`: the tiny prior on `shapes`, three precisions from the same weights on the same batches, for
three seeds. `deep`: a thin model of 128 resblocks whose gradient grows from the last block to the
first; at the same weights and batch, what each block's fp16 gradients lose with one scale for all
blocks and with one for each, for three seeds. Both write a result file and a picture (`--record`).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from dalle.data.pairs import Pairs
from dalle.data.shapes_pairs import ShapesPairs
from dalle.dvae.model import DiscreteVAE
from dalle.precision.compare import SHARES, kept_gradients, mean_of_late_half
from dalle.prior.model import Prior
from dalle.tokenizer import Tokenizer
from dalle.train.prior import PriorTask
from dalle.train.prior_recipe import PriorTrainConfig

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for `python -m`
import precision_plots  # noqa: E402
from harness import RESULTS, machine  # noqa: E402

SIDE, STEPS, BATCH = 24, 2000, 8
PRECISIONS = {"fp32": "AdamW", "bf16": "AdamW16", "fp16-scaled": "AdamW16, ResblockScaler"}
DEEP = {"d_model": 32, "num_heads": 2, "num_layers": 64, "init_gain": 16.0}
DEEP_STEPS, WITHIN = 40, 0.01


class Parts:
    """Tokenizer and dVAE of a demo's folder, and the pictures drawn with them."""

    def __init__(self, demo: Path) -> None:
        self.tokenizer = Tokenizer.from_pretrained(demo / "pipeline" / "tokenizer")
        self.vae = DiscreteVAE.from_pretrained(demo / "pipeline" / "vae")
        self.pairs: Pairs = ShapesPairs("train", image_size=SIDE, seed=0)
        self.unseen = ShapesPairs("train", image_size=SIDE, seed=1, size=1000)

    def task(self, config: PriorTrainConfig, seed: int, **sizes: Any) -> PriorTask:
        torch.manual_seed(seed)
        grid, words, codes = self.vae.grid(SIDE), self.tokenizer.vocab_size, self.vae.num_tokens
        fixed = {"text_vocab": words, "image_vocab": codes, "grid": grid}
        prior = Prior.from_preset("tiny", **fixed, **sizes)
        return PriorTask(prior, self.tokenizer, self.vae, self.pairs, config, seed=seed)

    @torch.no_grad()
    def validation(self, task: PriorTask) -> float:
        """Loss of the averaged weights on 1,000 pictures that were not trained on."""
        images = torch.from_numpy(self.unseen.images).permute(0, 3, 1, 2) / 255
        text = self.tokenizer.encode(self.unseen.captions, task.model.config.text_len - 1)
        losses = []
        with task.average.applied():
            for part in torch.arange(len(images)).split(100):
                tokens = self.vae.encode(images[part]).flatten(1)
                losses.append(task.model(text[part], tokens).loss)
        return float(torch.stack(losses).mean())


def recipe(steps: int, **changes: Any) -> PriorTrainConfig:
    short = {"warmup_steps": 100, "decay": "cosine", "decay_steps": steps, "augment": "none"}
    average = {"average_every": 5, "average_warmup": True, "bpe_dropout": 0.0}
    return PriorTrainConfig(batch_size=BATCH, **({"lr": 2e-3} | short | average | changes))


def same(demo: Path, out: Path, seeds: int, steps: int, jobs: int) -> dict[str, Any]:
    """Trains every precision with every seed; a run whose file is there is not repeated."""
    wanted = [(p, seed, out / f"{p}-{seed}.json") for seed in range(seeds) for p in PRECISIONS]
    missing = [(demo, *run, steps, jobs) for run in wanted if not run[2].exists()]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        list(pool.map(train_one, *zip(*missing, strict=True)) if missing else ())
    runs = [json.loads(file.read_text()) for _, _, file in wanted]
    table: dict[str, Any] = {}
    for precision in PRECISIONS:
        ends = [run["validation"][-1] for run in runs if run["precision"] == precision]
        plain = [run["validation"][-1] for run in runs if run["precision"] == "fp32"]
        apart = [end / own - 1 for end, own in zip(ends, plain, strict=True)]
        table[precision] = {
            "optimizer": PRECISIONS[precision],
            "validation_loss": ends,
            "mean": sum(ends) / len(ends),
            "against_fp32": apart,
            "mean_against_fp32": sum(ends) / sum(plain) - 1,
            "seconds": [run["seconds"] for run in runs if run["precision"] == precision],
        }
        print(precision, json.dumps(table[precision]))
    met = all(abs(row["mean_against_fp32"]) <= WITHIN for row in table.values())
    return {"steps": steps, "batch": BATCH, "runs": runs, "table": table, "within_1_percent": met}


def train_one(demo: Path, precision: str, seed: int, file: Path, steps: int, jobs: int) -> None:
    """One run in a process of its own; writes its file at the end."""
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    parts = Parts(demo)
    task = parts.task(recipe(steps), seed, precision=precision)
    begin, at, validation, skipped = time.monotonic(), [], [], 0.0
    for step in range(steps):
        values = task.train_step(step)
        skipped += float(values.get("skipped", 0))
        if (step + 1) % (steps // 10) == 0:
            at.append(step + 1)
            validation.append(parts.validation(task))
            print(precision, seed, step + 1, f"{validation[-1]:.4f}", flush=True)
    found = {"precision": precision, "seed": seed, "steps": at, "validation": validation}
    found |= {"skipped": skipped, "seconds": round(time.monotonic() - begin, 1)}
    file.write_text(json.dumps(found))


def deep(parts: Parts, seeds: int, steps: int) -> dict[str, Any]:
    """`deep_one` for every seed, and the means over the late half of the blocks."""
    runs = [deep_one(parts, seed, steps) for seed in range(seeds)]
    late: dict[str, Any] = {}
    for name in ("one scale", "own scales"):
        late[name] = {key: [mean_of_late_half(run[name][key]) for run in runs] for key in SHARES}
        print(f"{name}, late half: {json.dumps(late[name])}")
    return {"sizes": DEEP, "steps": steps, "batch": BATCH, "late_half": late, "runs": runs}


def deep_one(parts: Parts, seed: int, steps: int) -> dict[str, Any]:
    """What the gradients of each block lose in fp16, at weights trained in fp32."""
    config = recipe(steps, decay="none", lr=5e-4, warmup_steps=20)
    task = parts.task(config, seed, **DEEP)
    losses = [float(task.train_step(step)["loss"]) for step in range(steps)]
    print(
        f"seed {seed}, fp32: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {steps} updates",
        flush=True,
    )
    half = parts.task(config, seed, **DEEP, precision="fp16-scaled")
    half.model.load_state_dict(task.model.state_dict())
    text, tokens, _ = task.batch(steps)
    batch = (text.to(tokens.device), tokens)
    return {"seed": seed, "losses": losses, **kept_gradients(half.model, batch)}


def in_lines(result: dict[str, Any]) -> str:
    """JSON with a line for each entry of the upper levels, and whole lists of numbers in one."""
    text = json.dumps(result, indent=1)
    return re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found.group().split()), text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["same", "deep"])
    parser.add_argument("--demo", type=Path, required=True, help="folder of dalle demo")
    parser.add_argument("--out", type=Path, default=Path("out/precision"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="0: 2,000 for same, 40 for deep")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of `same`")
    parser.add_argument("--record", action="store_true", help="write result file and docs picture")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.what == "same":
        result = same(given.demo, given.out, given.seeds, given.steps or STEPS, given.jobs)
    else:
        result = deep(Parts(given.demo), given.seeds, given.steps or DEEP_STEPS)
    name = f"precision_{given.what}"
    folder = Path("docs/images") if given.record else given.out
    precision_plots.draw(given.what, result, folder / f"{name}.png")
    file = (RESULTS if given.record else given.out) / f"{date.today()}_{name}.json"
    file.write_text(in_lines({"machine": machine(), **result}) + "\n")
    print(f"wrote {file} and {folder / name}.png")


if __name__ == "__main__":
    main()
