"""The picture of `bench_cluster`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SMOOTH = 20  # steps whose mean is drawn


def _smooth(losses: list[float]) -> list[float]:
    return [sum(losses[k : k + SMOOTH]) / SMOOTH for k in range(len(losses) - SMOOTH)]


def draw(found: dict[str, Any], times: dict[str, Any], path: Path) -> None:
    """Losses of both tasks against steps; of the second against wall time at 100 Mbit/s too."""
    figure, (early, late, wall) = plt.subplots(1, 3, figsize=(15, 4))
    colours = {mode: f"C{i}" for i, mode in enumerate(found["losses"])}
    for axis, losses in ((early, found["losses"]), (late, found["hard"]["losses"])):
        for mode, values in losses.items():
            at = range(SMOOTH, len(values))
            axis.plot(at, _smooth(values), color=colours[mode], label=mode, linewidth=1)
            timed = times["100mbit"].get(mode)
            if axis is late and timed is not None:
                minutes = [k * timed["seconds"] / 60 for k in at]
                wall.plot(minutes, _smooth(values), color=colours[mode], label=mode, linewidth=1)
    early.set(xlabel="steps", ylabel=f"training loss, mean of {SMOOTH} steps", title="learnt early")
    late.set(xlabel="steps", title="still being learnt")
    wall.set(xlabel="minutes at 100 Mbit/s", xscale="log", title="still being learnt")
    for axis in (early, late, wall):
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
