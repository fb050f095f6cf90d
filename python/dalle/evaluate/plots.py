"""Diagrams of `dalle eval`: our curve in colour with its interval, the paper's in grey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
        place.legend(handles=handles, fontsize=7)
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
