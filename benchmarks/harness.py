"""Times our op beside its rivals in one run, and keeps dated records.

Two shared cores are noisy, so the candidates take turns: one round runs each of them once, and the
median over the rounds is compared. A ratio of medians from one run is the figure; absolute times
only say where it was measured.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

import dalle_ext

Clock = Callable[[Callable[[], Any]], float]
"""Runs a function of no arguments once and returns the seconds that it took."""

RESULTS = Path(__file__).parent / "results"
ROWS: list[dict[str, Any]] = []  # what this run measured; conftest.py prints and records it


def host_clock(run: Callable[[], Any]) -> float:
    """Wall seconds; whoever measures a device has `run` wait for it."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def medians(
    candidates: dict[str, Callable[[], Any]],
    *,
    rounds: int = 7,
    budget: float = 20.0,
    clock: Clock = host_clock,
) -> dict[str, float]:
    """Median seconds of each candidate, taken in turns after one unmeasured round.

    Args:
        candidates: name -> function of no arguments.
        rounds: rounds to measure; fewer (at least 3) where `budget` seconds run out.
        budget: seconds for the whole comparison.
        clock: what times one call.
    """
    begin = time.perf_counter()
    for run in candidates.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - begin > budget:
            break
        for name, run in candidates.items():
            times[name].append(clock(run))
    return {name: statistics.median(values) for name, values in times.items()}


def compare(
    what: str,
    ours: Callable[[], Any],
    rivals: dict[str, Callable[[], Any]],
    *,
    work: float,
    unit: str,
    goals: dict[str, float] | None = None,
    rounds: int = 7,
) -> list[dict[str, Any]]:
    """Times `ours` beside each rival and keeps one row a rival.

    Args:
        what: op, pass and shape, as the table shows it.
        ours: our op, checked by the caller before.
        rivals: name (after its library) -> function doing the same work.
        work: work units one call does, for the rate (FLOPs on attended pairs, elements, images).
        unit: name of `work` per second, e.g. "GFLOP/s" with `work` in GFLOP.
        goals: rival -> the ratio we mean to reach at least.
        rounds: see `medians`.

    Returns:
        The rows: what, seconds, rate, unit, rival, rival_seconds, ratio (rival / ours), goal.
    """
    seconds = medians({"ours": ours, **rivals}, rounds=rounds)
    rows = []
    for rival in rivals:
        rows.append(
            {
                "what": what,
                "seconds": seconds["ours"],
                "rate": work / seconds["ours"],
                "unit": unit,
                "rival": rival,
                "rival_seconds": seconds[rival],
                "ratio": seconds[rival] / seconds["ours"],
                "goal": (goals or {}).get(rival),
            }
        )
    ROWS.extend(rows)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, one line each."""
    lines = [f"{'what':58} {'time':>10} {'rate':>20} {'rival':24} {'ratio':>7} {'goal':>5}"]
    for row in rows:
        goal = "" if row["goal"] is None else f"{row['goal']:.1f}"
        rate = f"{row['rate']:.4g} {row['unit']}"
        lines.append(
            f"{row['what']:58} {row['seconds'] * 1e3:8.2f}ms {rate:>20} {row['rival']:24} "
            f"{row['ratio']:6.2f}x {goal:>5}"
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Processor, threads, versions and commit, as every result file names them."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    run = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(run, capture_output=True, text=True, check=False).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": date.today().isoformat(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "commit": commit,
        "build": dalle_ext.build_info(),
    }


def record(name: str, rows: list[dict[str, Any]], **more: Any) -> Path:
    """Writes machine, `more` and the rows to `results/<date>_<name>.json`; returns the path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{date.today().isoformat()}_{name}.json"
    whole = {"machine": machine(), **more, "rows": rows}
    scratch = path.with_suffix(".tmp")  # a run that is cut short leaves no half file
    scratch.write_text(json.dumps(whole, indent=1) + "\n")
    scratch.replace(path)
    return path
