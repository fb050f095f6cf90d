"""What words get right: the checker of `shapes` reads pictures back and compares each fact.

No detector is in between: the checker knows palette and outlines, and is exact on true pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalle.configs import integer, integers
from dalle.console import progress_shown, say
from dalle.data.augment import center_crop
from dalle.data.pairs import Pairs, evenly_spaced, load_or_skip
from dalle.data.shapes import SPLITS, Scene, split_of, split_scenes
from dalle.data.shapes_check import MIN_SIDE, ShapesReport, check_batch, read
from dalle.errors import DataError, UsageError
from dalle.evaluate.drawings import draw
from dalle.evaluate.intervals import over_seeds, wilson
from dalle.evaluate.plots import bars_png
from dalle.evaluate.results import finish, table
from dalle.evaluate.scores import Set, start
from dalle.evaluate.session import Session
from dalle.evaluate.sets import describe, is_pipeline
from dalle.evaluate.sweeps import checker_side, for_checker, scenes_of, side_of

CAPTIONS = 96  # of each split, half of them with one object
CANDIDATES = 8
CHUNK = 256  # pictures checked at once
FACTS = ("one object", "two objects", "colour", "shape", "position", "count", "background")


def facts_of(report: ShapesReport, scene: Scene) -> dict[str, bool]:
    """Which facts a picture shows, of those that its caption states.

    "one object" and "two objects" are every fact of a caption of that kind; "position" is the place
    of one object or the relation of two.
    """
    position = report.relation if scene.relation else report.place
    every = "two objects" if scene.relation else "one object"
    facts: dict[str, bool | None] = {
        every: report.all_right,
        "colour": report.colour,
        "shape": report.shape,
        "position": position,
        "count": report.count,
        "background": report.background,
    }
    return {name: value for name, value in facts.items() if value is not None}


def shares(images: np.ndarray, scenes: Sequence[Scene]) -> dict[str, tuple[int, int]]:
    """(right, stated) of each fact.

    Args:
        images: (N, S, S, 3) uint8, S at least 24.
        scenes: N.
    """
    counts = {name: [0, 0] for name in FACTS}
    reports = check_batch(for_checker(images), scenes)
    for report, scene in zip(reports, scenes, strict=True):
        for name, right in facts_of(report, scene).items():
            counts[name][0] += right
            counts[name][1] += 1
    return {name: (right, stated) for name, (right, stated) in counts.items() if stated}


def chosen_scenes(split: str, count: int) -> list[Scene]:
    """Up to `count` scenes of a split, half with one object, evenly spaced over each half."""
    scenes = split_scenes(split)
    halves = [[s for s in scenes if bool(s.relation) == two] for two in (False, True)]
    sizes = ((count + 1) // 2, count // 2)
    return [
        half[i]
        for half, size in zip(halves, sizes, strict=True)
        for i in evenly_spaced(len(half), size)
    ]


def words(
    fake: Set,
    *,
    out: Path | str | None = None,
    splits: Sequence[str] = SPLITS,
    seeds: Sequence[int] = (0, 1, 2),
    **options: Any,
) -> dict[str, Any]:
    """Which facts of a caption pictures show: objects, colour, shape, position, count.

    Args:
        fake: a pipeline trained on `shapes`, which draws captions of each split; or pictures with
            captions of `shapes`, as `dalle sample` leaves them.
        out: folder of words.json, words.md and words.png.
        splits: of train, test (unseen captions), zero (colours and shapes never seen together);
            of pictures that are there, those with captions of these splits count.
        seeds: of the drawings; the interval is over them, and for one seed over captions.
        options: of `session.Setup`; `count` captions a split (96), `num_candidates` (8).

    Returns:
        "splits": split -> fact -> "single" and "best" (of N), each with "share", "interval", "n".

    Raises:
        UsageError: an unknown split, no seed, or pictures that are too small.
        DataError: captions that are not of `shapes`.
    """
    session, folder = start("words", out, options)
    owner = session.owner
    seeds = integers(owner, "seeds", seeds, 0)
    if not seeds or len(set(seeds)) != len(seeds):
        raise UsageError(f"{owner}: seeds must be different numbers, one or more, got {seeds}")
    splits = (splits,) if isinstance(splits, str) else splits
    if not isinstance(splits, Sequence):
        raise UsageError(f"{owner}: splits must be of {', '.join(SPLITS)}, got {splits!r}")
    for split in splits:
        if split not in SPLITS:
            raise UsageError(f"{owner}: split must be one of {', '.join(SPLITS)}, got {split!r}")
    if not splits:
        raise UsageError(f"{owner}: splits must be one or more of {', '.join(SPLITS)}, got none")
    if is_pipeline(fake):
        content = _of_pipeline(session, fake, splits, seeds)
    else:
        content = _of_pictures(session, fake, splits)
    columns = list(content["columns"])
    rows = []
    for split, facts in content["splits"].items():
        for fact, kinds in facts.items():
            cells = [c for kind in columns for c in (kinds[kind]["share"], kinds[kind]["interval"])]
            rows.append([split, fact, *cells, kinds[columns[0]]["n"]])
    heads = [h for kind in columns for h in (content["columns"][kind], "95 % interval")]
    result = {
        "title": "What words get right",
        "command": owner,
        **content,
        "tables": [table(["captions", "fact", *heads, "pictures"], rows)],
    }
    if folder is None:
        return finish("words", result, None)
    groups = [
        (split, _bars(facts, content["columns"])) for split, facts in result["splits"].items()
    ]
    return finish("words", result, folder, bars_png(owner, groups))


def _bars(facts: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    return {
        f"{fact}, {name}": (kinds[kind]["share"], kinds[kind]["interval"])
        for fact, kinds in facts.items()
        for kind, name in columns.items()
    }


def _check_side(owner: str, side: int) -> None:
    if side < MIN_SIDE:
        raise UsageError(
            f"{owner}: pictures must have a side of {MIN_SIDE} or more for the checker, got {side}"
        )


def _of_pipeline(
    session: Session, fake: Any, splits: Sequence[str], seeds: Sequence[int]
) -> dict[str, Any]:
    owner, setup = session.owner, session.setup
    pipeline = session.pipeline(fake)
    _check_side(owner, pipeline.image_size)
    default = CANDIDATES if pipeline.ranker is not None else 1
    chosen = setup.draw.num_candidates
    number = default if chosen is None else integer(owner, "num_candidates", chosen, 1)
    if setup.draw.captions is not None:
        raise UsageError(
            f"{owner}: captions must be those of the splits for a pipeline, got a file; for others "
            "take `dalle sample`, and its folder as fake"
        )
    count = integer(owner, "count", CAPTIONS if setup.count is None else setup.count, 1)
    sizes = sorted({1, number})
    drawn: dict[str, Any] = {}
    found: dict[str, Any] = {}
    warnings: list[str] = []
    for split in splits:
        scenes = chosen_scenes(split, count)
        captions = [scene.caption for scene in scenes]
        runs = []
        for seed in seeds:
            made = draw(owner, pipeline, captions, sizes, seed=seed, cache=setup.cache)
            if not drawn:
                warnings = _warn_of_no_shapes(owner, made.images[:, 0])
            runs.append([shares(made.images[:, column], scenes) for column in range(len(sizes))])
            drawn = made.record
        kinds = ("single", "best")[: len(sizes)]
        found[split] = {
            fact: {
                kind: _over_seeds([run[column][fact] for run in runs])
                for column, kind in enumerate(kinds)
            }
            for fact in runs[0][0]
        }
    columns = {"single": "one sample", "best": f"best of {number}"}
    return {
        "text": f"Up to {count} captions of each split, {len(seeds)} seeds. Captions of test are "
        "unseen; those of zero hold colours and shapes that were never seen together.",
        "splits": found,
        "columns": {kind: columns[kind] for kind in ("single", "best")[: len(sizes)]},
        "seeds": list(seeds),
        "num_candidates": number,
        "drawn": {**drawn, "draw_seed": list(seeds)},
        "warnings": warnings,
        "n": {split: min(count, len(chosen_scenes(split, count))) * len(seeds) for split in splits},
    }


def _warn_of_no_shapes(owner: str, images: np.ndarray) -> list[str]:
    """A warning, said at once, where most pictures are not of `shapes`, so the table says nothing.

    Args:
        owner: begins the line.
        images: (N, S, S, 3) uint8, drawn for captions of `shapes`.
    """
    readings = read(for_checker(images[:CHUNK]))
    known = sum(any(reading.outlines.values()) for reading in readings)
    if 2 * known >= len(readings):
        return []
    line = (
        f"only {known} of {len(readings)} pictures show an outline of the set shapes; this table "
        "is for a pipeline that was trained on shapes"
    )
    say(f"{owner}: {line}")
    return [line]


def _over_seeds(counts: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Share and interval of (right, stated) of each seed."""
    right, stated = (sum(values) for values in zip(*counts, strict=True))
    if len({r / n for r, n in counts}) == 1:  # one seed, or no spread that could be measured
        interval, method = wilson(right, stated), "Wilson over pictures"
    else:
        interval = over_seeds([r / n for r, n in counts])
        method = f"Student's t over {len(counts)} seeds"
    return {"share": right / stated, "interval": interval, "n": stated, "method": method}


