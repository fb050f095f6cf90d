"""`dalle eval overlap`: which pictures a model has seen, and the distance without them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dalle.commands.eval import OUT, SetupConfig, goes_on, options_of
from dalle.evaluate import data_overlap
from dalle.evaluate.results import cell


@dataclass(frozen=True, kw_only=True)
class OverlapConfig:
    """Looks for copies of pictures by a detector that is trained here (the paper's 3.2).

    Without --threshold it leaves a sorted contact sheet, from which to choose one by eye.

    Args:
        real: SOURCE of the pictures that are looked up, as of dalle eval fid.
        fake: SOURCE of the generated pictures, for the distance with and without copies.
        seen: SOURCE of the pictures among which copies are looked for, such as those of training;
            left out, fake.
        train: SOURCE that the detector learns from, or the folder of a saved detector; left out,
            seen.
        threshold: cosine from which a picture is a copy; writes overlapping.csv.
        out: folder of overlap.json, overlap.md, overlap.png, overlap-sheet.png and detector.
        radii: of a blur of both sets in pixels, as of dalle eval blur.
        steps: of the detector's training, which takes about six minutes on two cores; fewer find
            fewer copies.
        train_batch: pictures of a step, each with its copy.
        detector_size: side of the detector's pictures in pixels.
        detector_width: channels of its first stage.
        faiss: search by the package faiss instead of torch.
        setup: options of every measure; extractor and weights are of the distance.
    """

    real: str
    fake: str
    seen: str | None = None
    train: str | None = None
    threshold: float | None = None
    out: Path = OUT
    radii: tuple[float, ...] = (0,)
    steps: int = data_overlap.STEPS
    train_batch: int = data_overlap.BATCH
    detector_size: int = 32
    detector_width: int = 16
    faiss: bool = False
    setup: SetupConfig = field(default_factory=SetupConfig)


@goes_on
def overlap(config: OverlapConfig) -> None:
    """Trains, looks, measures, writes, and says what was found."""
    result = data_overlap.overlap(
        config.real,
        config.fake,
        seen=config.seen,
        train=config.train,
        threshold=config.threshold,
        out=config.out,
        radii=config.radii,
        steps=config.steps,
        train_batch=config.train_batch,
        detector_size=config.detector_size,
        detector_width=config.detector_width,
        faiss=config.faiss,
        **options_of(config.setup),
    )
    for line in result["warnings"]:
        print(f"eval overlap: warning: {line}")
    for point in result["points"]:
        without = "" if point["without"] is None else f", without copies {cell(point['without'])}"
        print(
            f"eval overlap: radius {cell(point['radius'])}: {result['metric']} "
            f"{cell(point['distance'])}{without}"
        )
    files = ["overlap.json", data_overlap.SHEET]
    if config.threshold is not None:
        files.append(data_overlap.LIST)
    print(f"eval overlap: {result['title']}; {', '.join(files)} in {config.out}")
