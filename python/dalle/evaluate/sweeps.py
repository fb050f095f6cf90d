"""Curves of Figure 9: a distance and a score against blur (a, b), and against candidates (c)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dalle.configs import integer, integers
from dalle.console import say
from dalle.data.augment import center_crop
from dalle.data.pairs import Pairs, load_or_skip
from dalle.data.shapes import Scene, parse
from dalle.data.shapes_check import MIN_SIDE, check_batch
from dalle.errors import DataError, UsageError
from dalle.evaluate import distances, paper
from dalle.evaluate.cache import Features
from dalle.evaluate.drawings import Drawn, captions_to_draw, draw, mean_score
from dalle.evaluate.extractors import TextExtractor
from dalle.evaluate.intervals import wilson
from dalle.evaluate.plots import curves_png
from dalle.evaluate.results import few_warnings, finish, table
from dalle.evaluate.scores import Set, inception_of, start
from dalle.evaluate.session import OWN_JUDGE, Session
from dalle.evaluate.sets import Source, is_pipeline
from dalle.pipeline import Pipeline
from dalle.pretrained import fingerprint

DRAWN = 512  # candidates of a caption in the paper
SPLITS = 10  # of the Inception Score
LARGEST_RADIUS = 10_000.0
PUBLISHED = {  # set -> part of Figure 9, FID and IS there
    "MS-COCO": ("a", paper.FIGURE_9A_FID, paper.FIGURE_9A_IS),
    "CUB": ("b", paper.FIGURE_9B_FID, paper.FIGURE_9B_IS),
}


def checked_radii(owner: str, radii: Sequence[float]) -> list[float]:
    """Radii as floats.

    Raises:
        UsageError: none, or one that is negative, not finite or absurd.
    """
    radii = radii.tolist() if isinstance(radii, (np.ndarray, torch.Tensor)) else radii
    if isinstance(radii, str) or not isinstance(radii, Sequence) or not len(radii):
        raise UsageError(f"{owner}: radii must be one number or more, got {radii!r}")
    values = []
    for radius in radii:
        number = isinstance(radius, (int, float, np.integer, np.floating))
        fits = number and not isinstance(radius, bool) and 0 <= radius <= LARGEST_RADIUS
        if not fits:
            raise UsageError(
                f"{owner}: radius must be 0 or more and at most {LARGEST_RADIUS:.0f}, "
                f"got {f'{radius:g}' if number else repr(radius)}"
            )
        values.append(float(radius))
    return values


def side_of(owner: str, name: str, pairs: Pairs) -> int:
    """The shorter side of the first picture of a set that decodes.

    Raises:
        DataError: none does.
    """
    images, _ = load_or_skip(pairs, range(len(pairs)), require_any=False, limit=1)
    if not images:
        raise DataError(f"{owner}: {name} must hold pictures that can be used, got none")
    return int(min(images[0].shape[:2]))


def _point(session: Session, a: Features, b: Features, classes: list[str]) -> dict[str, Any]:
    """Distance and score of one pair of sets, with intervals."""
    x, y = a.values.double(), b.values.double()
    value = distances.frechet_distance(x, y)
    found = session.interval(distances.frechet_distance, [x, y], value, 0.0)
    point: dict[str, Any] = {
        "distance": value,
        "distance_interval": found["interval"],
        "score": None,
        "score_interval": None,
    }
    if classes or not isinstance(session.extractor, TextExtractor):
        p = session.extractor.probabilities(b.values, classes)
        score = inception_of(p, SPLITS)
        found = session.interval(lambda q: float(inception_of(q, SPLITS)), [p], float(score), 1.0)
        point |= {
            "score": float(score),
            "score_std": score.std,
            "score_interval": found["interval"],
        }
    return point


def _classes(opened: Source, drawn: Sequence[str]) -> tuple[list[str], list[str]]:
    """Captions that stand for classes, and a warning where there are none."""
    captions = [c for c in opened.pairs.captions if c] or [c for c in drawn if c]
    return captions, [] if captions else ["no score: no set has captions that stand for classes"]


def blur(
    real: Set,
    fake: Set,
    *,
    out: Path | str | None = None,
    radii: Sequence[float] = paper.RADII,
    side: int | None = None,
    beside: str = "MS-COCO",
    **options: Any,
) -> dict[str, Any]:
    """Distance and score after a Gaussian blur of both sets (Figure 9 a, b).

    Args:
        real, fake: the sets (`dalle.evaluate.sets`).
        out: folder of blur.json, blur.md and blur.png.
        radii: standard deviations of the blur in pixels of pictures of `side` pixels.
        side: pictures are cut to a centred square of that side first; the generated pictures' own
            if left out. The paper's are of 256.
        beside: whose curves of the paper stand beside ours: "MS-COCO" (a) or "CUB" (b).
        options: of `session.Setup`.

    Returns:
        "points", one a radius: "radius", "distance", "score" and their intervals; "paper".

    Raises:
        UsageError: a negative radius, another set beside.
    """
    if beside not in PUBLISHED:
        choices = ", ".join(PUBLISHED)
        raise UsageError(f"eval blur: beside must be one of {choices}, got {beside!r}")
    part, published_fid, published_is = PUBLISHED[beside]
    radii = checked_radii("eval blur", radii)
    side = None if side is None else integer("eval blur", "side", side, 1, 2**14)
    session, folder = start("blur", out, options)
    session.look(real, fake)
    opened = session.take("real", real)
    drawn = session.take("fake", fake, opened)
    side = side or side_of("eval blur", "fake", drawn.pairs)
    classes, warnings = _classes(opened, drawn.pairs.captions)
    points, last = [], {}
    for number, radius in enumerate(radii):
        sets = {
            name: session.features(f"{name} at radius {radius:g}", s, side=side, radius=radius)
            for name, s in (("real", opened), ("fake", drawn))
        }
        points.append({"radius": radius, **_point(session, sets["real"], sets["fake"], classes)})
        last = sets
        say(f"eval blur: {number + 1}/{len(radii)} radius {radius:g}: {points[-1]['distance']:.4g}")
    network, record = session.extractor, session.record(**last)
    metrics = {"distance": network.distance, "score": network.score}
    result = {
        "title": f"Blur of both sets: {network.distance} and {network.score}",
        "text": f"A Gaussian blur of pictures of {side} pixels on both sides before the features. "
        f"Grey: the paper's Figure 9 {part}, of {beside} at 256 pixels.",
        "metrics": metrics,
        "points": points,
        "side": side,
        "classes": network.classes,
        "paper": {"radius": list(paper.RADII), "fid": _lists(paper.FIGURE_9A_FID),
                  "fid_dashed": _lists(paper.FIGURE_9A_FID_DASHED),
                  "is": _lists(paper.FIGURE_9A_IS), "cub_fid": _lists(paper.FIGURE_9B_FID),
                  "cub_is": _lists(paper.FIGURE_9B_IS)},
        **record,
        "warnings": few_warnings(network.distance, record["n"])
        + warnings
        + session.own_judge(last["fake"]),
        "tables": [_table("radius", metrics, points, _of_paper(paper.RADII, {
            "paper's FID": published_fid["DALL-E"], "paper's IS": published_is["DALL-E"]}))],
    }  # fmt: skip
    if folder is None:
        return finish("blur", result, None)
    greys = {"distance": published_fid, "score": published_is}
    picture = curves_png(
        "eval blur", points, "radius", "radius of the blur in pixels", metrics, paper.RADII, greys
    )
    return finish("blur", result, folder, picture)


def _lists(curves: paper.Curves) -> dict[str, list[float]]:
    return {name: list(values) for name, values in curves.items()}


def _of_paper(
    places: Sequence[float], columns: dict[str, Sequence[float]]
) -> dict[str, dict[float, float]]:
    return {
        name: dict(zip(map(float, places), values, strict=True)) for name, values in columns.items()
    }


def _table(
    axis: str,
    metrics: dict[str, str],
    points: list[dict[str, Any]],
    beside: dict[str, dict[float, float]],
    more: Sequence[str] = (),
) -> dict[str, Any]:
    columns = [axis, metrics["distance"], "95 % interval", metrics["score"], "95 % interval"]
    rows = [
        [
            point[axis],
            point["distance"],
            point["distance_interval"],
            point["score"],
            point["score_interval"],
            *(point.get(name) for name in more),
            *(values.get(float(point[axis])) for values in beside.values()),
        ]
        for point in points
    ]
    return table([*columns, *(name.replace("_", " ") for name in more), *beside], rows)


def powers(drawn: int) -> list[int]:
    """1, 2, 4, ... up to `drawn`, which is the last."""
    sizes = [2**i for i in range(drawn.bit_length()) if 2**i <= drawn]
    return sizes if sizes[-1] == drawn else [*sizes, drawn]


def scenes_of(captions: Sequence[str]) -> list[Scene] | None:
    """The scenes of captions of the set `shapes`; None where one is no such caption."""
    try:
        return [parse(caption) for caption in captions]
    except UsageError:
        return None


def checker_side(side: int) -> int:
    """The side at which the checker reads a picture of `side` pixels: at most 256.

    It sees 32 x 32 areas. Of larger sides than it needs, and of those that 32 divides badly, it
    would take many times the memory.
    """
    return side // 8 * 8 if side < 96 else min(side // 32 * 32, 256)


def for_checker(images: np.ndarray) -> np.ndarray:
    """(N, S, S, 3) uint8 at `checker_side`."""
    side = checker_side(images.shape[1])
    if side == images.shape[1]:
        return images
    return np.stack([center_crop(image, side) for image in images])


def rerank(
    real: Set,
    fake: Set,
    *,
    out: Path | str | None = None,
    candidates: Sequence[int] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Distance, score and share right for the best of 1, 2, 4, ... 512 candidates (Figure 9 c).

    All are of one drawing: the best of n is chosen among the first n candidates.

    Args:
        real: the set whose pictures are compared with.
        fake: a pipeline with a ranker, which draws the captions of the real set, or of a file.
        out: folder of rerank.json, rerank.md and rerank.png.
        candidates: numbers to choose from; 1, 2, 4, ... if left out.
        options: of `session.Setup`; `num_candidates` is how many are drawn, 512 if left out.

    Returns:
        "points", one a number of candidates: "candidates", "distance", "score", "checker_share"
        (where captions are of the set shapes), "ranker_score", and intervals.

    Raises:
        UsageError: more candidates than are drawn, or no pipeline.
    """
    session, folder = start("rerank", out, options)
    owner, setup = session.owner, session.setup
    count = setup.draw.num_candidates
    count = DRAWN if count is None else integer(owner, "num_candidates", count, 1)
    sizes = powers(count)
    if candidates is not None:
        sizes = sorted(set(integers(owner, "candidates", candidates, 1)))
    if sizes and max(sizes) > count:
        raise UsageError(
            f"{owner}: candidates must be at most the {count} that are drawn, got {max(sizes)}"
        )
    if not is_pipeline(fake):
        raise UsageError(f"{owner}: fake must be the folder of a pipeline, got {fake}")
    session.look(real, fake)
    opened = session.take("real", real)
    captions = captions_to_draw(owner, setup.draw.captions, opened.pairs, setup.count)
    if len(captions) < 2:
        raise DataError(f"{owner}: captions must be 2 or more, got {len(captions)}")
    pipeline = session.pipeline(fake)
    truth = session.features("real", opened)  # also: weights that do not fit, before the drawing
    made = draw(
        owner, pipeline, captions, sizes, drawn=count, seed=setup.draw.draw_seed, cache=setup.cache
    )
    classes, warnings = _classes(opened, captions)
    points, found = [], truth
    for column, size in enumerate(made.sizes):
        spec = f"best of {size} of {count}"
        found = session.features(spec, Source(spec, "pipeline", made.set_of(size), {}))
        point = {"candidates": size, **_point(session, truth, found, classes)}
        point["ranker_score"] = mean_score(made.scores[:, column])
        points.append(point | _share_right(made, column))
        say(f"eval rerank: best of {size}: {point['distance']:.4g}")
    if not any("checker_share" in point for point in points):
        warnings.append("no checker share: the captions are not of the set shapes at 24 pixels up")
    if _same_network(session, pipeline):
        warnings.append(OWN_JUDGE)
    network, record = session.extractor, session.record(real=truth, fake=found)
    metrics = {"distance": network.distance, "score": network.score}
    more = [name for name in ("checker_share", "ranker_score") if name in points[0]]
    greys = {
        "distance": {"DALL-E": paper.FIGURE_9C_FID},
        "score": {"DALL-E": paper.FIGURE_9C_IS},
    }
    result = {
        "title": f"Best of 1 to {max(made.sizes)}: {network.distance} and {network.score}",
        "text": f"{len(captions)} captions, {count} candidates of each in one drawing; the best of "
        "n by the pipeline's ranker is among the first n. Grey: the paper's Figure 9 c.",
        "metrics": metrics,
        "points": points,
        "drawn": made.record,
        "paper": {"candidates": list(paper.CANDIDATES), "fid": list(paper.FIGURE_9C_FID),
                  "is": list(paper.FIGURE_9C_IS)},
        **record,
        "warnings": few_warnings(network.distance, record["n"]) + warnings,
        "tables": [_table("candidates", metrics, points, _of_paper(paper.CANDIDATES, {
            "paper's FID": paper.FIGURE_9C_FID, "paper's IS": paper.FIGURE_9C_IS}), more)],
    }  # fmt: skip
    if folder is None:
        return finish("rerank", result, None)
    picture = curves_png(
        owner, points, "candidates", "samples to choose from", metrics, paper.CANDIDATES, greys
    )
    return finish("rerank", result, folder, picture)


def _share_right(made: Drawn, column: int) -> dict[str, Any]:
    """The share of pictures that show every fact of their caption; {} where that is not known."""
    scenes = scenes_of(made.captions)
    if scenes is None or made.images.shape[2] < MIN_SIDE:
        return {}
    images = for_checker(made.images[:, column])
    right = sum(report.all_right for report in check_batch(images, scenes))
    share = right / len(scenes)
    return {"checker_share": share, "checker_interval": wilson(right, len(scenes))}


def _same_network(session: Session, pipeline: Pipeline) -> bool:
    ranker = pipeline.ranker
    if not isinstance(ranker, torch.nn.Module):
        return False
    return session.extractor.fingerprint == fingerprint(ranker)
