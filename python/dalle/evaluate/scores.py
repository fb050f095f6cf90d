"""Numbers for one pair of sets, each with its interval, size, network and hashes.

`fid`, `kid`, `is_`, `prc`, `clip_score`: functions that take sets (`dalle.evaluate.sets`) and give
a dict; with `out` they also write NAME.json, NAME.md and NAME.png there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle import pictures
from dalle.configs import integer
from dalle.console import progress_shown
from dalle.data.augment import center_crop, to_tensor
from dalle.data.pairs import Pairs
from dalle.errors import DataError, UsageError
from dalle.evaluate import distances
from dalle.evaluate.cache import Features, in_parts, key_of
from dalle.evaluate.distances import Score
from dalle.evaluate.extractors import TextExtractor
from dalle.evaluate.results import as_path, few_warnings, finish, png, prepare, sheet, table
from dalle.evaluate.session import Session, make_setup
from dalle.files import write_atomic
from dalle.pipeline import Pipeline
from dalle.pretrained import tensors_to_bytes

Set = str | Path | Pairs | Pipeline
TEXTS = 256  # captions at once


def start(name: str, out: Path | str | None, options: dict[str, Any]) -> tuple[Session, Any]:
    """The session of a measure and its folder, which is made before the work."""
    owner = f"eval {name}"
    folder = None if out is None else as_path(owner, "out", out)
    session = Session(owner, make_setup(owner, options))
    prepare(owner, name, folder)
    return session, folder


def _both(session: Session, real: Set, fake: Set) -> tuple[Features, Features]:
    session.look(real, fake)
    opened = session.take("real", real)
    drawn = session.take("fake", fake, opened)
    return session.features("real", opened), session.features("fake", drawn)


def _value_table(metric: str, value: float, interval: Any, n: dict[str, int]) -> dict[str, Any]:
    rows = [[metric, value, interval["interval"], *n.values()]]
    return table(["metric", "value", "95 % interval", *(f"n {k}" for k in n)], rows)


def features(source: Set, *, out: Path | str | None = None, **options: Any) -> dict[str, Any]:
    """Features of a set, written as OUT/features.safetensors ("features", "items").

    Args:
        source: the set.
        out: folder of features.safetensors, features.json and features.png.
        options: of `session.Setup`.

    Returns:
        The record; "features" (n, d) is a tensor in it only where `out` is None.
    """
    session, folder = start("features", out, options)
    found = session.features("data", session.take("data", source), minimum=1)
    record = {
        "title": f"Features of {session.extractor.name}",
        **session.record(data=found),
        "shape": list(found.values.shape),
        "cached_parts": found.cached,
    }
    if folder is None:
        return {**finish("features", record, None), "features": found.values, "items": found.items}
    content = tensors_to_bytes({"features": found.values, "items": found.items})
    write_atomic(folder / "features.safetensors", content)
    record["tables"] = [table(["pictures", "numbers each"], [list(found.values.shape)])]
    return finish("features", record, folder, sheet({"data": found.source}))


def fid(
    real: Set, fake: Set, *, out: Path | str | None = None, infinite: bool = False, **options: Any
) -> dict[str, Any]:
    """The Fréchet distance of two sets' features; FID only for the network of that name.

    Args:
        real, fake: the sets.
        out: folder of fid.json, fid.md and fid.png.
        infinite: extrapolate to infinitely many generated pictures as well.
        options: of `session.Setup`, such as extractor, weights, count, seed.

    Returns:
        "metric" (FID, FD-ranker, ...), "value", "interval", "n", and all that defines them.

    Raises:
        DalleError: in one line, for sets or weights that do not fit.
    """
    session, folder = start("fid", out, options)
    a, b = _both(session, real, fake)
    if infinite and len(b) < distances.ROWS_TO_EXTRAPOLATE:
        raise DataError(
            f"eval fid: fake must hold {distances.ROWS_TO_EXTRAPOLATE} or more pictures for "
            f"infinite, got {len(b)}"
        )
    x, y = a.values.double(), b.values.double()
    value = distances.frechet_distance(x, y)
    interval = session.interval(distances.frechet_distance, [x, y], value, 0.0)
    metric, record = session.extractor.distance, session.record(real=a, fake=b)
    result = {
        "title": f"{metric}: {value:.4g}",
        "metric": metric,
        "value": value,
        **interval,
        **record,
        "warnings": few_warnings(metric, record["n"]) + session.own_judge(b),
        "tables": [_value_table(metric, value, interval, record["n"])],
    }
    if infinite:
        line = distances.frechet_distance_infinite(x, y, seed=session.seed)
        result["infinite"] = line._asdict()
        result["tables"].append(
            table([f"{metric}, n to infinity"], [[line.value]], "Chong and Forsyth 2020")
        )
    return finish("fid", result, folder, _examples(folder, a, b))


def kid(
    real: Set,
    fake: Set,
    *,
    out: Path | str | None = None,
    subsets: int = distances.SUBSETS,
    subset_size: int = distances.SUBSET_SIZE,
    **options: Any,
) -> dict[str, Any]:
    """The kernel distance of two sets' features (KID for the network of FID).

    Args:
        real, fake, out, options: as of `fid`.
        subsets, subset_size: see `distances.kernel_distance`.
    """
    session, folder = start("kid", out, options)
    subsets = integer(session.owner, "subsets", subsets, 1, 10_000)
    subset_size = integer(session.owner, "subset_size", subset_size, 2)
    a, b = _both(session, real, fake)
    x, y = a.values.double(), b.values.double()
    numbers = {"subsets": subsets, "subset_size": subset_size, "seed": session.seed % 2**32}
    value = distances.kernel_distance(x, y, **numbers)

    def statistic(p: Tensor, q: Tensor) -> float:
        return distances.kernel_distance(p, q, **{**numbers, "subsets": min(subsets, 10)})

    interval = session.interval(statistic, [x, y], value)
    metric, record = session.extractor.kernel, session.record(real=a, fake=b)
    result = {
        "title": f"{metric}: {value:.4g}",
        "metric": metric,
        "value": float(value),
        "std": value.std,
        "subsets": subsets,
        "subset_size": subset_size,
        **interval,
        **record,
        "warnings": few_warnings(metric, record["n"], biased=False) + session.own_judge(b),
        "tables": [_value_table(metric, float(value), interval, record["n"])],
    }
    return finish("kid", result, folder, _examples(folder, a, b))


def class_probabilities(session: Session, found: Features, captions: list[str]) -> Tensor:
    """The class distributions of a set's pictures: (n, classes) float64."""
    return session.extractor.probabilities(found.values, captions)


