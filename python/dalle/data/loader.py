"""The data of a training's steps, read by worker processes ahead of time.

A step's data is a pure function of its number, so the numbers of a training do not depend on who
reads, nor on how far ahead: `torch.utils.data.DataLoader` hands out steps, not items.
"""

from __future__ import annotations

import itertools
import multiprocessing
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from dalle.configs import integer
from dalle.data import pairs as pairs_module
from dalle.data.pairs import Pairs, leave_out
from dalle.errors import DalleError, DataError, EnvironmentProblem, UsageError

T = TypeVar("T")
AHEAD = 2  # steps that each worker reads ahead


class _Read(NamedTuple):
    """What a worker sends back: a step's data or the problem, and what it left out on the way."""

    data: Any
    problem: DalleError | None
    left_out: list[tuple[int, DataError]]


class _Steps(Dataset[_Read]):
    def __init__(self, load: Callable[[int], Any]) -> None:
        self.load = load

    def __getitem__(self, step: int) -> _Read:
        collected = pairs_module.collector
        assert collected is not None  # of `_begin_worker`
        collected.clear()
        data, problem = None, None
        try:
            data = self.load(step)
        except DalleError as error:
            problem = error
        return _Read(data, problem, list(collected))


def _begin_worker(_: int) -> None:
    """Ctrl-C and a closed terminal are the training process's to handle."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which multiprocessing ends its children
    pairs_module.collector = []


class StepLoader(Generic[T]):
    """Gives the data of one step after another.

    Args:
        owner: begins an error's line.
        load: step -> data, tensors and numbers; a pure function of the step that uses no GPU. What
            it leaves out of `pairs` is counted in this process.
        pairs: the data set that it reads.
        workers: processes that read ahead; 0 reads here, when the data is asked for. They are
            forked, so the data set in memory is shared and not copied.
        pin: whether tensors come in pinned memory, for a GPU.

    Attributes:
        seconds: waited for data so far.

    Raises:
        UsageError: workers out of range, or on a system without fork.
    """

    def __init__(
        self,
        owner: str,
        load: Callable[[int], T],
        pairs: Pairs,
        *,
        workers: int = 0,
        pin: bool = False,
    ) -> None:
        workers = integer(owner, "workers", workers, 0)
        if workers and "fork" not in multiprocessing.get_all_start_methods():
            raise UsageError(f"{owner}: workers must be 0 on a system without fork, got {workers}")
        self.owner, self.pairs, self.workers, self.pin = owner, pairs, workers, pin
        self.seconds = 0.0
        self._load = load
        self._iterator: Iterator[_Read] | None = None
        self._next = -1

    def get(self, step: int) -> T:
        """The data of a step. Steps asked for in order are there ahead of time.

        Raises:
            DataError: as `load` raises it.
            EnvironmentProblem: a worker ended.
        """
        begin = time.monotonic()
        try:
            return self._read(step)
        finally:
            self.seconds += time.monotonic() - begin

    def _read(self, step: int) -> T:
        if not self.workers:
            return self._load(step)
        if self._iterator is None or step != self._next:
            self._iterator = self._begin(step)
        try:
            read = next(self._iterator)
        except (RuntimeError, EOFError, OSError) as problem:  # a worker ended, also while it sent
            self._iterator = None
            reason = next(iter(str(problem).splitlines()), "") or "a worker that was killed"
            raise EnvironmentProblem(
                f"{self.owner}: workers must go on, got: {reason}; --workers 0 does without"
            ) from problem
        self._next = step + 1
        for item, error in read.left_out:
            leave_out(self.pairs, item, error)
        if read.problem is not None:
            raise read.problem
        data: T = read.data
        return data

    def _begin(self, step: int) -> Iterator[_Read]:
        before = signal.getsignal(signal.SIGCHLD)
        with warnings.catch_warnings():  # how many workers is the caller's choice
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            iterator: Iterator[_Read] = iter(
                DataLoader(
                    _Steps(self._load),
                    batch_size=None,
                    sampler=itertools.count(step),
                    num_workers=self.workers,
                    prefetch_factor=AHEAD,
                    pin_memory=self.pin,
                    worker_init_fn=_begin_worker,
                    multiprocessing_context="fork",
                    generator=torch.Generator(),  # its own: the training's must not move
                )
            )
        if threading.current_thread() is threading.main_thread():
            # torch's handler raises in whatever line runs when a worker ends; `_read` notices it
            # within seconds, where nothing is half done.
            signal.signal(signal.SIGCHLD, before)
        return iterator

    def close(self) -> None:
        """Ends the workers; another `get` starts new ones."""
        self._iterator = None
