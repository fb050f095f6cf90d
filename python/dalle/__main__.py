"""`python -m dalle` is the `dalle` command."""

from __future__ import annotations

import os
import sys

from dalle.cli import main


def leave(code: int) -> None:
    """Ends the process; at once where one of several has failed.

    Threads of an exchange that will never end would keep the interpreter from ending, or abort it.
    """
    if code and os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run() -> None:
    """The script `dalle`."""
    leave(main())


if __name__ == "__main__":
    run()
