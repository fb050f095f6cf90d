"""What the host reads of an update a step later, so that the device never waits for the host.

In `train.loop.train` an update is queued without a look at its numbers: a flag on the device keeps
the weights as they are where loss or gradients are not finite. The host reads flag, loss and
metrics once the backward pass of the next step is queued, before its optimizer: whatever hangs on
them (the average of the weights, a plateau rule, an error) then happens as if it had been read at
once. Outside the loop, and with an optimizer that cannot skip an update on the device, `update`
reads at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from dalle.errors import NumericalError
from dalle.precision.queued import HostCopy, Values
from dalle.train.averaging import IterateAverage
from dalle.train.task import Task

Done = Callable[[int, Values, float | None, float], None]


@dataclass
class Queued:
    """An update whose numbers the host has not read."""

    step: int  # from 0
    verdict: HostCopy
    judge: Callable[[Values], bool]  # raises, or says whether the weights have changed
    average: IterateAverage | None
    values: HostCopy | None = None
    shared: bool = False  # whether the values are this process's, to be taken over all
    more: Callable[[], Values] | None = None
    after: Callable[[float], object] | None = None
    lr: float | None = None  # of a record that is due
    ended: float = 0.0  # when its step was queued, of time.monotonic


class LateReads:
    """The updates of a training that are queued and not read: one at most between two steps.

    Args:
        task: what is trained.
        done: called with each update's step (from 0), its values over all processes, the step size
            where a record is due, and when the step ended (of `time.monotonic`).
    """

    def __init__(self, task: Task, done: Done) -> None:
        self._task, self._done = task, done
        self._waiting: Queued | None = None  # of the step before
        self._open: Queued | None = None  # of this step
        self.explaining: NumericalError | None = None

    def queue(
        self, step: int, verdict: Values, judge: Callable[[Values], bool], average: Any
    ) -> None:
        """Takes an update of this step; `judge(verdict)` follows when its numbers are read."""
        self._open = Queued(step, HostCopy(verdict), judge, average)

    def take(
        self,
        values: Values,
        more: Callable[[], Values] | None,
        after: Callable[[float], object] | None,
    ) -> bool:
        """Takes this step's values, see `step_values`; False where its update has been read."""
        if self._open is None:
            return False
        queued = self._open
        queued.values, queued.shared, queued.more, queued.after = (
            HostCopy(values),
            True,
            more,
            after,
        )
        return True

    def close(self, step: int, values: Values, lr: float | None) -> bool:
        """Ends a step; whether its numbers are still to be read.

        Args:
            step: from 0.
            values: what the step returned.
            lr: the step size, where a record is due as soon as they are read.
        """
        self.settle()  # where the step did so, there is nothing left
        queued, self._open = self._open, None
        if queued is None:
            self._done(step, values, None, time.monotonic())
            return False
        queued.values, queued.lr = queued.values or HostCopy(values), lr
        queued.ended = time.monotonic()
        self._waiting = queued
        return True

    def settle(self) -> None:
        """Reads the update of the step before, and does what hangs on it.

        Raises:
            NumericalError: its loss or gradients were not finite; the weights are as before it.
        """
        queued, self._waiting = self._waiting, None
        if queued is None:
            return
        assert queued.values is not None
        with self._task.world.device_exchange():
            verdict: Values = queued.verdict.read()
            values: Values = queued.values.read()
        if queued.judge(verdict) and queued.average is not None:
            queued.average.update(queued.step)
        if queued.shared:
            values = all_values(self._task, values, queued.more, queued.after)
        self._done(queued.step, values, queued.lr, queued.ended)

    def explain(self, step: int, fallback: NumericalError) -> NoReturn:
        """Raises the error of an update that was skipped, for its weights are still there: repeats
        its step, which reads at once and says where it began. `fallback` where it does not."""
        self.explaining = fallback
        try:
            self._task.train_step(step)
        except NumericalError:
            raise
        except Exception as problem:
            raise fallback from problem
        raise fallback


_OPEN: dict[int, LateReads] = {}  # by id of the task, while it is trained


@contextmanager
def reading_late(task: Task, done: Done) -> Iterator[LateReads]:
    """Inside, the updates of `task` are read a step later. See `LateReads`."""
    reads = _OPEN[id(task)] = LateReads(task, done)
    try:
        yield reads
    finally:
        del _OPEN[id(task)]


def late_reads(task: Any) -> LateReads | None:
    """Those of a task that `train` trains now, or None."""
    return _OPEN.get(id(task))


def settle(task: Task) -> None:
    """Reads the update of the step before, where that is still to be done.

    For a `train_step` that looks at the average, or changes weights, before its `update`.
    """
    reads = late_reads(task)
    if reads is not None:
        reads.settle()


def step_values(
    task: Task,
    values: Values,
    *,
    more: Callable[[], Values] | None = None,
    after: Callable[[float], object] | None = None,
) -> Values:
    """A step's values over all processes, for `train_step` to return.

    In the loop they are read a step later, and this process's own are returned.

    Args:
        task: what is trained; its `update` of this step is done.
        values: of this process.
        more: gives values that the host computes from what it has read.
        after: called with the loss over all processes; a rule of the training that needs it.
    """
    reads = late_reads(task)
    if reads is not None and reads.take(values, more, after):
        return values
    return all_values(task, values, more, after)


def all_values(
    task: Task,
    values: Values,
    more: Callable[[], Values] | None,
    after: Callable[[float], object] | None,
) -> Values:
    merged = task.world.mean({**values, **({} if more is None else more())})
    if after is not None:
        after(float(merged["loss"]))
    return merged
