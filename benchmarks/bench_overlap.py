"""Recall of planted copies at precision .95, by the copy detector and by a ranker's features.

    python benchmarks/bench_overlap.py [--pictures 5000] [--copies 200] [--steps 1500] [--batch 256]

Pictures are procedural (textures with outlines, 64 pixels); a third each of the copies is cropped
to 3/4 of its sides, recoloured, or JPEG of quality 25. The detector learns from the pictures that
are searched. `--ranker FOLDER` measures a trained ranker beside; without it, one with random
weights, which is named so. The goal is recall .95 at precision .95.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from dalle.data.pairs import ArrayPairs
from dalle.evaluate import detector
from dalle.evaluate.data_overlap import nearest
from dalle.evaluate.extractors import Extractor, RankerExtractor, load_extractor
from dalle.evaluate.sets import Source
from dalle.ranker.model import ContrastiveRanker
from dalle.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.copies_made import copied, picture  # noqa: E402

KINDS = ("cropped", "recoloured", "jpeg")


def recall_at(similarity: np.ndarray, right: np.ndarray, copies: int, precision: float) -> float:
    """The largest recall of any threshold whose precision is at least `precision`."""
    found = right[np.argsort(-similarity, kind="stable")].cumsum()
    fits = found / np.arange(1, len(found) + 1) >= precision
    return float(found[fits].max() / copies) if fits.any() else 0.0


def features(
    network: Extractor | detector.DetectorExtractor, images: list[np.ndarray]
) -> torch.Tensor:
    """In batches of 256."""
    return torch.cat([network.features(images[i : i + 256]) for i in range(0, len(images), 256)])


def main() -> None:
    """Trains, measures, prints one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--copies", type=int, default=200)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--ranker", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("run/eval-cache"))
    a = parser.parse_args()
    seen = [picture(i) for i in range(a.pictures)]
    origin = np.arange(a.copies) * a.pictures // a.copies
    real = [copied(seen[i], KINDS[k % 3], k) for k, i in enumerate(origin)]
    real += [picture(10**6 + i) for i in range(a.pictures - a.copies)]
    pairs = ArrayPairs("procedural", np.stack(seen), [""] * len(seen))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begin = time.perf_counter()
    model, record = detector.train_detector(
        "bench_overlap", Source("procedural", "pairs", pairs, {}),
        config=detector.DetectorConfig(a.size, a.width), steps=a.steps, batch_size=a.batch, seed=0,
        cache=a.cache, device=device,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    if a.ranker:
        other, name = load_extractor("ranker", a.ranker, device=device, owner="bench"), "ranker"
    else:
        torch.manual_seed(0)
        tokenizer = Tokenizer.train(["a b"] * 4, vocab_size=280)
        fresh = ContrastiveRanker.from_preset("tiny", tokenizer=tokenizer, image_size=64)
        other, name = RankerExtractor(fresh.to(device).eval()), "ranker, random weights"
    plain = detector.DetectorExtractor(model)
    cropped = detector.DetectorExtractor(model, cropped=True)
    for label, network, of_seen in (
        ("detector", plain, cropped),
        ("detector, no crops", plain, plain),
        (name, other, other),
    ):
        base = features(of_seen, seen)
        count = base.shape[1] // network.dimensions  # views of a picture
        values, rows = nearest(features(network, real), base.reshape(-1, network.dimensions))
        hit = rows.numpy()[: a.copies] // count == origin
        right = np.concatenate([hit, np.zeros(a.pictures - a.copies, bool)])
        line = {
            "network": label,
            "recall_at_precision_95": recall_at(values.numpy(), right, a.copies, 0.95),
            "nearest_right": {kind: float(hit[k::3].mean()) for k, kind in enumerate(KINDS)},
        }
        if label == "detector":
            line |= {"seconds": round(seconds), "share_matched": record["share_matched"]}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