def is_(
    fake: Set,
    *,
    real: Set | None = None,
    out: Path | str | None = None,
    splits: int = 10,
    **options: Any,
) -> dict[str, Any]:
    """The Inception Score; of networks without classes, a score over captions (IS-ranker).

    Args:
        fake: the set.
        real: a set whose captions are the classes where the network has none; `fake` if left out.
        out: folder of is.json, is.md and is.png.
        splits: see `distances.inception_score`; fewer for fewer pictures.
        options: of `session.Setup`.
    """
    session, folder = start("is", out, options)
    splits = integer(session.owner, "splits", splits, 1)
    session.look(real, fake)
    opened = None if real is None else session.take("real", real)
    source = session.take("fake", fake, opened)
    of_classes = (opened or source).pairs.captions
    if isinstance(session.extractor, TextExtractor) and not any(of_classes):
        raise DataError(
            f"{session.owner}: captions must be there to stand for classes, got none in "
            f"{(opened or source).spec}"
        )
    found = session.features("fake", source)
    p = class_probabilities(session, found, list(of_classes))
    value = inception_of(p, splits)
    interval = session.interval(lambda q: float(inception_of(q, splits)), [p], float(value), 1.0)
    metric, record = session.extractor.score, session.record(fake=found)
    result = {
        "title": f"{metric}: {float(value):.4g}",
        "metric": metric,
        "value": float(value),
        "std": value.std,
        "splits": min(splits, len(p)),
        "classes": {"what": session.extractor.classes, "count": p.shape[1]},
        **interval,
        **record,
        "warnings": few_warnings(metric, record["n"]) + session.own_judge(found),
        "tables": [_value_table(metric, float(value), interval, record["n"])],
    }
    picture = None if folder is None else sheet({"fake": found.source})
    return finish("is", result, folder, picture)


