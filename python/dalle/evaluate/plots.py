"""Diagrams of `dalle eval`: our curve in colour with its interval, the paper's in grey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dalle.evaluate import paper
from dalle.evaluate.results import GREY, figure_png, pyplot

PUBLISHED = ("FID", "FID (torchvision weights)", "IS", "IS (torchvision weights)")


def curves_png(
    owner: str,
    points: Sequence[dict[str, Any]],
    axis: str,
    words: str,
    metrics: Mapping[str, str],
    places: Sequence[float],
    greys: Mapping[str, Mapping[str, Sequence[float]]],
) -> bytes:
    """A diagram of each metric over `axis`, and of "checker_share" where points have it.

    Numbers of another network than the paper's have another scale, so its curves then have the
    axis on the right.

    Args:
        owner: begins the line of an error.
        points: with the keys `axis`, those of `metrics`, and their intervals.
        axis, words: key and name of the horizontal axis; "candidates" is logarithmic.
        metrics: key of points -> name.
        places, greys: the paper's curves: where, and of each metric name -> values.

    Returns:
        A PNG.
    """
    plt = pyplot(owner)
    shown = [key for key in metrics if any(point[key] is not None for point in points)]
    extra = ["checker_share"] if any("checker_share" in point for point in points) else []
    count = len(shown) + len(extra)
    figure, axes = plt.subplots(
        1, count, figsize=(4.4 * count, 3.6), squeeze=False, layout="constrained"
    )
    for place, key in zip(axes[0], shown, strict=False):
        name = metrics[key]
        beside = place if name in PUBLISHED else place.twinx()
        for number, (model, values) in enumerate(greys[key].items()):
            style = ("-", "--", ":", "-.")[number % 4]
            label = f"{model} (paper)"
            beside.plot(places, values, style, color=GREY, linewidth=1, label=label)
        if beside is not place:
            paper_name = "FID" if key == "distance" else "IS"
            beside.set_ylabel(f"{paper_name} in the paper", color=GREY)
            beside.tick_params(axis="y", colors=GREY)
            place.set_zorder(beside.get_zorder() + 1)
            place.patch.set_visible(False)
        _ours(place, points, axis, key, f"{key}_interval", name)
        handles = [h for a in dict.fromkeys((place, beside)) for h in a.get_lines()]
        place.legend(handles=handles, fontsize=7, loc="upper center", ncols=3,
                     bbox_to_anchor=(0.5, -0.18))  # fmt: skip
        place.set(title=name, ylabel=name)
    for place in axes[0][len(shown) :]:
        _ours(place, points, axis, "checker_share", "checker_interval", "every fact right")
        place.set(title="share right by the checker", ylim=(0, 1.02))
    for place in axes[0]:
        place.set_xlabel(words)
        place.grid(alpha=0.3)
        if axis == "candidates":
            place.set_xscale("log", base=2)
            sizes = sorted({*places, *(point[axis] for point in points)} if shown else ())
            place.set_xticks(sizes, [str(size) for size in sizes], fontsize=7)
    return figure_png(owner, figure)


def _ours(
    place: Any, points: Sequence[dict[str, Any]], axis: str, key: str, interval: str, name: str
) -> None:
    drawn = [point for point in points if point.get(key) is not None]
    xs = [point[axis] for point in drawn]
    place.plot(xs, [point[key] for point in drawn], "o-", color="C0", label=name)
    if drawn and all(point.get(interval) for point in drawn):
        low, high = zip(*(point[interval] for point in drawn), strict=True)
        place.fill_between(xs, low, high, color="C0", alpha=0.2, linewidth=0)


def bars_png(
    owner: str, groups: Sequence[tuple[str, Mapping[str, tuple[float, Sequence[float] | None]]]]
) -> bytes:
    """Bars of shares with intervals, a diagram a group.

    Args:
        owner: begins the line of an error.
        groups: (title, name of a bar -> (share, interval)).

    Returns:
        A PNG.
    """
    plt = pyplot(owner)
    most = max(len(bars) for _, bars in groups)
    figure, axes = plt.subplots(
        1,
        len(groups),
        figsize=(4.4 * len(groups), 0.35 * most + 1.4),
        squeeze=False,
        layout="constrained",
    )
    for place, (title, bars) in zip(axes[0], groups, strict=True):
        for row, (share, interval) in enumerate(bars.values()):
            place.barh(row, share, color="C0" if row % 2 == 0 else "C1", alpha=0.8)
            if interval is not None:
                place.plot(interval, (row, row), color="black", linewidth=1)
        place.set_yticks(range(len(bars)), list(bars), fontsize=8)
        place.set_ylim(len(bars) - 0.5, -0.5)
        place.set(title=title, xlim=(0, 1.02), xlabel="share right")
        place.grid(axis="x", alpha=0.3)
    return figure_png(owner, figure)


def overlap_png(
    owner: str, similarity: np.ndarray, threshold: float | None, points: list[dict[str, Any]]
) -> bytes:
    """The histogram of similarities; beside it the distances, solid and dashed."""
    plt = pyplot(owner)
    count = 2 if points else 1
    figure, axes = plt.subplots(
        1, count, figsize=(4.6 * count, 3.6), squeeze=False, layout="constrained"
    )
    place = axes[0][0]
    place.hist(similarity, bins=np.linspace(min(0.0, float(similarity.min())), 1, 51), color="C0")
    place.set(title="similarity to the nearest", xlabel="cosine", ylabel="real pictures")
    place.set_yscale("symlog", linthresh=1)
    if threshold is not None:
        place.axvline(threshold, color="C1", label=f"threshold {threshold:g}")
        place.legend(fontsize=7)
    if points:
        place, metric = axes[0][1], points[0]["metric"]
        beside = place if metric.startswith("FID") else place.twinx()
        for values, style, words in (
            (paper.FIGURE_9A_FID["DALL-E"], "-", "all"),
            (paper.FIGURE_9A_FID_DASHED["DALL-E"], "--", "without overlap"),
        ):
            beside.plot(paper.RADII, values, style, color=GREY, label=f"DALL-E, {words} (paper)")
        if beside is not place:
            beside.set_ylabel("FID in the paper", color=GREY)
            beside.tick_params(axis="y", colors=GREY)
            place.set_zorder(beside.get_zorder() + 1)
            place.patch.set_visible(False)
        xs = [p["radius"] for p in points]
        place.plot(xs, [p["distance"] for p in points], "o-", color="C0", label=f"{metric}, all")
        if points[0]["without"] is not None:
            ys = [p["without"] for p in points]
            place.plot(xs, ys, "o--", color="C0", mfc="white", label=f"{metric}, without overlap")
        place.set(title=metric, xlabel="blur radius, pixels", ylabel=metric)
        handles = [h for a in dict.fromkeys((place, beside)) for h in a.get_lines()]
        place.legend(handles=handles, fontsize=7, loc="lower right")
        figure.get_layout_engine().set(wspace=0.08)
    for place in axes[0]:
        place.grid(alpha=0.3)
    return figure_png(owner, figure)


def votes_png(found: dict[str, Any], by: str) -> bytes:
    """A bar of each question, ours left and theirs right, and the paper's below it in grey."""
    plt = pyplot("eval votes")
    figure, place = plt.subplots(figsize=(8, 1.1 + 1.3 * len(found)), layout="constrained")
    labels: list[str] = []
    for counted in found.values():
        row, words = len(labels), counted["question"]
        left = 0.0
        majority = counted["majority"]
        parts = [("ours", k, v, "C0") for k, v in counted["split"]["ours"].items()]
        rest = [name for name in ("neither", "tie") if name in majority]
        parts += [(name, "", majority[name]["share"], "0.9") for name in rest]
        parts += [("theirs", k, v, "C1") for k, v in reversed(counted["split"]["theirs"].items())]
        most = max((int(k) for _, k, _, _ in parts if k), default=1)
        for name, k, share, colour in parts:
            alpha = 0.35 + 0.65 * int(k) / most if k else 1.0
            place.barh(row, share, left=left, color=colour, alpha=alpha, edgecolor="white")
            if share >= 0.06:
                votes = "1 vote" if k == "1" else f"{k} votes"
                text = f"{name}, {votes}\n{share:.0%}" if k else f"{name}\n{share:.0%}"
                place.text(left + share / 2, row, text, ha="center", va="center", fontsize=7)
            left += share
        place.plot(majority["ours"]["interval"], (row + 0.44, row + 0.44), color="black", lw=1.5)
        published, left = paper.FIGURE_7_SPLIT[words], 0.0
        tones = ("0.65", "0.75", "0.85")
        theirs = paper.FIGURE_7_MAJORITY[words][1]
        blocks = [(f"{5 - i} of 5", v, tones[i]) for i, v in enumerate(published)]
        blocks += [("", max(0.0, 100 - sum(published) - theirs), "1"), ("DF-GAN", theirs, "0.93")]
        for name, value, tone in blocks:
            place.barh(row + 1, value / 100, left=left, color=tone, edgecolor="white", height=0.5)
            if name and value >= 5:
                place.text(left + value / 200, row + 1, f"{name}\n{value:.0f}%", ha="center",
                           va="center", fontsize=6.5, color="0.3")  # fmt: skip
            left += value / 100
        labels += [words, "paper"]
    place.set_yticks(range(len(labels)), labels)
    place.set_ylim(len(labels) - 0.4, -0.6)
    place.set(xlim=(0, 1), xlabel="share of tasks", title=f"majority of votes, {by}")
    return figure_png("eval votes", figure)
