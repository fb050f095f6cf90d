"""`--again PICTURE.png` of `dalle sample` and `dalle edit`: a candidate drawn once more."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from dalle import files, pictures
from dalle.commands.drawn import (
    PAGE,
    RECORD,
    description,
    earlier_pictures,
    find_model,
    load_pipeline,
    output_folder,
    page,
    read_image,
    record,
    remove_earlier,
    save_pictures,
    set_precision,
    slug,
)
from dalle.commands.picture_record import (
    PictureRecord,
    Versions,
    check_image,
    check_model,
    check_options,
    model_hashes,
    pixels_hash,
    read_record,
)
from dalle.console import say
from dalle.devices import pick_device
from dalle.errors import UsageError
from dalle.files import to_json
from dalle.pipeline import Generation, Pipeline

ALLOWED = ("again", "model", "out", "overwrite", "device", "scale")

Drawn = tuple[torch.Tensor, torch.Tensor, float]  # (3, H, W) picture, (h, w) tokens, score


class HasAgain(Protocol):
    """Options of a command that `prepare` reads."""

    @property
    def again(self) -> Path | None: ...
    @property
    def model(self) -> Path | None: ...
    @property
    def out(self) -> Path: ...
    @property
    def overwrite(self) -> bool: ...
    @property
    def device(self) -> str: ...
    @property
    def scale(self) -> int: ...


@dataclass(frozen=True)
class Again:
    """A picture that is to be drawn again, and what is needed for it.

    Attributes:
        owner: "sample" or "edit".
        record: what the picture says.
        pipeline: the one that drew it, in the precision in which it did.
        image: (3, H, W) what it was drawn from, or None.
    """

    owner: str
    record: PictureRecord
    pipeline: Pipeline
    image: torch.Tensor | None
    out: Path
    earlier: list[Path]
    run: dict[str, Any]
    scale: int

    def finish(self, draw: Callable[[], Drawn]) -> None:
        """Draws, writes the folder of a run of one picture, and says whether the bits are equal."""
        image, tokens, score = draw()
        record_, pixels = self.record, pictures.to_uint8(image)
        same = pixels_hash(pixels) == record_.pixels
        if same and record_.scores.ranker is not None:
            score = record_.scores.ranker
        found = record_ if same else record_.of(record_.candidate, score, pixels)
        generation = Generation(
            image[None],
            torch.tensor([score], dtype=torch.float32, device="cpu"),
            tokens[None],
            torch.tensor([found.candidate], dtype=torch.int64, device="cpu"),
        )
        remove_earlier(self.owner, self.out, self.earlier)
        name = slug(found.caption, 0)
        singles = save_pictures(self.out, name, generation, self.scale, found)
        entry = record(found.caption, found.drawn_as, found.seed, generation, singles)
        self.run["records"].append(entry)
        pictures.save_bytes(self.out / RECORD, to_json(self.run))
        pictures.save_bytes(self.out / PAGE, page(self.run))
        if not same:
            then, now = asdict(record_.versions), asdict(Versions())
            say(
                f"{self.owner}: note: the pixels differ from those of the picture, drawn with "
                f"{_words(then)} on {record_.options.device}; here {_words(now)}"
            )
        print(f"{self.owner}: candidate {found.candidate} again: {self.out / singles[0]}")


def _words(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version[:40]}" for name, version in versions.items())


def prepare(owner: str, config: HasAgain, option: str, image: Path | None) -> Again:
    """Reads the picture's record, its pipeline, and the picture that it was drawn from.

    Args:
        owner: "sample" or "edit".
        config: of the command.
        option: its name for the picture that was drawn from.
        image: that picture, or None.

    Raises:
        DalleError: in one line, before anything is drawn or written.
    """
    assert config.again is not None
    check_options(owner, config, (*ALLOWED, option))
    record_ = read_record(owner, config.again)
    options, wanted = record_.options, record_.options.image
    if wanted is not None and image is None:
        raise UsageError(
            f"{owner}: {option} must be given, got nothing: {config.again} was drawn from a picture"
        )
    if wanted is None and image is not None:
        raise UsageError(
            f"{owner}: {option} must be left out, got {image}: {config.again} was drawn from none"
        )
    model = find_model(owner, "model", config.model)
    out, name = output_folder(owner, config.out, config.overwrite), slug(record_.caption, 0)
    earlier, inputs = earlier_pictures(out), [config.again, *([image] if image else [])]
    targets = [out / RECORD, out / PAGE, out / f"{name}.png", out / name / "0.png"]
    files.check_targets(owner, *targets)
    check_inputs(owner, [*earlier, *targets], inputs)
    device = pick_device(options.device if config.device == "auto" else config.device)
    pipeline = load_pipeline(model, device)
    pictures.check_sheet(owner, 1, pipeline.image_size, config.scale)
    run = description(pipeline, model)
    check_model(owner, record_, model_hashes(run["model"]["fingerprints"]), model)
    given = None
    if wanted is not None and image is not None:
        given = read_image(image, pipeline.image_size)
        check_image(owner, option, wanted, given, image)
    set_precision(pipeline, options.precision, device)
    run |= {
        "sampling": asdict(options.sampling),
        "num_candidates": options.num_candidates,
        "top": 1,
        "seed": record_.seed,
        "precision": pipeline.prior.config.precision,
        "weights": options.weights,
        "again": True,
        "records": [],
    }
    return Again(owner, record_, pipeline, given, out, earlier, run, config.scale)


def check_inputs(owner: str, targets: Iterable[Path], inputs: Collection[Path]) -> None:
    """Raises UsageError where a result would overwrite a picture that is read."""
    for path in targets:
        files.check_not_input(owner, path, inputs)
