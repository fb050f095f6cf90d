"""The pictures of `train_precision`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

AGAINST = {"one scale": "one scale against own", "own scales": "own scales against a quarter"}
COLOURS = {"fp32": "C0", "bf16": "C1", "fp16-scaled": "C2"}


def draw(what: str, result: dict[str, Any], path: Path) -> None:
    """Draws the result of `same` or `deep` into a PNG."""
    figure = (_same if what == "same" else _deep)(result)
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


def _deep(result: dict[str, Any]) -> Any:
    figure, grid = plt.subplots(2, 2, figsize=(10, 7))
    axes = grid.flatten()
    for run in result["runs"]:
        _deep_lines(axes, run, first=run["seed"] == 0)
    axes[0].set(title="log2 |activation gradient|", xlabel="resblock")
    axes[1].set(title="log2 of the largest clean scale", xlabel="resblock")
    axes[2].set(title="share of the elements in fp16", xlabel="resblock", ylim=(-0.02, 1.02))
    axes[3].set(title="relative change of the parameter gradients", xlabel="resblock")
    axes[3].set_yscale("log")
    for axis in axes:
        axis.legend(fontsize=7)
    return figure


def _deep_lines(axes: Any, run: dict[str, Any], first: bool) -> None:
    """One seed's lines; only the first seed's are named."""

    def line(axis: Any, values: list[float], label: str, *style: str, **more: Any) -> None:
        axis.plot(range(len(values)), values, *style, label=label if first else None, lw=1, **more)

    for place, (share, values) in enumerate(run["quantiles"].items()):
        line(axes[0], values, f"{share} of the elements", color=f"C{(0, 1, 4)[place]}")
    for name, color in (("one scale", "C3"), ("own scales", "C2")):
        kept = run[name]
        ends = [-24 - scale for scale in kept["block_scale"]]
        line(axes[0], ends, f"zero: {name}", ":", color=color)
        line(axes[1], kept["block_scale"], name, color=color)
        line(axes[2], kept["block_underflow"], f"{name}: to zero", color=color)
        line(axes[2], kept["block_subnormal"], f"{name}: subnormal", ":", color=color)
        line(axes[3], kept["error"], AGAINST[name], color=color)
