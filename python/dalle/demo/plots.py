"""The report's diagrams, drawn with matplotlib into PNG files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from dalle.demo.workspace import Workspace
from dalle.pictures import save_bytes
from dalle.train.metrics import read_metrics

SERIES = {  # stage -> what is drawn besides "loss", in words that name the axis
    "dvae": {"psnr": "PSNR in dB (right axis)"},
    "ranker": {"accuracy": "accuracy (right axis)"},
    "prior": {"image_loss": "loss of image tokens", "text_loss": "loss of text tokens"},
}
WIDTH = 4.2  # inches of every figure: a page shows it 370 to 480 pixels wide, its type 12 or more
DPI = 200
NEVER_ERRS = "dotted: a ranker that never errs"


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
        drawn.append(_save(space, losses_figure(metrics), "losses.png"))
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
    figure.savefig(buffer, format="png", dpi=DPI)
    plt.close(figure)
    save_bytes(Path(space.out) / "pictures" / name, buffer.getvalue())
    return name


def losses_figure(metrics: dict[str, list[dict[str, Any]]]) -> Any:
    """A figure of matplotlib with the losses of each stage.

    Args:
        metrics: stage of `SERIES` -> records of its metrics.jsonl.
    """
    import matplotlib.pyplot as plt

    height = 3.2 * len(metrics)
    figure, axes = plt.subplots(len(metrics), 1, figsize=(WIDTH, height), squeeze=False)
    # Fixed margins: a tight layout would draw twice. Title and legend stand above each diagram.
    margins = {"bottom": 0.5 / height, "top": 1 - 0.83 / height, "hspace": 0.75}
    figure.subplots_adjust(left=0.14, right=0.87, **margins)
    for axis, (stage, records) in zip(axes[:, 0], metrics.items(), strict=True):
        _line(axis, records, "loss", "loss")
        right_axis = axis.twinx() if stage != "prior" else axis
        for number, (name, words) in enumerate(SERIES[stage].items()):
            _line(right_axis, records, name, words, color=f"C{number + 1}")
        axis.set_xlabel("updates")
        _title_and_legend(axis, stage, [*dict.fromkeys((axis, right_axis))], columns=2)
    return figure


def _title_and_legend(axis: Any, title: str, axes: list[Any], columns: int) -> None:
    """The title, and under it the legend of all lines of `axes`, above the diagram."""
    drawn = [line for ax in axes for line in ax.get_lines()]
    lines = {line.get_label(): line for line in drawn if line.get_label() != "_"}
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.1, 1), "borderaxespad": 0.2}
    look: dict[str, Any] = {"frameon": False, "fontsize": 8, "columnspacing": 1}
    axis.legend(lines.values(), lines.keys(), ncols=columns, **place, **look)
    rows = -(-len(lines) // columns)
    axis.set_title(title, pad=8 + 13 * rows, fontsize=11)  # points


def _line(axis: Any, records: list[dict[str, Any]], name: str, words: str, **style: Any) -> None:
    points = [(r["step"], r[name]) for r in records if isinstance(r.get(name), (int, float))]
    if points:
        axis.plot(*zip(*points, strict=True), label=words, linewidth=1, **style)


def _code_use(space: Workspace, use: dict[str, Any]) -> str:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(WIDTH, 3.2))
    figure.subplots_adjust(left=0.17, right=0.96, bottom=0.16, top=0.82)
    axis.loglog(use["rank"], use["share"], label="this codebook")
    axis.axhline(1 / use["codes"], color="grey", linestyle=":", label="all codes alike")
    used, codes, perplexity = use["codes_used"], use["codes"], use["perplexity"]
    axis.set_xlabel("codes, most frequent first")
    axis.set_ylabel("share of all tokens")
    _title_and_legend(axis, f"{used} of {codes} codes, perplexity {perplexity:.0f}", [axis], 2)
    return _save(space, figure, "codes.png")


def _best_of(space: Workspace, curves: dict[str, list[dict[str, float]]]) -> str:
    import matplotlib.pyplot as plt

    above = 0.43 + 0.18 * (len(curves) + 1)  # inches of the title and the legend
    height = 2.6 + above
    figure, axis = plt.subplots(figsize=(WIDTH, height))
    figure.subplots_adjust(left=0.14, right=0.96, bottom=0.5 / height, top=1 - above / height)
    for number, (name, points) in enumerate(curves.items()):
        counts = [point["samples"] for point in points]
        ranked, oracle = ([p[key] for p in points] for key in ("reranked", "oracle"))
        axis.plot(counts, ranked, "o-", color=f"C{number}", label=name)
        axis.plot(counts, oracle, ":", color=f"C{number}", label="_")
    axis.plot([], [], ":", color="grey", label=NEVER_ERRS)
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(int(count)) for count in counts])
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("samples to choose from")
    axis.set_ylabel("share right")
    _title_and_legend(axis, "Best of N", [axis], 1)
    axis.grid(alpha=0.3)
    return _save(space, figure, "best-of-n.png")
