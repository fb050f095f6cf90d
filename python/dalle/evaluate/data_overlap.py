"""Overlap with the training pictures (paper 3.2): copies are found, and left out of a distance.

For each real picture the nearest of the pictures that a model has seen is found by a detector of
copies. Sorted by closeness they stand on a contact sheet, from which a threshold is chosen by eye.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle import pictures
from dalle.configs import integer
from dalle.console import printable
from dalle.data.augment import to_tensor
from dalle.data.pairs import Pairs
from dalle.errors import CheckpointError, DataError, UsageError
from dalle.evaluate import detector as copies
from dalle.evaluate import distances
from dalle.evaluate.cache import Features, extract
from dalle.evaluate.plots import overlap_png
from dalle.evaluate.results import few_warnings, finish, png, table
from dalle.evaluate.scores import Set, start
from dalle.evaluate.search import by_faiss, nearest
from dalle.evaluate.session import Session, network_record
from dalle.evaluate.sets import Source, describe
from dalle.evaluate.sweeps import checked_radii, side_of
from dalle.files import check_targets
from dalle.pictures import save_bytes
from dalle.pretrained import fingerprint

STEPS, BATCH = 1500, 256  # reach recall .95 at precision .95 (benchmarks/bench_overlap.py)
SHOWN = 40  # pairs on the contact sheet
LIST, SHEET, DETECTOR = "overlapping.csv", "overlap-sheet.png", "detector"


def overlap(
    real: Set,
    fake: Set,
    *,
    seen: Set | None = None,
    train: Set | None = None,
    threshold: float | None = None,
    out: Path | str | None = None,
    radii: Sequence[float] = (0,),
    steps: int = STEPS,
    train_batch: int = BATCH,
    detector_size: int = 32,
    detector_width: int = 16,
    faiss: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Which real pictures a model has seen, and the distance with and without them (3.2).

    Args:
        real: the pictures that are looked up, such as those of validation.
        fake: generated pictures, for the distance. A pipeline draws the captions of `real`.
        seen: the pictures among which copies are looked for, such as those of training; `fake` if
            left out.
        train: what the detector learns from, or the folder of a saved detector; `seen` if left out.
        threshold: cosine from which a picture counts as a copy, -1 to 1; chosen by the sheet.
        out: folder of overlap.json, .md, .png, the contact sheet, the detector, and with a
            threshold overlapping.csv.
        radii: of the blur of both sets (Figure 9: solid with all pictures, dashed without copies).
        steps, train_batch: of the detector's training; the defaults take about six minutes on two
            cores.
        detector_size, detector_width: of its pictures in pixels, of its first stage.
        faiss: search by the package faiss.
        options: of `session.Setup`; extractor and weights are of the distance.

    Returns:
        "similarity" (of each real picture, in order), "nearest", "overlapping" (with a threshold:
        "real", "nearest", "similarity" each), "share", "points" with "distance" and "without".

    Raises:
        DalleError: in one line, for sets, weights or numbers that do not fit.
    """
    owner = "eval overlap"
    threshold = checked_threshold(owner, threshold)
    radii = checked_radii(owner, radii)
    steps = integer(owner, "steps", steps, 1, 10**6)
    train_batch = integer(owner, "train_batch", train_batch, 2, 2**14)
    config = copies.DetectorConfig(detector_size, detector_width)
    session, folder = start("overlap", out, options)
    if folder is not None:
        check_targets(owner, folder / LIST, folder / SHEET)
    if faiss:
        two = torch.eye(2, dtype=torch.float32, device="cpu")
        by_faiss(two, two)  # refused before the work
    session.look(real, fake)
    opened = session.take("real", real)
    drawn = session.take("fake", fake, opened)
    base = drawn if seen is None else session.take("seen", seen, opened)
    for name, source in (("real", opened), ("fake" if seen is None else "seen", base)):
        side_of(owner, name, source.pairs)  # refused before the training
    missing = _network_missing(session)
    # The distance needs no detector; sets that do not fit are refused before the training.
    sets = [] if missing else _features(session, opened, drawn, radii)
    model, trained = _detector(session, base, train, config, steps, train_batch)
    found = {
        name: extract(
            owner,
            source,
            copies.DetectorExtractor(model, cropped=name == "seen"),
            cache=session.setup.cache,
            batch_size=session.setup.batch_size,
            minimum=1,
            name=name,
        )
        for name, source in (("real", opened), ("seen", base))
    }
    values, rows = nearest(
        found["real"].values.to(session.device),
        # A row for each view of a seen picture: of some a copy shows a part.
        found["seen"].values.reshape(-1, model.config.dimensions).to(session.device),
        faiss=faiss,
    )
    similarity, rows = values.cpu().numpy(), rows.cpu() // copies.VIEWS
    order = np.argsort(-similarity, kind="stable")
    entries = _entries(found["real"], found["seen"], similarity, rows, order)
    copied = np.zeros(len(similarity), bool) if threshold is None else similarity >= threshold
    points, warnings = (
        ([], [f"no distance was measured: {missing}"])
        if missing
        else _points(session, sets, found["real"], copied, threshold)
    )
    if describe(opened, 0)["fingerprint"] == describe(base, 0)["fingerprint"]:
        warnings.append("real and seen hold the same pictures: each is its own copy")
    network = points[0]["metric"] if points else None
    named = {**found, **({"fake": sets[0][2]} if sets else {})}
    n = {"real": len(found["real"]), "seen": len(found["seen"])}
    share = float(copied.mean())
    result: dict[str, Any] = {
        "title": _title(threshold, int(copied.sum()), n["real"], n["seen"]),
        "text": "For each real picture the nearest seen one, by a detector of copies that was "
        "trained to match a picture with its own transformed copy. The sheet is sorted by "
        "closeness: each picture of real stands beside its nearest. Choose a threshold that "
        "misses few copies. Solid: all real pictures; dashed: without the overlapping ones. The "
        "paper found 21 % of MS-COCO's validation pictures, and 12 % of CUB's.",
        "command": owner,
        "n": n,
        "seed": session.seed,
        "threshold": threshold,
        "share": None if threshold is None else share,
        "similarity": [round(float(v), 6) for v in similarity],
        "items": found["real"].items.tolist(),
        "nearest": found["seen"].items[rows].tolist(),
        "overlapping": None if threshold is None else entries[: int(copied.sum())],
        "metric": network,
        "points": points,
        "detector": {**trained, "fingerprint": fingerprint(model)},
        "search": "faiss IndexFlatIP" if faiss else "exact, in chunks",
        "resize": copies.DetectorExtractor(model, cropped=True).resize,
        "sets": {name: describe(f.source, len(f)) for name, f in named.items()},
        "extractor": None if missing else network_record(session),
        "paper": {"coco": 0.21, "cub": 0.12},
        "warnings": warnings,
        "tables": _tables(similarity, points, entries, threshold, network),
    }
    if folder is None:
        return finish("overlap", result, None)
    if threshold is not None:
        save_bytes(folder / LIST, _csv(result["overlapping"]))
    if "share_matched" in trained:
        model.save_pretrained(folder / DETECTOR)
    save_bytes(folder / SHEET, _sheet(found["real"], found["seen"], similarity, rows, order))
    result["pictures"] = ["overlap.png", SHEET]
    return finish("overlap", result, folder, overlap_png(owner, similarity, threshold, points))


