"""Commands for the tests of the command line."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dalle.errors import Interrupted, NumericalError, UsageError

SEEN = []
TOY = ["toy", "train", "--out", "x"]


def line_of(capsys):
    """The one line that a refused command has printed."""
    heard = capsys.readouterr()
    assert heard.out == "" and heard.err.count("\n") == 1, heard
    assert "Traceback" not in heard.err
    return heard.err.strip()


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Of the loop."""

    out: Path
    steps: int = 3


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Does toy things.

    Args:
        batch_size: pictures a step.
        fail: how to go wrong.
    """

    loop: LoopOptions
    batch_size: int = 8
    lr: float = 1e-3
    grid: tuple[int, int] = (8, 8)
    mode: Literal["row", "column"] = "row"
    quick: bool = False
    top: int | None = None
    words: tuple[str, ...] = field(default=())
    fail: str = ""

    def __post_init__(self):
        if self.batch_size < 1:
            raise UsageError(f"toy: batch_size must be 1 or more, got {self.batch_size}")


def train(config: ToyConfig) -> None:
    """Notes its config, or fails as asked."""
    SEEN.append(config)
    errors = {
        "numbers": NumericalError("toy: loss must be finite,\ngot nan"),
        "interrupted": Interrupted("toy: stopped"),
        "keyboard": KeyboardInterrupt(),
        "disk": OSError(errno.ENOSPC, "No space left on device", "out/x"),
        "file": FileNotFoundError(errno.ENOENT, "No such file or directory", "in/x"),
        "memory": MemoryError("of all"),
        "bug": KeyError("oops"),
    }
    if config.fail:
        raise errors[config.fail]
