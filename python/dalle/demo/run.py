"""`dalle train` and `dalle demo`: the stages one after another, their clock, and the page."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dalle.console import duration, say
from dalle.demo.config import DemoConfig
from dalle.demo.context import Demo
from dalle.demo.pace import Pace, measure, with_pace
from dalle.demo.plots import draw_plots
from dalle.demo.report import in_words, write_report
from dalle.demo.score import samples_stage
from dalle.demo.sets import DataSet, EmojiSet, ShapesSet
from dalle.demo.stages import data_stage, dvae_stage, prior_stage, ranker_stage, tokenizer_stage
from dalle.demo.workspace import STAGES, Workspace
from dalle.devices import pick_device
from dalle.errors import EnvironmentProblem, Interrupted
from dalle.files import check_targets
from dalle.recipes import DemoRecipe, load_recipe, scale_to
from dalle.train.lock import locked_folder
from dalle.train.parts import threads_for_parts

STAGE_FUNCTIONS: dict[str, Callable[[Demo], None]] = {
    "data": data_stage,
    "tokenizer": tokenizer_stage,
    "dvae": dvae_stage,
    "ranker": ranker_stage,
    "prior": prior_stage,
    "samples": samples_stage,
}


def check_extras(command: str, packages: Sequence[str]) -> None:
    """Fails before any work where a package is missing.

    Raises:
        EnvironmentProblem: naming the extra.
    """
    missing = [name for name in ("matplotlib", *packages) if find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(
            f"{command}: packages of the extra demo must be installed, got no "
            f"{', '.join(missing)}; type: pip install 'dalle-ext[demo]'"
        )


@contextmanager
def timed(space: Workspace, stage: str) -> Iterator[None]:
    """Adds the time inside to the stage's, also when it is interrupted."""
    wall, cpu, done = time.monotonic(), time.process_time(), False
    try:
        yield
        done = True
    finally:
        space.add_time(stage, time.monotonic() - wall, time.process_time() - cpu, done=done)


def measured(demo: Demo) -> dict[str, Pace]:
    """Result of `pace.measure` at the start of the run; a resumed one keeps it."""
    space, recipe = demo.space, demo.recipe
    path = space.work / "pace.json"
    saved: Mapping[str, Any] = space.read(path)
    if not saved:
        say(f"{space.command}: measuring the pace of this machine")
        drawn = len(demo.data.captions(recipe.num_captions).captions) * recipe.num_samples
        pace = measure(recipe, demo.data.train, demo.device, drawn, demo.data.vae)
        # Read back as a resumed run reads it, whose numbers of updates must be the same.
        saved = {stage: [round(x, 5) for x in p] for stage, p in pace.items()}
        space.write(path, saved)
    return {stage: Pace(*numbers) for stage, numbers in saved.items()}


def seconds_left(space: Workspace, recipe: DemoRecipe, stage: str) -> float:
    """Guess of the seconds from the start of a stage to the end.

    The pace of each stage was measured before the first; how much slower the machine has become
    since then is read from the latest stage that took five seconds or more.
    """
    predicted, timings = recipe.seconds, space.timings()
    pace = 1.0
    for earlier in STAGES[: STAGES.index(stage)]:
        if predicted.get(earlier, 0) >= 5 and timings.get(earlier, {}).get("seconds"):
            pace = timings[earlier]["seconds"] / predicted[earlier]
    left = sum(
        predicted.get(s, 0.0)
        for s in STAGES[STAGES.index(stage) :]
        if not timings.get(s, {}).get("done")
    )
    begun = timings.get(stage, {}).get("seconds", 0.0)
    return max(1.0, left * max(pace, 0.1) - begun)


def run_stages(demo: Demo) -> dict[str, Any]:
    """Runs the stages, or goes on with them, and returns what summary.json holds.

    Raises:
        Interrupted: stopped by Ctrl-C or SIGTERM, after a report of what there is was written.
    """
    space, recipe = demo.space, demo.recipe
    for number, stage in enumerate(STAGES[:-1], 1):
        left = duration(seconds_left(space, recipe, stage))
        say(f"{space.command}: stage {number} of {len(STAGES)}: {stage} (about {left} to the end)")
        try:
            with threads_for_parts(), timed(space, stage):
                STAGE_FUNCTIONS[stage](demo)
        except (KeyboardInterrupt, Interrupted) as stop:
            draw_plots(space)
            write_report(demo, complete=False)
            raise Interrupted(
                f"{space.command}: stopped in stage {stage}; what there is: "
                f"{space.out / 'index.html'}; the same command goes on"
            ) from stop
    say(f"{space.command}: stage {len(STAGES)} of {len(STAGES)}: report")
    with timed(space, "report"):
        draw_plots(space)
    return write_report(demo, complete=True)


def built_in(name: str, recipe: DemoRecipe, seed: int) -> DataSet:
    """The emoji or the shapes, at a recipe's sizes."""
    if name == "emoji":
        return EmojiSet(recipe.image_size)
    return ShapesSet(recipe.image_size, seed, recipe.items, recipe.unseen_items)


def run_demo(config: DemoConfig, *, least: float | None = None) -> dict[str, Any]:
    """Runs the demo, or goes on with it, and returns what summary.json holds.

    Args:
        config: the options.
        least: share of the recipe's updates that is made where `config.minutes` are too few for it
            on this machine; None refuses such minutes.

    Raises:
        Interrupted: stopped by Ctrl-C or SIGTERM, after a report of what there is was written.
        EnvironmentProblem: a package is missing or the folder cannot be written.
        UsageError: the folder holds a demo of other options, or another process works in it.
    """
    recipe = load_recipe(config.data, config.preset)
    data = built_in(config.data, recipe, config.seed)
    check_extras("demo", data.packages)
    device = pick_device(config.device)
    options = {"data": config.data, "minutes": config.minutes, "preset": config.preset}
    space = Workspace("demo", config.out, options, config.seed)
    check_targets("demo", *space.targets())
    with locked_folder(space.work, "demo"):
        space.claim()
        demo = Demo(space, recipe, data, device)
        if config.preset != "smoke" or config.minutes is not None:
            with threads_for_parts():
                demo.recipe = with_pace(recipe, measured(demo))
        if config.minutes is not None:
            demo.recipe = scale_to(demo.recipe, config.minutes, least=least)
        return run_stages(demo)


def closing_lines(out: Path, command: str, summary: dict[str, Any]) -> str:
    """What the command prints last: key numbers, the verdict, the page, what to type next."""
    model = shlex.quote(str(out / "pipeline"))
    lines = [
        *(in_words(summary, key) for key in (*summary["headline"], "seconds")),
        *summary["verdict"],
        f"look at {out / 'index.html'}",
        f'now: dalle sample "A CAPTION" --model {model}',
    ]
    return "\n".join(f"{command}: {line}" for line in lines)
