"""One run: makes the figures that are missing, keeps each at once, writes page and numbers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dalle.configs import did_you_mean
from dalle.console import duration, say
from dalle.errors import DalleError, DataError, Interrupted, UsageError
from dalle.files import check_targets, json_sha256, make_folder, read_object, sha256, to_json
from dalle.memory import is_refusal, refusal_line
from dalle.pictures import save_bytes
from dalle.reproduce.context import OWNER, Context
from dalle.reproduce.figure import Figure
from dalle.reproduce.pace import expected, plan
from dalle.reproduce.page import page
from dalle.reproduce.registry import FIGURES
from dalle.version import __version__

PAGE, NUMBERS = "index.html", "figures.json"
NOT_MADE = "Not made:"  # begins why a figure could not be made


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
    begin = time.monotonic()
    check_targets(OWNER, context.out / PAGE, context.out / NUMBERS)
    made = {key: figure for key in FIGURES if (figure := _kept(context, key)) is not None}
    try:
        todo = [key for key in keys if key not in made]
        seconds = expected(context, todo, made)
        if todo:
            say(f"{OWNER}: {plan(context, todo, seconds)}")
        for number, key in enumerate(todo, 1):
            left = duration(_left(seconds, number - 1, time.monotonic() - begin))
            say(
                f"{OWNER}: {number}/{len(todo)} {key}: {FIGURES[key].title} "
                f"(about {left} to the end)"
            )
            made[key] = _made(context, key)
            _keep(context, key, made[key])
            _write(context, made)
    except (KeyboardInterrupt, Interrupted) as stop:  # the latter out of a training made here
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
    except Interrupted:
        raise
    except Exception as problem:
        if is_refusal(problem):
            line = f"out of memory: {refusal_line(problem)}"
        elif isinstance(problem, DalleError):
            line = str(problem)
        else:
            raise
        say(f"{OWNER}: {key}: {line}")
        figure = Figure(command=context.own_command(key), missing=f"{NOT_MADE} {line}")
    seconds = round(time.monotonic() - begin, 1)
    say(f"{OWNER}: {key} took {duration(seconds)}")
    return replace(figure, key=key, title=entry.title, section=entry.section, seconds=seconds)


def _later(context: Context, key: str) -> Figure:
    """Stands where a figure was not asked for, or not reached."""
    entry = FIGURES[key]
    return Figure(
        key=key,
        title=entry.title,
        section=entry.section,
        command=context.own_command(key),
        missing="Not made yet.",
    )


def _left(expected: Sequence[float], done: int, seconds: float) -> float:
    """A guess of the seconds to the end: what is expected of the rest, at the pace so far."""
    before = sum(expected[:done])
    return sum(expected[done:]) * (seconds / before if before >= 5 else 1.0)


def _file(context: Context, key: str) -> Path:
    """Where a figure of this pipeline and these options is kept."""
    about = {
        "pipeline": context.pipeline_hash,
        "sizes": asdict(context.sizes),
        "seed": context.seed,
        "options": [str(context.given_data), str(context.given_shapes), str(context.given_other)],
        "version": __version__,
    }
    folder = make_folder(context.cache / "figures" / json_sha256(about)[:16], OWNER)
    return folder / f"{key}.json"


def _keep(context: Context, key: str, figure: Figure) -> None:
    """Keeps a figure, and by which bytes its pictures are known: another run into the same folder
    has pictures of the same names."""
    pictures = {name: sha256(context.out / name) for name in figure.pictures}
    kept = {"figure": figure.to_dict(), "pictures": pictures}
    save_bytes(_file(context, key), to_json(kept))


def _kept(context: Context, key: str) -> Figure | None:
    """What an earlier run has made, with all of its pictures; None where there is none."""
    path = _file(context, key)
    if not path.is_file():
        return None
    try:
        kept = read_object(path, DataError)
        figure = Figure.from_dict(kept.get("figure"), str(path))
        hashes = kept.get("pictures")
        if not isinstance(hashes, dict) or figure.missing.startswith(NOT_MADE):
            return None
        whole = all(sha256(context.out / n) == hashes.get(n) for n in figure.pictures)
    except (DalleError, OSError):
        return None
    return figure if whole else None


def _write(context: Context, made: dict[str, Figure]) -> dict[str, Any]:
    """Page and numbers in the order of the registry; what was not made yet says so."""
    figures = [made.get(key) or _later(context, key) for key in FIGURES]
    values = {figure.key: figure.to_dict() for figure in figures}
    save_bytes(context.out / NUMBERS, to_json(values))
    save_bytes(context.out / PAGE, page(context, figures))
    return values
