"""The thread of `PowerSGD` that reduces gradient buckets during the backward pass on the CPU."""

from __future__ import annotations

import copy
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor


class ReduceThread:
    """One thread that runs jobs in the order in which they were submitted.

    So all processes issue their collectives in one order. After a job that failed, all later jobs
    fail with the same error: their collectives would wait in vain. The thread ends with this
    object.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        run = threading.Thread(target=_run, args=(self._jobs,), daemon=True, name="PowerSGD")
        run.start()
        weakref.finalize(self, self._jobs.put, None)

    def submit(self, job: Callable[[], None], future: Any, result: Tensor) -> None:
        """Runs `job` in the thread, then completes the future with `result` or with an error."""
        self._jobs.put((job, future, result))


_Job = tuple[Callable[[], None], Any, Tensor]


def _without_frames(error: Exception) -> Exception:
    """The same error without its traceback, whose frames hold the PowerSGD."""
    try:
        return copy.copy(error)
    except TypeError:  # of a class that takes other arguments
        return RuntimeError(str(error))


def _raise(error: Exception) -> None:
    raise _without_frames(error).with_traceback(error.__traceback__) from error.__cause__


def _run(jobs: queue.SimpleQueue[_Job | None]) -> None:
    failed: Exception | None = None
    while (item := jobs.get()) is not None:
        job, future, result = item
        if failed is None:
            try:
                job()
            except Exception as error:  # it reaches the caller through the future
                failed = error
        if failed is None:
            future.set_result(result)
        else:
            # As `set_exception`, which would raise this error itself and not a copy. The traceback
            # of a raised error holds the caller's frames, and they hold the future: a reference
            # cycle through a future, which the garbage collector does not see.
            future._set_unwrap_func(_raise)
            future.set_result(failed)
            failed = _without_frames(failed)
        del item, job, future, result  # they hold the PowerSGD, whose end this thread waits for
