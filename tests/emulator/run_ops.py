"""Runs the emulated tests of the ops in one of the builds: `python tests/emulator/run_ops.py race`.

random is the plain build with two schedules. Further words go to pytest. The full-size head is
left out: `pytest` runs it in the plain build.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SELECTION = ["-m", "emulated", "-k", "not size_of_the_paper", "tests/ops"]


def sanitizer_libraries() -> str:
    """What LD_PRELOAD needs, since Python itself is not built with the sanitizers."""
    names = ("libasan.so", "libubsan.so")
    query = [["g++", f"-print-file-name={name}"] for name in names]
    found = [subprocess.run(q, capture_output=True, text=True, check=True).stdout for q in query]
    return " ".join(path.strip() for path in found)


def environments(build: str) -> list[dict[str, str]]:
    """The variables of each run of `build`."""
    if build == "random":
        return [{"DALLE_EMULATOR_SEED": str(seed)} for seed in (1, 2)]
    if build == "address":
        options = {"ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": sanitizer_libraries()}
        return [{"DALLE_TEST_EMULATED": "address", **options}]
    if build == "race":
        return [{"DALLE_TEST_EMULATED": "race"}]
    raise SystemExit(f"run_ops: build must be random, address or race, got {build}")


def main() -> int:
    build, *words = sys.argv[1:] or ["none"]
    for variables in environments(build):
        run = [sys.executable, "-m", "pytest", *SELECTION, *words]
        code = subprocess.run(
            run, cwd=ROOT, env={**os.environ, **variables}, check=False
        ).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