def checked_threshold(owner: str, threshold: Any) -> float | None:
    """A cosine as a float, or None.

    Raises:
        UsageError: not a number from -1 to 1.
    """
    if threshold is None:
        return None
    number = isinstance(threshold, (int, float, np.integer, np.floating))
    if not number or isinstance(threshold, bool) or not -1 <= threshold <= 1:
        raise UsageError(f"{owner}: threshold must be a number from -1 to 1, got {threshold!r}")
    return float(threshold)


def _detector(
    session: Session,
    base: Source,
    train: Set | None,
    config: copies.DetectorConfig,
    steps: int,
    batch: int,
) -> tuple[copies.CopyDetector, dict[str, Any]]:
    owner = session.owner
    if train is not None and copies.is_detector(train):
        try:
            model = copies.CopyDetector.from_pretrained(Path(str(train)))
        except CheckpointError as error:
            raise CheckpointError(f"{owner}: train: {error}") from error
        return model.to(session.device), {"folder": str(train)}
    return copies.train_detector(
        owner,
        base if train is None else session.take("train", train, base),
        config=config,
        steps=steps,
        batch_size=batch,
        seed=session.seed,
        cache=session.setup.cache,
        device=session.device,
    )


def name_of(pairs: Pairs, item: int) -> str:
    """The file of a picture, or its number in the set where it has none of its own."""
    paths = getattr(pairs, "paths", None)
    return str(paths[item]) if paths else str(item)


def _entries(
    real: Features, seen: Features, similarity: np.ndarray, rows: Tensor, order: np.ndarray
) -> list[dict[str, Any]]:
    """The names of each picture and its nearest, the closest first."""
    return [
        {
            "real": name_of(real.source.pairs, int(real.items[i])),
            "nearest": name_of(seen.source.pairs, int(seen.items[rows[i]])),
            "similarity": round(float(similarity[i]), 6),
        }
        for i in order
    ]


