"""The report's diagrams, drawn with matplotlib into PNG files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from dalle.demo.workspace import Workspace
from dalle.pictures import save_bytes
from dalle.train.metrics import read_metrics

SERIES = {  # stage -> the values drawn besides "loss"
    "dvae": ("psnr", "codes_used"),
    "ranker": ("accuracy",),
    "prior": ("image_loss", "text_loss"),
}


def draw_plots(space: Workspace) -> list[str]:
    """Draws what can be drawn from the files there are; returns the names of the pictures."""
    import matplotlib

    matplotlib.use("Agg")
    drawn = []
    scores = space.read_scores()
    metrics = {
        stage: read_metrics(path)
        for stage in SERIES
        if (path := space.folder(stage) / "metrics.jsonl").exists()
    }
    if any(metrics.values()):
        drawn.append(_losses(space, metrics))
    if "code_use" in scores:
        drawn.append(_code_use(space, scores["code_use"]))
    curves = _curves(scores)
    if curves:
        drawn.append(_best_of(space, curves))
    return drawn


def _curves(scores: dict[str, Any]) -> dict[str, list[dict[str, float]]]:
    if "curves" in scores:
        names = {
            "zero/one_object": "one object, zero-shot",
            "test/two_objects": "two objects, unseen",
            "zero/two_objects": "two objects, zero-shot",
        }
        return {text: scores["curves"][k] for k, text in names.items() if k in scores["curves"]}
    names = {
        "held_out_curve_at_1": "held out: a right one is nearest",
        "held_out_curve_at_5": "held out: among the nearest 5",
        "train_curve_at_1": "training: a right one is nearest",
    }
    return {text: scores[key] for key, text in names.items() if key in scores}


def _save(space: Workspace, figure: Any, name: str) -> str:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    save_bytes(Path(space.out) / "pictures" / name, buffer.getvalue())
    return name


def _losses(space: Workspace, metrics: dict[str, list[dict[str, Any]]]) -> str:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(metrics), figsize=(4.4 * len(metrics), 3), squeeze=False)
    edge = 0.55 / (4.4 * len(metrics))  # fixed margins: a tight layout would draw twice
    figure.subplots_adjust(left=edge, right=1 - edge, bottom=0.17, top=0.9, wspace=0.36)
    for axis, (stage, records) in zip(axes[0], metrics.items(), strict=True):
        _line(axis, records, "loss")
        right_axis = axis.twinx() if stage != "prior" else axis
        for number, name in enumerate(SERIES[stage]):
            if name != "codes_used":
                _line(right_axis, records, name, color=f"C{number + 1}")
        axis.set_title(stage)
        axis.set_xlabel("updates")
        lines = {line.get_label(): line for ax in {axis, right_axis} for line in ax.get_lines()}
        axis.legend(lines.values(), lines.keys(), fontsize=8)
    return _save(space, figure, "losses.png")


def _line(axis: Any, records: list[dict[str, Any]], name: str, **style: Any) -> None:
    points = [(r["step"], r[name]) for r in records if isinstance(r.get(name), (int, float))]
    if points:
        axis.plot(*zip(*points, strict=True), label=name, linewidth=1, **style)


def _code_use(space: Workspace, use: dict[str, Any]) -> str:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.2, 3.4))
    figure.subplots_adjust(left=0.14, right=0.96, bottom=0.15, top=0.9)
    axis.loglog(use["rank"], use["share"], label="this codebook")
    axis.axhline(1 / use["codes"], color="grey", linestyle=":", label="all codes alike")
    used, codes, perplexity = use["codes_used"], use["codes"], use["perplexity"]
    axis.set_title(f"{used} of {codes} codes, perplexity {perplexity:.0f}")
    axis.set_xlabel("codes, most frequent first")
    axis.set_ylabel("share of all tokens")
    axis.legend(fontsize=8)
    return _save(space, figure, "codes.png")


def _best_of(space: Workspace, curves: dict[str, list[dict[str, float]]]) -> str:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.2, 3.4))
    figure.subplots_adjust(left=0.12, right=0.96, bottom=0.15, top=0.95)
    for number, (name, points) in enumerate(curves.items()):
        counts = [point["samples"] for point in points]
        ranked, oracle = ([p[key] for p in points] for key in ("reranked", "oracle"))
        axis.plot(counts, ranked, "o-", color=f"C{number}", label=name)
        axis.plot(counts, oracle, ":", color=f"C{number}", label=f"{name}: oracle")
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(int(count)) for count in counts])
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("samples to choose from")
    axis.set_ylabel("share right")
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    return _save(space, figure, "best-of-n.png")
