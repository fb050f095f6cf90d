"""Loss curves of the pipeline's trainings."""

from __future__ import annotations

from typing import Any

from dalle.demo.plots import SERIES, losses_figure
from dalle.evaluate.results import pyplot, table
from dalle.reproduce.context import OWNER, Context
from dalle.reproduce.figure import Figure
from dalle.train.metrics import METRICS_FILE, read_metrics


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
