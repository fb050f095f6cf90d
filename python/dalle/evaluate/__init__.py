"""Evaluation as the paper did it (3.1, 3.2, 2.6): distances, sweeps, and what words get right.

Names are imported on first use, so that `import dalle.evaluate` needs no torch. Every measure of
`dalle eval` is a function of the same name here (`is_` and `clip_score` for `is`, `clip-score`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dalle.evaluate.data_overlap import overlap
    from dalle.evaluate.distances import (
        frechet_distance,
        frechet_distance_infinite,
        inception_score,
        kernel_distance,
        precision_recall,
    )
    from dalle.evaluate.extractors import load_extractor
    from dalle.evaluate.facts import words
    from dalle.evaluate.page import report
    from dalle.evaluate.preference import votes
    from dalle.evaluate.reconstruction import recon, ssim
    from dalle.evaluate.scores import clip_score, features, fid, is_, kid, prc
    from dalle.evaluate.search import nearest
    from dalle.evaluate.sweeps import blur, rerank

__all__ = [
    "blur",
    "clip_score",
    "features",
    "fid",
    "frechet_distance",
    "frechet_distance_infinite",
    "inception_score",
    "is_",
    "kernel_distance",
    "kid",
    "load_extractor",
    "nearest",
    "overlap",
    "prc",
    "precision_recall",
    "recon",
    "report",
    "rerank",
    "ssim",
    "votes",
    "words",
]

_HOMES = {  # name -> module
    "frechet_distance": "distances",
    "frechet_distance_infinite": "distances",
    "inception_score": "distances",
    "kernel_distance": "distances",
    "precision_recall": "distances",
    "load_extractor": "extractors",
    "nearest": "search",
    "overlap": "data_overlap",
    "report": "page",
    "recon": "reconstruction",
    "ssim": "reconstruction",
    "features": "scores",
    "fid": "scores",
    "kid": "scores",
    "is_": "scores",
    "prc": "scores",
    "clip_score": "scores",
    "blur": "sweeps",
    "rerank": "sweeps",
    "votes": "preference",
    "words": "facts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dalle.evaluate' has no attribute {name!r}")
    return getattr(import_module(f"dalle.evaluate.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
