"""`python -m dalle` is the `dalle` command."""

from __future__ import annotations

import sys

from dalle.cli import main

if __name__ == "__main__":
    sys.exit(main())
