"""Measures of drawn pictures: how near to the true ones, and what choosing among them gains.

Shape letters: B captions, N samples of each, P true pictures, H = W side of a picture in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dalle.data.shapes import Scene
from dalle.data.shapes_check import ShapesReport, check_batch, summary
from dalle.dvae.codebook import codebook_health
from dalle.errors import UsageError
from dalle.pictures import to_uint8

BEST_OF = (1, 2, 4, 8)


def nearest_rank(
    samples: torch.Tensor,
    target: torch.Tensor,
    pool: torch.Tensor,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """How many wrong true pictures are nearer to each sample than a right one is.

    Args:
        samples: (M, 3, H, W).
        target: (M,) int64, the label of each sample.
        pool: (P, 3, H, W) true pictures.
        labels: (P,) int64; pictures of one label are right for each other (they share a caption).
            The index in the pool if left out.

    Returns:
        (M,) int64: 0 where a right picture is the nearest by pixel L2 distance.
    """
    if labels is None:
        labels = torch.arange(len(pool), dtype=torch.int64, device="cpu")
    flat = pool.flatten(1).double()
    ranks = []
    for part, wanted in zip(samples.split(1024), target.split(1024), strict=True):
        distance = torch.cdist(part.flatten(1).double(), flat)
        right = wanted[:, None] == labels
        nearest = distance.masked_fill(~right, torch.inf).amin(1, keepdim=True)
        ranks.append(((distance < nearest) & ~right).sum(1))
    return torch.cat(ranks)


def best_of(right: np.ndarray, scores: np.ndarray, count: int) -> float:
    """Share of right answers when the highest score among `count` samples is taken.

    The N samples are cut into N / count groups, which all are averaged, so that small counts are
    measured on as many samples as large ones.

    Args:
        right: (B, N) bool.
        scores: (B, N), higher is better.
        count: samples to choose from, a divisor of N.
    """
    groups = _groups(right, count)
    order = _groups(scores, count).argmax(-1)
    return float(np.take_along_axis(groups, order[..., None], -1).mean())


def oracle_of(right: np.ndarray, count: int) -> float:
    """Share of groups of `count` samples that hold a right one: what a ranker cannot exceed."""
    return float(_groups(right, count).any(-1).mean())


def curve(right: np.ndarray, scores: np.ndarray) -> list[dict[str, float]]:
    """Best of 1, 2, 4, 8 by the ranker and by an oracle (paper Fig. 6 and 9c in small)."""
    return [
        {
            "samples": count,
            "reranked": best_of(right, scores, count),
            "oracle": oracle_of(right, count),
        }
        for count in BEST_OF
        if right.shape[1] % count == 0
    ]


def nearest_scores(ranks: np.ndarray, scores: np.ndarray, prefix: str) -> dict[str, Any]:
    """Shares of captions whose sample is nearest to a right true picture.

    Args:
        ranks: (B, N) of `nearest_rank`.
        scores: (B, N) of the ranker.
        prefix: of the names: PREFIX_at_1 (best of N by the ranker), PREFIX_at_1_single,
            PREFIX_at_1_oracle, PREFIX_curve_at_1, and the same at 5.
    """
    count = ranks.shape[1]
    result: dict[str, Any] = {}
    for top in (1, 5):
        right = ranks < top
        result[f"{prefix}_at_{top}"] = best_of(right, scores, count)
        result[f"{prefix}_at_{top}_single"] = float(right.mean())
        result[f"{prefix}_at_{top}_oracle"] = oracle_of(right, count)
        result[f"{prefix}_curve_at_{top}"] = curve(right, scores)
    return result


def code_use(tokens: torch.Tensor, num_tokens: int) -> dict[str, Any]:
    """How many codes occur, the perplexity of their use, and the sorted shares (64 of them)."""
    counts = torch.bincount(tokens.flatten(), minlength=num_tokens)
    health = codebook_health(counts)
    share = counts.sort(descending=True).values.double() / counts.sum().clamp_min(1)
    points = np.unique(np.geomspace(1, num_tokens, 64).astype(int)) - 1
    return {
        "codes": num_tokens,
        "codes_used": health.used,
        "perplexity": health.perplexity,
        "rank": (points + 1).tolist(),
        "share": share[points].tolist(),
    }


def check_samples(images: torch.Tensor, scenes: Sequence[Scene]) -> list[list[ShapesReport]]:
    """(B, N, 3, H, W) in [0, 1] and B scenes -> reports, B lists of N."""
    count = images.shape[1]
    flat = check_batch(
        to_uint8(images.flatten(0, 1)), [scene for scene in scenes for _ in range(count)]
    )
    return [flat[i : i + count] for i in range(0, len(flat), count)]


def fact_table(reports: Sequence[Sequence[ShapesReport]], scores: np.ndarray) -> dict[str, Any]:
    """Share right per fact: of single samples, and of the sample the ranker puts first."""
    singles = [report for row in reports for report in row]
    best = [row[int(i)] for row, i in zip(reports, scores.argmax(1), strict=True)]
    return {"single": summary(singles), "best": summary(best), "captions": len(reports)}


def right_table(reports: Sequence[Sequence[ShapesReport]], fact: str = "all_right") -> np.ndarray:
    """(B, N) bool: does each sample show the fact."""
    return np.array([[bool(getattr(report, fact)) for report in row] for row in reports])


def shapes_scores(
    images: torch.Tensor, scenes: Sequence[Scene], splits: Sequence[str], scores: np.ndarray
) -> dict[str, Any]:
    """Scores of samples for captions of several splits.

    Args:
        images: (B, N, 3, H, W) in [0, 1].
        scenes: B scenes.
        splits: B of "train", "test", "zero".
        scores: (B, N) of the ranker.

    Returns:
        `one_object_single`, `one_object_best_of_8` (zero split, every fact right),
        `relation_best_of_8` (two objects, test split, every fact right), the same for the other
        splits, tables per fact, and curves.
    """
    reports = check_samples(images, scenes)
    right = right_table(reports)
    kinds = np.array(["two_objects" if s.relation else "one_object" for s in scenes])
    result: dict[str, Any] = {"table": {}, "curves": {}}
    for split in ("train", "test", "zero"):
        for kind in ("one_object", "two_objects"):
            rows = np.flatnonzero((np.array(splits) == split) & (kinds == kind))
            if not len(rows):
                continue
            group = [reports[i] for i in rows]
            result["table"][f"{split}/{kind}"] = fact_table(group, scores[rows])
            result["curves"][f"{split}/{kind}"] = curve(right[rows], scores[rows])
    for key, group_name in (("one_object", "zero/one_object"), ("relation", "test/two_objects")):
        table = result["table"].get(group_name)
        if table:
            result[f"{key}_single"] = table["single"]["all_right"]
            result[f"{key}_best_of_{images.shape[1]}"] = table["best"]["all_right"]
    zero = result["table"].get("zero/two_objects")
    if zero:
        result["relation_zero_single"] = zero["single"]["all_right"]
        result[f"relation_zero_best_of_{images.shape[1]}"] = zero["best"]["all_right"]
    return result


def reconstruction_right(images: torch.Tensor, scenes: Sequence[Scene]) -> float:
    """Share of pictures (N, 3, H, W) in [0, 1] that show every fact of their scene."""
    return summary(check_batch(to_uint8(images), list(scenes)))["all_right"]


def _groups(values: np.ndarray, count: int) -> np.ndarray:
    """(B, N) -> (B, N / count, count)."""
    if values.ndim != 2 or count < 1 or values.shape[1] % count:
        raise UsageError(f"best_of: count must divide N of (B, N), got {count} and {values.shape}")
    return values.reshape(len(values), -1, count)
