"""The pictures of `train_precision`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from dalle.precision.plots import kept_figure

COLOURS = {"fp32": "C0", "bf16": "C1", "fp16-scaled": "C2"}


def draw(what: str, result: dict[str, Any], path: Path) -> None:
    """Draws the result of `same` or `deep` into a PNG."""
    figure = _same(result) if what == "same" else kept_figure(result["runs"])
    if what == "same":
        figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _same(result: dict[str, Any]) -> Any:
    figure, (curves, ends) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(3, 2))
    for run in result["runs"]:
        colour = COLOURS[run["precision"]]
        label = run["precision"] if run["seed"] == 0 else None
        curves.plot(run["steps"], run["validation"], color=colour, label=label, linewidth=1)
    curves.set(xlabel="updates", ylabel="validation loss (nats)", yscale="log")
    curves.legend(fontsize=8)
    for i, (name, row) in enumerate(result["table"].items()):
        percent = [100 * value for value in row["against_fp32"]]
        ends.plot([i] * len(percent), percent, "o", color=COLOURS[name], alpha=0.6)
        ends.plot([i - 0.2, i + 0.2], [100 * row["mean_against_fp32"]] * 2, color=COLOURS[name])
    ends.axhspan(-1, 1, color="grey", alpha=0.15, label="within 1 %")
    ends.set_xticks(range(len(result["table"])), list(result["table"]))
    ends.set(ylabel="last loss against fp32, %", title="each seed, and the mean (line)")
    ends.legend(fontsize=8)
    return figure