def _of_pictures(session: Session, fake: Set, splits: Sequence[str]) -> dict[str, Any]:
    owner = session.owner
    source = session.take("fake", fake)
    pairs: Pairs = source.pairs
    captions = list(pairs.captions)
    scenes = scenes_of(captions)
    if scenes is None:
        raise DataError(f"{owner}: captions must be of the set shapes, got others in {source.spec}")
    side = side_of(owner, "fake", pairs)
    _check_side(owner, side)
    side = checker_side(side)
    if not {split_of(scene) for scene in scenes} & set(splits):
        raise DataError(
            f"{owner}: captions must be of the splits {', '.join(splits)}, got none in "
            f"{source.spec}"
        )
    counts: dict[str, dict[str, tuple[int, int]]] = {split: {} for split in splits}
    used = 0
    with progress_shown("checker") as show:
        for start in range(0, len(pairs), CHUNK):
            part = range(start, min(start + CHUNK, len(pairs)))
            images, positions = load_or_skip(
                pairs, part, lambda image, _: center_crop(image, side), require_any=False
            )
            items = [part[position] for position in positions]
            used += len(items)
            for split in splits:
                rows = [k for k, i in enumerate(items) if split_of(scenes[i]) == split]
                if rows:
                    stack = np.stack([images[k] for k in rows])
                    for fact, both in shares(stack, [scenes[items[k]] for k in rows]).items():
                        before = counts[split].get(fact, (0, 0))
                        counts[split][fact] = (before[0] + both[0], before[1] + both[1])
            show(part.stop, len(pairs))
    found = {
        split: {fact: {"single": _over_seeds([counted[fact]])} for fact in FACTS if fact in counted}
        for split, counted in counts.items()
        if counted
    }
    return {
        "text": "Pictures as they are, by the split of their caption.",
        "splits": found,
        "columns": {"single": "as given"},
        "sets": {"fake": describe(source, used)},
        "n": {"fake": used},
    }
