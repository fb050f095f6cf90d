"""Gradient accumulation: one update on a batch that is computed in micro-batches.

Equivalent to one batch `accumulate` times as large, up to the order in which numbers are added:
everything random in a step follows from a picture's position in the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from dalle.train.parts import slices
from dalle.train.task import Task


class Accumulated(NamedTuple):
    """The loss of a batch, computed in micro-batches.

    Attributes:
        run: rows of this process's batch -> the part of the whole batch's loss that is theirs, a
            scalar with a graph; called in order.
        rows: of each micro-batch.
        value: gives the loss where it is not the sum of what `run` gave.
    """

    run: Callable[[slice], Tensor]
    rows: list[slice]
    value: Callable[[], Tensor] | None = None


def micro_batches(size: int, total: int, accumulate: int, processes: int) -> list[slice]:
    """The rows of each micro-batch: as many on all processes, whatever their parts of a batch.

    Args:
        size: of this process's part.
        total: of the whole batch.
        accumulate: micro-batches that are wanted.
        processes: how many share the batch.
    """
    return slices(size, min(accumulate, max(1, total // processes)))


def backward(task: Task, loss: Tensor | Accumulated) -> Tensor:
    """Gradients of a loss into the model's parameters; returns the loss.

    Of several micro-batches, the gradients travel between processes after the last.
    """
    if not isinstance(loss, Accumulated):
        loss.backward()
        return loss
    total: Tensor | None = None
    for number, rows in enumerate(loss.rows, 1):
        with task.world.accumulating(task.model, last=number == len(loss.rows)):
            part = loss.run(rows)
            part.backward()
        total = part.detach() if total is None else total + part.detach()
    assert total is not None
    return total if loss.value is None else loss.value()
