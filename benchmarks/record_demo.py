"""Keeps the summary of a demo or of `dalle train` as a dated result.

`python -m benchmarks.record_demo out/demo`, or the folder of the training.

To be called on the machine of the demo, at its commit, with the same environment.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for `python -m`
from harness import record  # noqa: E402

HELD = ("DALLE_EXT_CPU_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS")


def main() -> None:
    """Writes results/<date>_<command>_<data>[_<name>].json and prints its path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the run")
    parser.add_argument("--name", default="", help="end of the file's name, such as avx2")
    parser.add_argument("--load", default="", help="what else ran, in words or as uptime says it")
    words = parser.parse_args()
    summary = json.loads((words.out / "summary.json").read_text())
    verb, data = summary["command"], Path(summary["options"]["data"]).name
    held = {name: os.environ[name] for name in HELD if name in os.environ}
    name = "_".join(part for part in (verb, data, words.name) if part)
    path = record(
        name, [], command=f"dalle {verb} --data {data}", environment=held, load=words.load,
        summary={**summary, "options": {**summary["options"], "data": data}},
    )  # fmt: skip
    print(path)


if __name__ == "__main__":
    main()
