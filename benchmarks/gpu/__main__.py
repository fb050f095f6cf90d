"""The door: makes `gpu` and `harness` importable as pytest does, then runs."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpu.run import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
