"""Saving while a training runs, and before an error ends it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dalle.console import say
from dalle.errors import CheckpointError, DalleError, EnvironmentProblem, NumericalError
from dalle.train.checkpoint import save_checkpoint
from dalle.train.lock import FolderLock
from dalle.train.task import Task


class Saver:
    """Saves checkpoints; a disk error is reported once and does not stop the training."""

    def __init__(self, task: Task, out: Path, keep: int) -> None:
        self._task, self._out, self._keep, self._reported = task, out, keep, False
        self._save_failed = False  # whether the run's last checkpoint could not be written
        self.saved: int | None = None

    def save(self, step: int, *, last: bool) -> None:
        """Writes the checkpoint after `step` updates.

        Raises:
            EnvironmentProblem: if it cannot be written and is the `last`.
        """
        try:
            save_checkpoint(self._task, self._out, step, keep=self._keep)
            self._reported, self.saved = False, step
        except (OSError, CheckpointError) as problem:
            reason = getattr(problem, "strerror", None) or str(problem)
            line = f"{self._task.name}: checkpoint after step {step} not saved: {reason}"
            if last:
                self._save_failed = True
                raise EnvironmentProblem(f"{line}; older checkpoints are untouched") from problem
            if not self._reported:
                say(f"{line}; training goes on, older checkpoints are untouched")
            self._reported = True

    def save_on_error(self, step: int) -> None:
        """Saves the state after `step` updates before an error ends the training; reports it."""
        task = self._task
        if self._save_failed:
            return
        try:
            if self.saved != step:
                self.save(step, last=True)
        except Exception as second:
            say(str(second))
        else:
            done = f"checkpoint after step {step} written"
            say(f"{task.name}: an error ends the training: {done}; the same command goes on")


class StepWatch:
    """Knows whether a step that failed has left the training as it was.

    A step that cannot load its data has; one that failed in the middle of its update has not.
    """

    def __init__(self, task: Task) -> None:
        self._tensors = [*task.model.parameters(), *task.model.buffers()]
        self._hook = task.optimizer.register_step_pre_hook(self._note)
        self._generators: tuple[Any, ...] | None = None

    def _note(self, *_: Any) -> None:
        self._updating = True

    def _versions(self) -> list[int]:
        return [tensor._version for tensor in self._tensors]

    def begin(self) -> None:
        """Before a step."""
        self._updating, self._before = False, self._versions()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self._generators = torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()

    def end(self) -> None:
        """After a step that is done."""
        self._generators = None

    def undo(self) -> bool:
        """After an error: whether nothing but random generators has moved; those are put back."""
        if self._generators is None:
            return True
        if self._updating or self._versions() != self._before:
            return False
        cpu, cuda, numpy, python = self._generators
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(cuda)
        np.random.set_state(numpy)
        random.setstate(python)
        return True

    def close(self) -> None:
        """Takes its hook off the optimizer."""
        self._hook.remove()


def may_be_read(task: Task, problem: Exception) -> bool:
    """Whether the update before the step that failed can still be read, which is collective."""
    raised_on_all = isinstance(problem, DalleError) and problem.raised_on_all
    return task.world.size == 1 or raised_on_all


def can_be_saved(task: Task, problem: Exception, watch: StepWatch, lock: FolderLock | None) -> bool:
    """Whether the state after the last step is still there when `problem` ends the training, and
    may be saved: not where numbers have gone wrong. Collective where all have the problem."""
    if isinstance(problem, NumericalError):
        return False
    if task.world.size > 1 and not (isinstance(problem, DalleError) and problem.raised_on_all):
        return False  # other processes may be elsewhere
    lost = not watch.undo() or (lock is not None and not lock.held)
    return not task.world.any(lost)
