"""Loss curves of the pipeline's trainings, and the table of two quantizers (2.1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dalle
from dalle.demo.plots import SERIES, losses_figure
from dalle.errors import DataError
from dalle.evaluate.results import pyplot, table
from dalle.files import read_bytes, read_object
from dalle.reproduce.context import OWNER, Context
from dalle.reproduce.figure import Figure
from dalle.train.metrics import METRICS_FILE, read_metrics

PATTERN = "*quantizer*.json"  # of a result file


def losses(context: Context) -> Figure:
    """The losses of dVAE, ranker and prior over their trainings."""
    around = context.model.absolute().parent
    metrics: dict[str, list[dict[str, Any]]] = {}
    for stage in SERIES:
        for folder in (around / "work" / stage, around / stage):
            if (folder / METRICS_FILE).is_file() and stage not in metrics:
                try:
                    records = read_metrics(folder / METRICS_FILE)
                except OSError:
                    continue
                if records:
                    metrics[stage] = records
    stated = {"dvae_updates": 3_000_000, "prior_updates": 430_000, "prior_batch": 1024}
    command = context.own_command("losses")
    missing = [stage for stage in SERIES if stage not in metrics]
    if not metrics:
        return Figure(
            paper=stated,
            command=command,
            missing=f"No {METRICS_FILE} of a training beside the pipeline. dalle demo and dalle "
            "train keep it in work/ beside it.",
        )
    pyplot(OWNER)
    names = [name for name in ("loss", "image_loss", "text_loss", "psnr", "accuracy")]
    rows = []
    for stage, records in metrics.items():
        last = records[-1]
        shown = ", ".join(f"{n} {last[n]:.4g}" for n in names if isinstance(last.get(n), float))
        first = records[0].get("loss")
        rows.append([stage, last["step"], first, shown])
    return Figure(
        text="Losses of the trainings that made this pipeline, from their metrics.jsonl.",
        ours={
            stage: {"updates": records[-1]["step"], "loss": records[-1].get("loss")}
            for stage, records in metrics.items()
        },
        paper=stated,
        tables=[table(["stage", "updates", "first loss", "last"], rows)],
        pictures=[context.plot("losses.png", losses_figure(metrics))],
        command=command,
        differs="The paper shows no loss curves. Its dVAE was trained for 3,000,000 updates of 512 "
        "pictures, its prior for 430,000 of 1,024 pairs.",
        missing=f"No {METRICS_FILE} of: {', '.join(missing)}." if missing else "",
    )


def result_file(pattern: str) -> Path | None:
    """The newest file of benchmarks/results of that pattern, where the source tree is there."""
    folder = Path(dalle.__file__).resolve().parents[2] / "benchmarks" / "results"
    return max(folder.glob(pattern), default=None, key=lambda path: path.name)


def quantizers(context: Context) -> Figure:
    """The gumbel relaxation beside straight-through, all else the same."""
    stated = {"claim": "the relaxation, annealed to 1/16, is what the paper trains with; 2.1 "
              "names straight-through (VQ) as the other way"}  # fmt: skip
    command = context.own_command("quantizers")
    file = result_file(PATTERN)
    if file is None:
        return Figure(
            paper=stated,
            command=command,
            missing="The two were not compared: there is no result file benchmarks/results/"
            f"{PATTERN} beside this installation.",
        )
    try:
        found = read_object(file, DataError)
    except DataError as problem:
        return Figure(paper=stated, command=command, missing=str(problem))
    return _quantizers(context, found, file, stated, command)


def _quantizers(
    context: Context, found: dict[str, Any], file: Path, stated: Any, command: str
) -> Figure:
    rows = found.get("table")
    columns: list[str] = []
    cells: list[list[Any]] = []
    if isinstance(rows, dict):
        for name, values in rows.items():
            if isinstance(values, dict):
                columns = columns or list(values)
                cells.append([name, *(values.get(column) for column in columns)])
    if not cells:
        return Figure(
            paper=stated, command=command, missing=f"{file.name} must hold a table, got none"
        )
    drawn = file.parents[2] / "docs" / "images" / "quantizers.png"
    shown = [context.save("quantizers.png", read_bytes(drawn))] if drawn.is_file() else []
    return Figure(
        text="The same dVAE trained with the gumbel relaxation and with straight-through; mean and "
        "standard deviation over the seeds."
        + (" Unseen pictures over the reconstructions of both." if shown else ""),
        pictures=shown,
        ours={"table": rows, "file": file.name},
        paper=stated,
        tables=[table(["quantizer", *columns], cells, file.name)],
        command=command,
        differs="Small dVAEs and short trainings; the paper compares in words only.",
    )
