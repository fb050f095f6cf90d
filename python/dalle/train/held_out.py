"""Scores on the held-out part, and the choice of the weights that are saved by them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from dalle.console import number, say
from dalle.data.augment import load_cropped
from dalle.data.pairs import Pairs, evenly_spaced
from dalle.files import saving
from dalle.pretrained import Pretrained
from dalle.train.averaging import FIRST_SHARE
from dalle.train.task import Task, averaged_model

MAX_PICTURES = 512  # held-out pictures that are scored


@runtime_checkable
class HeldOutTask(Protocol):
    """A task that can be scored on data it does not train on."""

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Scores of weights after `step` updates; "loss" among them, the lower the better.

        Draws no random numbers. Empty where there is no held-out part, or no score yet.
        """
        ...


def held_out_pictures(pairs: Pairs, size: int) -> tuple[list[np.ndarray], list[int]]:
    """Up to 512 pictures, evenly spaced, cropped to the centre; and their items."""
    return load_cropped(pairs, evenly_spaced(len(pairs), MAX_PICTURES).tolist(), size)


@torch.no_grad()
def held_out_scores(task: Task, step: int, *, averaged: bool = True) -> dict[str, float]:
    """`HeldOutTask.evaluate` of a task, by default of its averaged weights. Collective.

    Returns:
        The same on all processes; empty for a task without a held-out part.
    """
    if not isinstance(task, HeldOutTask):
        return {}
    training = task.model.training
    try:
        with task.world.raise_on_all(), averaged_model(task, averaged) as model:
            scores = {} if model is None else task.evaluate(model.eval(), step)
    finally:
        task.model.train(training)
    agreed: dict[str, float] = task.world.first(scores)
    return agreed


def save_better(
    owner: str, task: Task, folder: Path, step: int, others: Path | None = None
) -> dict[str, float]:
    """Writes the averaged or the last weights, whichever score better on the held-out part.

    The others are kept as well. Without a held-out part the average is the model, as in the paper,
    and alone; but where it still holds much of the first weights, the last ones are the model, and
    the average is kept. Collective.

    Args:
        owner: begins every line.
        task: trained.
        folder: of the model.
        step: updates done.
        others: where the others go, to which "-last" or "-averaged" is added; `folder` if left
            out.

    Returns:
        The scores of the weights in `folder`; empty without a held-out part.

    Raises:
        EnvironmentProblem: a folder cannot be written.
    """
    scores = {
        averaged: held_out_scores(task, step, averaged=averaged)
        for averaged in ((False,) if task.average is None else (True, False))
    }
    measured = bool(scores[False])
    early = task.average is not None and task.average.first_share > FIRST_SHARE
    better = task.average is not None and not early
    if measured:
        losses = {x: values.get("loss", math.inf) for x, values in scores.items()}
        better = min(scores, key=lambda x: math.inf if math.isnan(losses[x]) else losses[x])
    kept, beside = others or folder, folder
    for averaged in scores:
        if averaged != better and not measured and not early:
            continue
        words = "averaged" if averaged else "last"
        target = folder
        if averaged != better:
            target = beside = kept.with_name(f"{kept.name}-{words}")
        with (
            task.world.raise_on_all(),
            saving(owner, target),
            averaged_model(task, averaged) as model,
        ):
            if model is not None:
                assert isinstance(model, Pretrained)
                model.save_pretrained(target)
    if len(scores) == 2 and (measured or early):
        names = ("averaged", "last") if better else ("last", "averaged")
        mine, other = "", "which still hold much of the first ones"
        if measured:
            mine, other = (number(scores[x].get("loss", 0)) for x in (better, not better))
            mine = f", held-out loss {mine}"
        say(
            f"{owner}: the {names[0]} weights are the model{mine}; the {names[1]} ones ({other}) "
            f"are in {beside}"
        )
    return scores[better]
