"""The picture of `bench_cluster`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SMOOTH = 20  # steps whose mean is drawn


def draw(found: dict[str, Any], path: Path) -> None:
    """Loss against steps, and against wall time at 100 Mbit/s where the step was timed there."""
    figure, (steps, wall) = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for i, (mode, losses) in enumerate(found["losses"].items()):
        smooth = [sum(losses[k : k + SMOOTH]) / SMOOTH for k in range(len(losses) - SMOOTH)]
        at = range(SMOOTH, len(losses))
        steps.plot(at, smooth, color=f"C{i}", label=mode, linewidth=1)
        timed = found["times"]["100mbit"].get(mode)
        if timed is not None:
            minutes = [k * timed["seconds"] / 60 for k in at]
            wall.plot(minutes, smooth, color=f"C{i}", label=mode, linewidth=1)
    steps.set(xlabel="steps", ylabel=f"training loss, mean of {SMOOTH} steps")
    wall.set(xlabel="minutes at 100 Mbit/s", xscale="log")
    for axis in (steps, wall):
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