def _network_missing(session: Session) -> str:
    """Loads the network of the distance before the work; says what lacks where none was asked for.

    Raises:
        DalleError: the one that was asked for cannot be loaded.
    """
    try:
        _ = session.extractor
    except DataError as missing:
        if session.setup.weights is not None or session.setup.extractor != "ranker":
            raise
        return str(missing).removeprefix(f"{session.owner}: ")
    return ""


def _features(
    session: Session, opened: Source, drawn: Source, radii: Sequence[float]
) -> list[tuple[float, Features, Features]]:
    """The features of both sets at each radius, of the network of the distance."""
    side = side_of(session.owner, "fake", drawn.pairs) if any(radii) else None

    def of(name: str, source: Source, radius: float) -> Features:
        return session.features(f"{name} at radius {radius:g}", source, side=side, radius=radius)

    return [(radius, of("real", opened, radius), of("fake", drawn, radius)) for radius in radii]


def _distance(session: Session, name: str, x: Tensor, y: Tensor) -> dict[str, Any]:
    """A distance and its interval, as entries of a point."""
    value = distances.frechet_distance(x, y)
    found = session.interval(distances.frechet_distance, [x, y], value, 0.0)
    return {name: value, f"{name}_interval": found["interval"]}


def _points(
    session: Session,
    sets: Sequence[tuple[float, Features, Features]],
    searched: Features,
    copied: np.ndarray,
    threshold: float | None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The distance at each radius with all real pictures, and without the copies."""
    metric = session.extractor.distance
    gone = {int(i) for i in searched.items[torch.from_numpy(copied)]}
    points, counts = [], {}
    for radius, a, b in sets:
        x, y = a.values.double(), b.values.double()
        point = {"radius": radius, "metric": metric, **_distance(session, "distance", x, y),
                 "without": None, "without_interval": None, "n_without": None}  # fmt: skip
        if threshold is not None:
            left = torch.tensor(
                [int(i) not in gone for i in a.items], dtype=torch.bool, device="cpu"
            )
            point["n_without"] = int(left.sum())
            if int(left.sum()) >= 2:
                point |= _distance(session, "without", x[left], y)
        points.append(point)
        counts = {"real": len(a), "fake": len(b)}
    warnings = few_warnings(metric, counts)
    if threshold is not None and points[0]["without"] is None:
        left_over = points[0]["n_without"]
        warnings.append(f"no distance without the copies: {left_over} real pictures are left")
    return points, warnings


def _title(threshold: float | None, copied: int, real: int, seen: int) -> str:
    if threshold is None:
        return f"Overlap of {real} with {seen} pictures: choose a threshold by the sheet"
    return f"Overlap: {copied} of {real} pictures ({copied / real:.1%}) from {threshold:g} up"


def _tables(
    similarity: np.ndarray,
    points: list[dict[str, Any]],
    entries: list[dict[str, Any]],
    threshold: float | None,
    metric: str | None,
) -> list[dict[str, Any]]:
    own = [] if threshold is None else [threshold]
    steps = sorted({0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, *own})
    rows = [[t, int((similarity >= t).sum()), float((similarity >= t).mean())] for t in steps]
    made = [table(["threshold", "pictures", "share"], rows, "Real pictures from a threshold up")]
    if points:
        keys = ("radius", "distance", "distance_interval", "without", "without_interval",
                "n_without")  # fmt: skip
        cells = [[p[key] for key in keys] for p in points]
        heads = ["blur radius", f"{metric}, all", "95 % interval", f"{metric}, without copies",
                 "95 % interval", "real pictures left"]  # fmt: skip
        made.append(table(heads, cells))
    closest = [
        [e["similarity"], printable(e["real"]), printable(e["nearest"])] for e in entries[:10]
    ]
    made.append(table(["similarity", "real", "nearest"], closest, "The closest"))
    return made


def _csv(entries: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["real", "nearest", "similarity"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(entries)
    return text.getvalue().encode("utf-8", "surrogateescape")


def _sheet(
    real: Features, seen: Features, similarity: np.ndarray, rows: Tensor, order: np.ndarray
) -> bytes:
    """Pairs, the closest first; the first ones all, later ones ever farther apart in rank."""
    ranks = np.unique(np.geomspace(1, len(order), SHOWN).round().astype(int) - 1)
    tiles, labels = [], []
    for rank in ranks:
        i = int(order[rank])
        tiles.append(copies.whole(real.source.pairs.load(int(real.items[i])), 96))
        tiles.append(copies.whole(seen.source.pairs.load(int(seen.items[rows[i]])), 96))
        labels += [f"{rank + 1}. {similarity[i]:.3f}", "its nearest"]
    return png(pictures.grid(to_tensor(tiles), columns=8, labels=labels))
