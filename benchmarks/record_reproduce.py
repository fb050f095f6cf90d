"""The time of `dalle reproduce --quick`, by figure, as a dated result.

`python -m benchmarks.record_reproduce out/demo/pipeline`, or the pipelines of several sets.

Each pipeline gets a run of its own in a fresh folder, from the start of the command to its end. The
limit is the ten minutes on two cores that the command promises; the exit code is 1 above it, or
where a figure was not made.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for `python -m`
from harness import record  # noqa: E402
from record_demo import HELD  # noqa: E402

LIMIT = 600.0  # seconds


def measured(model: Path, out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Runs the command; the run as a whole, and a row for each figure."""
    words = ["reproduce", "--quick", "--model", str(model), "--out", str(out)]
    load = os.getloadavg()[0]
    begin, used = time.monotonic(), processor_seconds()
    subprocess.run([sys.executable, "-m", "dalle", *words], check=True)
    seconds, used = time.monotonic() - begin, processor_seconds() - used
    figures = json.loads((out / "figures.json").read_text())
    run, rows = summary(model, figures, seconds)
    loads = [round(load, 2), round(os.getloadavg()[0], 2)]
    return {**run, "processor_seconds": round(used, 1), "load_before_and_after": loads}, rows


def processor_seconds() -> float:
    """Of all children that have ended, and theirs: what other work slows down least."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def summary(
    model: Path, figures: dict[str, Any], seconds: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Of one run.

    Args:
        model: folder of its pipeline.
        figures: content of figures.json.
        seconds: of the whole command.
    """
    lacking = [key for key, each in figures.items() if each["missing"].startswith("Not made")]
    name = f"{model.absolute().parent.name}/{model.name}"
    run = {
        "model": name,
        "seconds": round(seconds, 1),
        "figures": round(sum(each["seconds"] for each in figures.values()), 1),
        "not_made": lacking,
        "within_limit": seconds <= LIMIT and not lacking,
    }
    rows = [
        {"model": name, "figure": key, "seconds": each["seconds"]} for key, each in figures.items()
    ]
    return run, rows


def main() -> int:
    """Writes results/<date>_reproduce[_<name>].json and prints its path."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", help="folders of pipelines")
    parser.add_argument("--out", type=Path, help="where the pages stay; left out, nowhere")
    parser.add_argument("--name", default="", help="end of the file's name, such as avx2")
    parser.add_argument("--load", default="", help="what else ran, in words")
    given = parser.parse_args()
    runs, rows = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for number, model in enumerate(given.models):
            out = (given.out or Path(scratch)) / (str(number) if len(given.models) > 1 else "page")
            if (out / "figures.json").exists():
                parser.error(f"out must be a fresh folder, got {out}")
            run, own = measured(model, out)
            runs.append(run)
            rows += own
            print(run)
    path = record(
        "_".join(part for part in ("reproduce", given.name) if part),
        rows,
        command="dalle reproduce --quick",
        limit_seconds=LIMIT,
        cores=len(os.sched_getaffinity(0)),
        environment={name: os.environ[name] for name in HELD if name in os.environ},
        load=given.load,
        runs=runs,
    )
    print(path)
    return 0 if all(run["within_limit"] for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
