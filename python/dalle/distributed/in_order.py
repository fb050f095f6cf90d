"""The thread of `PowerSGD` that exchanges buckets beside the backward pass on the CPU."""

from __future__ import annotations

import copy
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor


class InOrder:
    """One thread that reduces buckets in the order in which they came, so that all processes issue
    their collectives in one order. After one that failed, all fail: they would wait in vain. It
    ends with this object."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        run = threading.Thread(target=_run, args=(self._jobs,), daemon=True, name="PowerSGD")
        run.start()
        weakref.finalize(self, self._jobs.put, None)

    def put(self, job: Callable[[], None], future: Any, result: Tensor) -> None:
        self._jobs.put((job, future, result))


_Job = tuple[Callable[[], None], Any, Tensor]


def _bare(error: Exception) -> Exception:
    """The same error without the frames it passed: they hold the PowerSGD."""
    try:
        return copy.copy(error)
    except TypeError:  # of a class that takes other arguments
        return RuntimeError(str(error))


def _raise(error: Exception) -> None:
    raise _bare(error).with_traceback(error.__traceback__) from error.__cause__


def _run(jobs: queue.SimpleQueue[_Job | None]) -> None:
    failed: Exception | None = None
    while (found := jobs.get()) is not None:
        job, future, result = found
        if failed is None:
            try:
                job()
            except Exception as error:  # it reaches the caller through the future
                failed = error
        if failed is None:
            future.set_result(result)
        else:
            # `set_exception`, but that it raises a copy: what a caller raised holds the caller's
            # frames, they hold the future, and no collector sees a circle through a future.
            future._set_unwrap_func(_raise)
            future.set_result(failed)
            failed = _bare(failed)
        del found, job, future, result  # they hold the PowerSGD, whose end this thread waits for
