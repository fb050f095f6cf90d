"""What surrounds the loop: folder, settings, signals, resuming, saving, pictures."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from dalle.errors import (
    CheckpointError,
    DalleError,
    DataError,
    EnvironmentProblem,
    NumericalError,
    OtherTrainingError,
    UsageError,
)
from dalle.files import saving, temporary_name
from dalle.pictures import save_png, to_uint8
from dalle.train.checkpoint import (
    check_fits,
    checkpoints,
    load_checkpoint,
    read_manifest,
    remove_stale,
    save_checkpoint,
    step_of,
)
from dalle.train.lock import FolderLock
from dalle.train.metrics import say

if TYPE_CHECKING:
    from dalle.distributed.cluster import Cluster
    from dalle.train.loop import LoopConfig, Task

FIXED_KEYS = ("model.", "ranker.", "train.optimizer")
HINT_TO_ACCEPT = "--accept-changes goes on with this run's"


@contextmanager
def settings(seed: int, deterministic: bool) -> Iterator[None]:
    """Seeds the global generators; with `deterministic`, no kernel that varies from run to run."""
    before = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark


@contextmanager
def signals() -> Iterator[list[str]]:
    """A list that gets the name of the first SIGINT, SIGTERM or SIGHUP.

    After it, SIGINT and SIGTERM end the process, and SIGHUP, of which a terminal that is closed
    sends several, does nothing. SIGHUP that is ignored (nohup) stays so. Outside the main thread,
    where Python allows no handlers, the list stays empty.
    """
    received: list[str] = []
    watched = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        watched.append(signal.SIGHUP)

    def note(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        for each in watched:
            signal.signal(each, signal.SIG_IGN if each is signal.SIGHUP else signal.SIG_DFL)
        say(f"{received[0]}: finishing the step and saving; once more to stop at once")

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {each: signal.signal(each, note) for each in watched}
    try:
        yield received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def agreed(cluster: Cluster | None) -> Iterator[None]:
    """What fails inside on one process fails on all, in its words. Collective.

    Process 0 may take longer inside than an exchange is waited for.
    """
    if cluster is None:
        yield
        return
    problem: Exception | None = None
    try:
        yield
    except (DalleError, OSError, torch.OutOfMemoryError) as found:
        problem = found
    cluster.together(problem)


@contextmanager
def alone_in(out: Path, task: Task) -> Iterator[FolderLock | None]:
    """Inside, no other training writes into `out`; process 0 has the lock. Collective."""
    lock = None
    with agreed(task.cluster):
        if task.cluster is None or task.cluster.leads:
            lock = FolderLock(out, task.name)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


def resume(task: Task, config: LoopConfig) -> int:
    """Puts the state to begin with into `task` and returns the updates already done.

    Raises:
        CheckpointError: if the checkpoint is damaged, missing or of another training; the line
            says how to go on where there is a way.
        UsageError: if `resume` is "none" and `out` holds checkpoints, which would mix two runs.
    """
    out, cluster = Path(config.out), task.cluster
    with agreed(cluster):
        if cluster is None or cluster.leads:
            remove_stale(out)
    found = checkpoints(out) if cluster is None else cluster.first(checkpoints(out))
    if config.resume == "none":
        if found:
            raise UsageError(
                f"train: out must hold no checkpoints with resume none, got {found[-1]}; "
                "choose another folder or remove it"
            )
        return 0
    if config.resume == "auto" and not found:
        return 0
    path = found[-1] if config.resume == "auto" else Path(config.resume)
    try:
        step = load_checkpoint(task, path, accept_changes=config.accept_changes)
    except OtherTrainingError as problem:
        # Tensors of another size fit no run, nor does the state of another optimizer.
        fixed = [key for key in problem.keys if key.startswith(FIXED_KEYS)]
        hint = f"choose another out for another {fixed[0]}" if fixed else HINT_TO_ACCEPT
        raise OtherTrainingError(f"{problem}; {hint}", problem.keys) from problem
    except CheckpointError as problem:
        older = None
        if config.resume == "auto" and not _can_go_on(task, path, config):
            older = next((p for p in found[-2::-1] if _can_go_on(task, p, config)), None)
        hint = "" if older is None else f"; --resume {older} goes on from an older one"
        raise CheckpointError(f"{problem}{hint}") from problem
    if config.resume != "auto":
        with agreed(cluster), saving("train", out):
            if cluster is None or cluster.leads:
                set_aside_later(out, step)
    say(f"{task.name}: resumed after step {step} from {path}")
    return step


def _can_go_on(task: Task, path: Path, config: LoopConfig) -> bool:
    """Whether a checkpoint is whole and of this training."""
    try:
        check_fits(task, read_manifest(path), path, accept_changes=config.accept_changes)
    except CheckpointError:
        return False
    return True


@contextmanager
def answering(cluster: Cluster | None, step: Callable[[], int]) -> Iterator[None]:
    """Turns an exchange that fails inside into the line that names who did not answer."""
    try:
        yield
    except RuntimeError as problem:
        found = None if cluster is None else cluster.explain(problem, step())
        if found is None:
            raise
        raise found from problem


def set_aside_later(out: Path, step: int) -> None:
    """Renames checkpoints after `step` to aside-..., so that they are neither lost nor resumed."""
    for path in checkpoints(out):
        if step_of(path) > step:
            nonce = temporary_name(path).name.rpartition("-")[2]
            aside = path.with_name(f"aside-{path.name}-{nonce}")
            os.rename(path, aside)
            say(f"train: set aside {path.name} as {aside.name}")


class Saver:
    """Saves checkpoints; an error of the disk is told once and does not stop the training."""

    def __init__(self, task: Task, out: Path, keep: int) -> None:
        self._task, self._out, self._keep, self._told = task, out, keep, False
        self._lost = False  # is the last one lost?
        self.saved: int | None = None

    def save(self, step: int, *, last: bool) -> None:
        """Writes the checkpoint after `step` updates.

        Raises:
            EnvironmentProblem: if it cannot be written and is the `last`.
        """
        try:
            save_checkpoint(self._task, self._out, step, keep=self._keep)
            self._told, self.saved = False, step
        except (OSError, CheckpointError) as problem:
            reason = getattr(problem, "strerror", None) or str(problem)
            line = f"{self._task.name}: checkpoint after step {step} not saved: {reason}"
            if last:
                self._lost = True
                raise EnvironmentProblem(f"{line}; older checkpoints are untouched") from problem
            if not self._told:
                say(f"{line}; training goes on, older checkpoints are untouched")
            self._told = True

    def rescue(self, step: int) -> None:
        """Saves the state after `step` updates before an error ends the training, and says so."""
        task = self._task
        if self._lost:
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
        own, cuda, numpy, python = self._generators
        torch.set_rng_state(own)
        torch.cuda.set_rng_state_all(cuda)
        np.random.set_state(numpy)
        random.setstate(python)
        return True

    def close(self) -> None:
        """Takes its hook off the optimizer."""
        self._hook.remove()


def can_be_saved(task: Task, problem: Exception, watch: StepWatch, lock: FolderLock | None) -> bool:
    """Whether the state after the last step is still there when `problem` ends the training, and
    may be saved: not where numbers have gone wrong. Collective where all have the problem."""
    cluster = task.cluster
    if isinstance(problem, NumericalError):
        return False
    if cluster is not None and not (isinstance(problem, DalleError) and problem.agreed):
        return False  # the others are elsewhere
    lost = not watch.undo() or (lock is not None and not lock.held)
    return not (lost if cluster is None else cluster.any(lost))


@contextmanager
def _room(task: Task) -> Iterator[None]:
    """Too little memory of a GPU for what comes beside the training, in one line."""
    try:
        yield
    except torch.OutOfMemoryError as problem:
        found = str(problem).splitlines()[0]
        raise EnvironmentProblem(f"{task.name}: memory must suffice, got: {found}") from problem


@contextmanager
def averaged_model(task: Task, averaged: bool = True) -> Iterator[nn.Module | None]:
    """The whole model of a task, with the averaged weights if there are some and unless told not.

    On many processes a copy, on the CPU of process 0; None on the others. Collective, but not what
    is done with it inside.

    Raises:
        EnvironmentProblem: a GPU's memory does not suffice for what is done inside.
    """
    average = task.average if averaged else None
    if task.cluster is not None:
        from dalle.distributed.sharding import whole_model

        values = None if average is None else average.average
        model = whole_model(task.model, task.cluster, values)  # of its exchanges none may be left
        with _room(task):
            yield model
        return
    with nullcontext() if average is None else average.applied(), _room(task):
        yield task.model


@contextmanager
def whole(task: Task) -> Iterator[nn.Module | None]:
    """The whole model of a task, to be changed inside the block.

    On many processes a copy, on process 0; None on the others, which then take it over. Collective.
    """
    with averaged_model(task, False) as model:
        yield model
    if task.cluster is not None:
        from dalle.distributed.sharding import take_over

        take_over(task.model, model, task.cluster)


def write_pictures(task: Task, step: int, folder: Path) -> None:
    """Writes `task.pictures(step)` as folder/NAME-STEP.png, the model in evaluation mode."""
    was_training = task.model.training
    task.model.eval()
    try:
        with torch.no_grad():
            pictures = task.pictures(step)
        for name, picture in pictures.items():
            image = Image.fromarray(to_uint8(picture))
            save_png(folder / f"{name}-{step:08d}.png", image)
    except (EnvironmentProblem, DataError, NumericalError) as problem:
        say(f"{task.name}: pictures after step {step} not written: {problem}")
    finally:
        task.model.train(was_training)
    if task.cluster is not None:
        task.cluster.together(None)  # the others have waited for process 0
