"""`dalle plot scales`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dalle.errors import DataError
from dalle.precision.plots import plot_scales
from dalle.train.metrics import METRICS_FILE, read_metrics


@dataclass(frozen=True, kw_only=True)
class PlotScalesConfig:
    """Draws the gradient scales of a training with precision fp16-scaled.

    Attributes:
        run: folder of the training, as given to `--out` there.
        out: the PNG to write; empty is scales.png in that folder.
    """

    run: Path
    out: Path | None = None


def scales(config: PlotScalesConfig) -> None:
    """Reads metrics.jsonl of the run, draws, and says where."""
    file = config.run / METRICS_FILE
    if not file.is_file():
        raise DataError(f"plot scales: run must hold {METRICS_FILE}, got {config.run}")
    out = config.out or config.run / "scales.png"
    plot_scales(read_metrics(file), out)
    print(f"plot scales: {out}")
