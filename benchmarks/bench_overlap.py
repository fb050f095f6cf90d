"""Recall of planted copies at precision .95, by the copy detector and by a ranker's features.

    python benchmarks/bench_overlap.py [--seeds 0 1 2] [--record]

5,000 pictures are seen, 5,000 looked up; of these 200 are copies of seen ones: a third each cropped
to 3/4 of its sides, recoloured, or JPEG of quality 25. All are procedural (textures with outlines,
64 pixels). The detector learns from the seen pictures and transformed copies of its own, never from
a planted copy. A seed draws pictures, copies, weights and batches.

Precision .95 is taken in two ways. "at the best threshold": by the labels of the test itself, the
largest recall of any threshold whose precision is .95 or more. "threshold from other copies": the
lowest threshold with that precision on 200 other copies among 4,800 other pictures is then held
to the test, whatever precision that gives. A copy whose nearest is another picture is an error.

`--detector FOLDER` measures one that was trained before on the same pictures, `--ranker FOLDER` a
trained ranker beside; without it, one with random weights, which is
named so. The goal is recall .95 at the best threshold.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dalle.data.pairs import ArrayPairs
from dalle.evaluate import detector
from dalle.evaluate.extractors import Extractor, RankerExtractor, load_extractor
from dalle.evaluate.search import nearest
from dalle.evaluate.sets import Source
from dalle.pretrained import fingerprint
from dalle.ranker.model import ContrastiveRanker
from dalle.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
from harness import record  # noqa: E402
from support.copies_made import copied, picture  # noqa: E402

KINDS = ("cropped", "recoloured", "jpeg")
PRECISION = 0.95
FAR = 10**7  # between the numbers of the pictures of two seeds


def looked_up(
    seen: list[np.ndarray], copies: int, seed: int, shift: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Planted copies and then pictures of their own, as many as are seen; whose copies they are."""
    origin = np.arange(copies) * len(seen) // copies + shift
    made = [copied(seen[i], KINDS[k % 3], k + FAR * seed + shift) for k, i in enumerate(origin)]
    first = FAR * seed + 10**6 * (1 + shift)
    return made + [picture(first + i) for i in range(len(seen) - copies)], origin


def best_threshold(similarity: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """The largest recall of any threshold whose precision is `PRECISION` or more; the threshold."""
    order = np.argsort(-similarity, kind="stable")
    found, last = right[order].cumsum(), similarity[order]
    fits = found / np.arange(1, len(found) + 1) >= PRECISION
    fits[:-1] &= last[:-1] > last[1:]  # a threshold takes equal ones together
    if not fits.any():
        return 0.0, float("inf")
    at = int(np.flatnonzero(fits)[-1])
    return float(found[at]), float(last[at])


def features(
    network: Extractor | detector.DetectorExtractor, images: list[np.ndarray]
) -> torch.Tensor:
    """In batches of 256."""
    return torch.cat([network.features(images[i : i + 256]) for i in range(0, len(images), 256)])


def measured(
    network: Any, of_seen: Any, seen: list[np.ndarray], sets: list[tuple[list[np.ndarray], Any]]
) -> dict[str, Any]:
    """Recall of the first set's copies, with its own threshold and with that of the second set."""
    base = features(of_seen, seen)
    count = base.shape[1] // network.dimensions  # views of a picture
    base = base.reshape(-1, network.dimensions)
    found = []
    for images, origin in sets:
        values, rows = nearest(features(network, images), base)
        hit = rows.numpy()[: len(origin)] // count == origin
        right = np.concatenate([hit, np.zeros(len(images) - len(origin), bool)])
        found.append((values.numpy(), right))
    (similarity, right), others = found
    copies = len(sets[0][1])
    best, threshold = best_threshold(similarity, right)
    other = best_threshold(*others)[1]
    taken = similarity >= other
    lost = [
        {"kind": KINDS[k % 3], "similarity": float(similarity[k]), "nearest_right": bool(right[k])}
        for k in range(copies)
        if not right[k] or similarity[k] < threshold
    ]
    return {
        "at the best threshold": {"recall": best / copies, "threshold": threshold},
        "threshold from other copies": {
            "recall": float(right[taken].sum() / copies),
            "precision": float(right[taken].mean()) if taken.any() else None,
            "threshold": other,
        },
        "nearest_right": {kind: float(right[:copies][k::3].mean()) for k, kind in enumerate(KINDS)},
        "lost": lost[:20],
        "closest_others": sorted(map(float, similarity[copies:]), reverse=True)[:12],
    }


def run(a: argparse.Namespace, seed: int, device: torch.device) -> list[dict[str, Any]]:
    """Trains and measures with one seed."""
    seen = [picture(FAR * seed + i) for i in range(a.pictures)]
    sets = [looked_up(seen, a.copies, seed, shift) for shift in (0, 1)]
    pairs = ArrayPairs("procedural", np.stack(seen), [""] * len(seen))
    begin = time.perf_counter()
    source = Source("procedural", "pairs", pairs, {})
    if a.detector:
        model = detector.CopyDetector.from_pretrained(a.detector).to(device).eval()
        about: dict[str, Any] = {"training_seconds": None, "fingerprint": fingerprint(model)}
    else:
        kept = set(Path(a.cache).glob("detectors/*"))
        model, trained = detector.train_detector(
            "bench_overlap", source, config=detector.DetectorConfig(a.size, a.width),
            steps=a.steps, batch_size=a.batch, seed=seed, cache=a.cache, device=device,
        )  # fmt: skip
        seconds = round(time.perf_counter() - begin)
        if Path(trained["folder"]) in kept:  # an earlier run has trained it, or a part of it
            seconds = None
        about = {"training_seconds": seconds, "share_matched": trained["share_matched"],
                 "fingerprint": fingerprint(model)}  # fmt: skip
    if a.ranker:
        other, name = load_extractor("ranker", a.ranker, device=device, owner="bench"), "ranker"
    else:
        torch.manual_seed(seed)
        tokenizer = Tokenizer.train(["a b"] * 4, vocab_size=280)
        fresh = ContrastiveRanker.from_preset("tiny", tokenizer=tokenizer, image_size=64)
        other, name = RankerExtractor(fresh.to(device).eval()), "ranker, random weights"
    plain = detector.DetectorExtractor(model)
    cropped = detector.DetectorExtractor(model, cropped=True)
    rows = []
    for label, network, of_seen in (
        ("detector", plain, cropped),
        ("detector, no crops", plain, plain),
        (name, other, other),
    ):
        row = {"seed": seed, "network": label, **measured(network, of_seen, seen, sets)}
        if label == "detector":
            row |= about
        shown = {key: row[key] for key in row if key not in ("lost", "closest_others")}
        print(shown, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    """Measures with each seed, and prints what it found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--copies", type=int, default=200)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ranker", type=Path)
    parser.add_argument("--detector", type=Path, help="trained before on these pictures")
    parser.add_argument("--cache", type=Path, default=Path("run/eval-cache"))
    parser.add_argument("--record", action="store_true", help="write a dated result file")
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = ("pictures", "copies", "steps", "batch", "size", "width")
    about = {name: getattr(a, name) for name in names}
    rows: list[dict[str, Any]] = []
    for seed in a.seeds:
        rows += run(a, seed, device)
        if a.record:  # after each seed: a later one may be stopped
            record("overlap", rows, **about, precision=PRECISION)


if __name__ == "__main__":
    main()
