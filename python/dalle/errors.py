"""Errors a user can cause or must act on. Each prints as one line, without a traceback.

The exit codes are those of the `dalle` command: 2 usage, 3 data, 4 surroundings, 5 numbers,
6 interrupted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

SECOND_DERIVATIVE = (
    "dalle: gradients of this model must be differentiated once, got a derivative of a gradient; "
    "use precision fp32 and parts 1"
)


@contextmanager
def stopped_with(line: str) -> Iterator[None]:
    """Makes Ctrl-C inside end with `line`, which says what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(line) from stop


class DalleError(Exception):
    """Base of every error that `dalle` raises on purpose.

    Attributes:
        raised_on_all: whether all processes of a cluster have raised it at the same point, so that
            they can still call collectives.
    """

    exit_code = 1
    raised_on_all = False

    def rename(self, names: Collection[str], owner: str) -> None:
        """Puts `owner` in place of the function that begins the line, if it is one of `names`."""
        name, colon, rest = str(self).partition(": ")
        if colon and name in names:
            self.args = (f"{owner}: {rest}",)


class UsageError(DalleError, ValueError):
    """An argument, option or preset is not what the function or command takes."""

    exit_code = 2


class UnknownOption(UsageError, TypeError):
    """A keyword that a function does not have: also the TypeError that Python raises of its own."""


class DataError(DalleError):
    """Input data is missing, empty or unreadable."""

    exit_code = 3


class CheckpointError(DataError):
    """A checkpoint or model folder is damaged, truncated or of another model."""


class OtherTrainingError(CheckpointError):
    """A checkpoint is whole, but of other options, data or models than this run's.

    Attributes:
        keys: what differs, as dotted keys of the description.
    """

    def __init__(self, message: str, keys: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.keys = list(keys)


class EnvironmentProblem(DalleError):
    """The machine lacks something: an extra, disk space, write permission."""

    exit_code = 4


class NumericalError(DalleError):
    """Training produced nonfinite numbers and stopped before the update."""

    exit_code = 5


class Interrupted(DalleError):
    """A signal stopped the run after its state was saved."""

    exit_code = 6
