"""One run: makes the figures that are missing, keeps each at once, writes page and numbers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dalle.configs import did_you_mean
from dalle.console import duration, say
from dalle.errors import DalleError, DataError, EnvironmentProblem, Interrupted, UsageError
from dalle.files import check_targets, json_sha256, make_folder, read_object, to_json
from dalle.pictures import save_bytes
from dalle.reproduce.context import OWNER, Context
from dalle.reproduce.figure import Figure
from dalle.reproduce.page import page
from dalle.reproduce.registry import FIGURES
from dalle.version import __version__

PAGE, NUMBERS = "index.html", "figures.json"


def chosen(only: Sequence[str]) -> list[str]:
    """The keys to make, in the order of the page; all of none.

    Raises:
        UsageError: a key that is no figure's.
    """
    for key in only:
        if key not in FIGURES:
            choices = ", ".join(FIGURES)
            hint = did_you_mean(key, list(FIGURES))
            raise UsageError(f"{OWNER}: only must be of {choices}, got {key!r}{hint}")
    return [key for key in FIGURES if not only or key in only]


def reproduce(context: Context, only: Sequence[str] = ()) -> dict[str, Any]:
    """Makes figures and writes `context.out`/index.html and figures.json.

    What an earlier run with the same pipeline, options and version has made is taken as it is.

    Returns:
        The content of figures.json: key -> values of `Figure`.

    Raises:
        UsageError: an unknown key in `only`.
        Interrupted: on Ctrl-C; the page has what was made.
    """
    keys = chosen(only)
    check_targets(OWNER, context.out / PAGE, context.out / NUMBERS)
    made = {key: figure for key in FIGURES if (figure := _kept(context, key)) is not None}
    try:
        for number, key in enumerate(keys, 1):
            if key in made:
                continue
            say(f"{OWNER}: {number}/{len(keys)} {key}: {FIGURES[key].title}")
            made[key] = _made(context, key)
            save_bytes(_file(context, key), to_json(made[key].to_dict()))
            _write(context, made)
    except KeyboardInterrupt as stop:
        _write(context, made)
        raise Interrupted(
            f"{OWNER}: stopped; {len(made)} of {len(FIGURES)} figures are in "
            f"{context.out / PAGE}, and the same command goes on"
        ) from stop
    return _write(context, made)


def _made(context: Context, key: str) -> Figure:
    """A figure; one that cannot be made says why."""
    begin, entry = time.monotonic(), FIGURES[key]
    try:
        figure = entry.maker()(context)
    except (DataError, UsageError, EnvironmentProblem) as problem:
        say(f"{OWNER}: {key}: {problem}")
        figure = Figure(command=context.own_command(key), missing=f"Not made: {problem}")
    seconds = round(time.monotonic() - begin, 1)
    say(f"{OWNER}: {key} took {duration(seconds)}")
    return replace(figure, key=key, title=entry.title, section=entry.section, seconds=seconds)


def _file(context: Context, key: str) -> Path:
    """Where a figure of this pipeline and these options is kept."""
    about = {
        "pipeline": context.pipeline_hash,
        "sizes": vars(context.sizes),
        "seed": context.seed,
        "options": [str(context.given_data), str(context.given_shapes), str(context.given_other)],
        "version": __version__,
    }
    folder = make_folder(context.cache / "figures" / json_sha256(about)[:16], OWNER)
    return folder / f"{key}.json"


def _kept(context: Context, key: str) -> Figure | None:
    """What an earlier run has made, with all of its pictures; None where there is none."""
    path = _file(context, key)
    if not path.is_file():
        return None
    try:
        figure = Figure.from_dict(read_object(path, DataError), str(path))
    except DalleError:
        return None
    there = all((context.out / name).is_file() for name in figure.pictures)
    return figure if there and not figure.missing.startswith("Not made") else None


def _write(context: Context, made: dict[str, Figure]) -> dict[str, Any]:
    """Page and numbers of what there is, in the order of the registry."""
    figures = [made[key] for key in FIGURES if key in made]
    values = {figure.key: figure.to_dict() for figure in figures}
    save_bytes(context.out / NUMBERS, to_json(values))
    save_bytes(context.out / PAGE, page(context, figures))
    return values