def inception_of(p: Tensor, splits: int) -> Score:
    """`distances.inception_score` of at least 2 rows a split, so that few pictures do as well."""
    return distances.inception_score(p, max(1, min(splits, len(p) // 2)))


def prc(
    real: Set, fake: Set, *, out: Path | str | None = None, k: int = 3, **options: Any
) -> dict[str, Any]:
    """Precision and recall of generated features against real ones.

    Args:
        real, fake, out, options: as of `fid`.
        k: neighbours, see `distances.precision_recall`.
    """
    session, folder = start("prc", out, options)
    k = integer(session.owner, "k", k, 1)
    a, b = _both(session, real, fake)
    for name, features in (("real", a), ("fake", b)):
        if len(features) <= k:
            raise DataError(
                f"eval prc: {name} must hold more than k = {k} pictures, got {len(features)}"
            )
    x, y = a.values.double(), b.values.double()
    with progress_shown("neighbours") as show:
        found = distances.both_inside(x, y, k, show)
    inside_real, inside_fake = (rows.double()[:, None] for rows in found)
    both = distances.PrecisionRecall(float(inside_real.mean()), float(inside_fake.mean()))
    record = session.record(real=a, fake=b)
    # Rows drawn twice would be each other's neighbours: only the shares are drawn again.
    intervals = {
        name: session.interval(lambda s: float(s.mean()), [shares], value)
        for name, shares, value in (
            ("precision", inside_real, both.precision),
            ("recall", inside_fake, both.recall),
        )
    }
    rows = [[name, getattr(both, name), intervals[name]["interval"]] for name in intervals]
    result = {
        "title": f"Precision {both.precision:.3f}, recall {both.recall:.3f}",
        "metric": "precision and recall",
        **both._asdict(),
        "k": k,
        "intervals": intervals,
        **record,
        "warnings": few_warnings("precision and recall", record["n"]) + session.own_judge(b),
        "tables": [table(["metric", "value", "95 % interval"], rows)],
    }
    return finish("prc", result, folder, _examples(folder, a, b))


def _examples(folder: Path | None, a: Features, b: Features) -> bytes | None:
    return None if folder is None else sheet({"real": a.source, "fake": b.source})


def clip_score(
    fake: Set, *, real: Set | None = None, out: Path | str | None = None, **options: Any
) -> dict[str, Any]:
    """How well pictures fit their captions: the mean of 100 max(cosine, 0).

    It is the CLIP score for the extractor clip, and the ranker's score for ranker. A pipeline is
    best judged by another network than the one that chose its samples.

    Args:
        fake: pictures with captions.
        real: whose captions a pipeline draws.
        out: folder of clip-score.json, .md and .png (the pictures that fit least and best).
        options: of `session.Setup`.

    Raises:
        UsageError: an extractor without captions.
        DataError: pictures without captions.
    """
    session, folder = start("clip-score", out, options)
    session.look(real, fake)
    opened = None if real is None else session.take("real", real)
    source = session.take("fake", fake, opened)
    network = session.extractor
    if not isinstance(network, TextExtractor):
        raise UsageError(f"eval clip-score: extractor must be ranker or clip, got {network.name}")
    found = session.features("fake", source, minimum=1)
    captions = [source.pairs.captions[i] for i in found.items.tolist()]
    missing = sum(not caption for caption in captions)
    if missing:
        raise DataError(
            f"eval clip-score: every picture must have a caption, got {missing} of "
            f"{len(captions)} without"
        )
    unique = sorted(set(captions))
    text = _text_features(session, network, unique)[_rows(captions, unique)]
    cosines = (text.double() * found.values.double()).sum(1)
    fits = 100 * cosines.clamp_min(0)
    value = float(fits.mean())
    interval = session.interval(lambda s: float(s.mean()), [fits[:, None]], value)
    metric = "CLIP score" if network.name == "clip" else f"{network.name} score"
    record = session.record(fake=found)
    result = {
        "title": f"{metric}: {value:.4g}",
        "metric": metric,
        "value": value,
        "mean_cosine": float(cosines.mean()),
        **interval,
        **record,
        "warnings": few_warnings(metric, record["n"], biased=False) + session.own_judge(found),
        "tables": [_value_table(metric, value, interval, record["n"])],
    }
    picture = None if folder is None else _ends(source.pairs, found, fits.numpy())
    return finish("clip-score", result, folder, picture)


def _text_features(session: Session, network: TextExtractor, captions: list[str]) -> Tensor:
    """Features of captions, from the cache where they are there: (n, d) float32."""

    def compute(items: Sequence[int], done: Callable[[int], None]) -> dict[str, Tensor]:
        parts = []
        for start in range(0, len(items), TEXTS):
            some = items[start : start + TEXTS]
            parts.append(network.text_features([captions[i] for i in some]))
            done(start + len(some))
        return {"features": torch.cat(parts)}

    def whole(read: dict[str, Tensor], count: int) -> bool:
        return "features" in read and read["features"].shape == (count, network.dimensions)

    of = {"kind": "texts", "extractor": [network.name, network.fingerprint], "captions": captions}
    parts, _ = in_parts(
        session.owner,
        Path(session.setup.cache) / "texts" / key_of(of),
        len(captions),
        16 * TEXTS,
        compute,
        name=f"{network.name} features of captions",
        check=whole,
    )
    return torch.cat([part["features"] for part in parts])


def _rows(captions: list[str], unique: list[str]) -> Tensor:
    """Where each caption stands in `unique`: (n,) int64."""
    places = {caption: i for i, caption in enumerate(unique)}
    rows = np.array([places[caption] for caption in captions], np.int64)
    return torch.from_numpy(rows)


def _ends(pairs: Pairs, found: Features, values: np.ndarray, side: int = 96) -> bytes:
    """A sheet with the eight pictures that fit best and the eight that fit least."""
    order = np.argsort(-values, kind="stable")
    chosen = order if len(order) <= 16 else np.concatenate([order[:8], order[-8:]])
    items = [int(found.items[i]) for i in chosen]
    tiles = to_tensor([center_crop(pairs.load(i), side) for i in items])
    labels = [f"{values[r]:.1f} {pairs.captions[i]}" for r, i in zip(chosen, items, strict=True)]
    return png(pictures.grid(tiles, columns=8, labels=labels))
