"""How long each figure takes: a guess before the work, by sizes, of a CPU with two cores.

The constants are of runs of `--quick` on such a machine (AVX-512); while a run goes on, what is
left is corrected by its own pace (`run.reproduce`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from dalle.console import duration
from dalle.reproduce.context import Context
from dalle.reproduce.quantizers import recipe_of
from dalle.reproduce.registry import FIGURES

CODES = 16_000.0  # a second, of all samples that are drawn at once
SHORT = 10  # seconds of a figure that the plan does not name


def samples(context: Context, captions: int, candidates: int) -> float:
    """Seconds of a drawing."""
    count = candidates if context.pipeline.ranker is not None else 1
    codes = context.pipeline.prior.config.num_image_tokens
    return min(captions, len(context.held_out)) * count * codes / CODES


def shared_drawing(context: Context) -> float:
    """Of Figures 7, 8, 9 and the overlap."""
    return samples(context, context.sizes.captions, context.sizes.candidates)


def exchange(context: Context) -> float:
    """Of the two processes of Figure 5, Tables 1 and 2."""
    sizes = context.sizes.exchange
    wide = float((sizes.rank_width / 128) ** 1.5)
    return 20 + 0.05 * len(sizes.ranks) * sizes.updates * wide


def binding(context: Context) -> float:
    """Of a pipeline of shapes, where one is trained for Figure 2."""
    return context.shapes_seconds


def figure_4(context: Context) -> float:
    sizes = context.sizes.scales
    return (0.1 + 0.01 * sizes.deep_updates) * sizes.deep_layers * (sizes.deep_width / 32)


def figure_6(context: Context) -> float:
    return samples(context, context.sizes.best_captions, context.sizes.best_candidates)


def figure_9(context: Context) -> float:
    sizes = context.sizes.scores
    zero = samples(context, sizes.zero, sizes.zero_candidates)
    return (zero if len(context.set.unseen) > 1 else 0) + 0.05 * sizes.bootstrap


def figure_12(context: Context) -> float:
    sizes = context.sizes.scales
    return 0.01 * sizes.updates * sizes.layers * float((sizes.width / 64) ** 1.8)


def overlap(context: Context) -> float:
    sizes = context.sizes.scores
    return 0.002 * (sizes.steps * sizes.batch + sizes.seen / 5)


def quantizers(context: Context) -> float:
    sizes = context.sizes.quantizers
    if sizes is None:
        return 0
    recipe = recipe_of(sizes)
    return 2 * len(sizes.seeds) * (0.022 * recipe.vae_steps + 0.2 * recipe.prior_steps)


OWN: Mapping[str, Callable[[Context], float]] = {
    "figure_4": figure_4,
    "figure_6": figure_6,
    "figure_9": figure_9,
    "figure_12": figure_12,
    "overlap": overlap,
    "quantizers": quantizers,
}
# Work that the first of several figures does for all of them.
SHARED: Sequence[tuple[Callable[[Context], float], tuple[str, ...]]] = (
    (binding, ("figure_2",)),
    (exchange, ("figure_5", "table_1", "table_2")),
    (shared_drawing, ("figure_7", "figure_8", "figure_9", "overlap")),
)


def expected(context: Context, todo: Sequence[str], made: Iterable[str] = ()) -> list[float]:
    """Seconds of each figure of `todo`, in this order, where those of `made` are there."""
    seconds = {key: 1 + OWN[key](context) if key in OWN else 1.0 for key in todo}
    there = set(made)
    for work, users in SHARED:
        first = next((key for key in todo if key in users), None)
        if first is not None and not there.intersection(users):
            seconds[first] += work(context)
    return [seconds[key] for key in todo]


def plan(context: Context, todo: Sequence[str], seconds: Sequence[float]) -> str:
    """A line: how many figures, how long, and which of them take most of it."""
    long = [
        f"{key} {duration(each)}"
        for key, each in zip(todo, seconds, strict=True)
        if each >= max(SHORT, sum(seconds) / 100)
    ]
    short = len(todo) - len(long)
    rest = [f"{short} short {'ones' if short > 1 else 'one'}"] if short and long else []
    of = len(FIGURES) - len(todo)
    there = f", {of} others are there or not asked for" if of else ""
    counted = f"{len(todo)} {'figures' if len(todo) > 1 else 'figure'}"
    return (
        f"--{context.sizes.name}: {counted}, about {duration(sum(seconds))} on a CPU of two cores"
        + (f": {', '.join([*long, *rest])}" if long else "")
        + there
    )
