"""`python -m dalle` is the `dalle` command."""

from __future__ import annotations

import contextlib
import os
import sys

from dalle.cli import main
from dalle.console import keep_standard_files


def leave(code: int) -> None:
    """Ends the process; at once where one of several has failed.

    Threads of an exchange that will never end would keep the interpreter from ending, or abort it.
    """
    if code and os.environ.get("WORLD_SIZE", "1") != "1":
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
        os._exit(code)
    sys.exit(code)


def run() -> None:
    """The script `dalle`."""
    keep_standard_files()
    leave(main())


if __name__ == "__main__":
    run()
