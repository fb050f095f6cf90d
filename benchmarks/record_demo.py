"""Keeps a demo's summary as a dated result: `python -m benchmarks.record_demo out/demo`.

To be called on the machine of the demo, at its commit, with the same environment.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from benchmarks.harness import record

HELD = ("DALLE_EXT_CPU_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS")


def main() -> None:
    """Writes results/<date>_demo_<data>[_<name>].json and prints its path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the demo")
    parser.add_argument("--name", default="", help="end of the file's name, such as avx2")
    parser.add_argument("--load", default="", help="what else ran, in words or as uptime says it")
    words = parser.parse_args()
    summary = json.loads((words.out / "summary.json").read_text())
    data = summary["options"]["data"]
    held = {name: os.environ[name] for name in HELD if name in os.environ}
    name = "_".join(part for part in ("demo", data, words.name) if part)
    path = record(
        name, [], command=f"dalle demo --data {data}", environment=held, load=words.load,
        summary={**summary, "options": {**summary["options"], "out": "out/demo"}},
    )  # fmt: skip
    print(path)


if __name__ == "__main__":
    main()
