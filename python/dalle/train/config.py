"""Options that every training has."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dalle.configs import Named, check_numbers, require


@dataclass(frozen=True, kw_only=True)
class LoopConfig(Named):
    """How long to train, what to write, and how to begin.

    Args:
        out: folder for checkpoints, metrics and pictures; made if missing.
        steps: updates in all, those of a resumed run included; 0 takes the recipe's, where a
            command has one.
        log_every: updates between records of metrics.jsonl.
        checkpoint_every: updates between checkpoints; one is also written at the end.
        keep: newest checkpoints kept.
        picture_every: updates between pictures, of which one is drawn at the end too; 0 draws none.
        validate_every: updates between scores on the held-out part, which are also taken at the
            end; 0 takes none.
        resume: "auto" (the newest checkpoint in `out`, if any), "none" (a fresh start, refused if
            `out` holds checkpoints) or the path of a checkpoint.
        accept_changes: whether the checkpoint may be of other options, data or models, as far as
            its tensors fit; differences are reported.
        workers: processes that read pictures ahead of time; 0 reads them in the training's own.
            The numbers of a training do not depend on it.
        seed: for everything random.
        deterministic: same bits on every run, at the price of slower kernels on a GPU.
    """

    out: Path
    steps: int
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 3
    picture_every: int = 500
    validate_every: int = 0
    resume: str = "auto"
    accept_changes: bool = False
    workers: int = 0
    seed: int = 0
    deterministic: bool = False

    def __post_init__(self) -> None:
        check_numbers("train", self)
        for low, names in (
            (1, ("log_every", "checkpoint_every", "keep")),
            (0, ("steps", "picture_every", "validate_every", "workers")),
        ):
            require("train", self, f"{low} or more", partial(operator.le, low), *names)
        require("train", self, "0 .. 2^63 - 1", lambda x: 0 <= x < 2**63, "seed")
