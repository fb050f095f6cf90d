"""What a drawn PNG says of itself: a text chunk `dalle` of JSON, enough to draw it again.

It names no file and no folder. What is read back may come from anywhere, so every field is checked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dalle.configs import from_dict, integer, seed_number, to_dict
from dalle.data.images import png_text, read_bytes
from dalle.errors import DataError, UsageError
from dalle.files import parse_json
from dalle.pictures import METADATA_KEY, to_uint8
from dalle.pipeline import Generation
from dalle.prior.config import DTYPES
from dalle.prior.sampling import MAX_SEED, SamplingConfig
from dalle.prior.step import WEIGHTS
from dalle.version import __version__

FORMAT = 1
MAX_TEXT = 1 << 20  # characters of a record


@dataclass(frozen=True, kw_only=True)
class Models:
    """Hashes of a pipeline's weights.

    Args:
        pipeline: of tokenizer, dVAE and prior together, which decide the pixels.
        ranker: None where there is none of ours.
    """

    pipeline: str
    ranker: str | None = None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of one candidate.

    Args:
        ranker: higher is better; None without a ranker.
    """

    ranker: float | None = None

    def __post_init__(self) -> None:
        if self.ranker is not None and not math.isfinite(self.ranker):
            raise UsageError(f"picture: ranker must be a finite number, got {self.ranker}")


@dataclass(frozen=True, kw_only=True)
class Input:
    """A picture that was drawn from.

    Args:
        pixels: hash of it, cut and resized to the pipeline's size.
        rows: how many rows of its tokens were given (`--prime-rows`), None for an edit.
        keep: the mask of an edit (`masks.packed`), None for given rows.
        paste: whether kept pixels are the picture's own.
    """

    pixels: str
    rows: int | None = None
    keep: str | None = None
    paste: bool = False


@dataclass(frozen=True, kw_only=True)
class Options:
    """With what it was drawn.

    Args:
        sampling: how a token was drawn.
        num_candidates, top: candidates drawn and kept.
        precision: of the prior.
        weights: of `dalle.prior.decode.Decoder`.
        device: "cpu" or "cuda".
        image: what it was drawn from, if anything.
    """

    sampling: SamplingConfig
    num_candidates: int
    top: int
    precision: str
    device: str
    weights: str = "fp32"
    image: Input | None = None

    def __post_init__(self) -> None:
        if self.precision not in DTYPES:
            raise UsageError(f"picture: precision must be one of {', '.join(DTYPES)}")
        if self.weights not in WEIGHTS:
            raise UsageError(f"picture: weights must be one of {', '.join(WEIGHTS)}")
        integer("picture", "num_candidates", self.num_candidates, 1)


@dataclass(frozen=True, kw_only=True)
class Versions:
    """Of the software that drew it."""

    dalle: str = __version__
    torch: str = str(torch.__version__)


@dataclass(frozen=True, kw_only=True)
class PictureRecord:
    """One drawn picture.

    Args:
        command: what drew it.
        caption, drawn_as: as typed, and as the tokenizer got it.
        seed, candidate: decide the noise.
        scores: of this candidate.
        options: the rest that decides the pixels.
        model: hashes.
        pixels: hash of the picture's own pixels.
        versions: of the software.
        format: of this record.
    """

    command: Literal["sample", "edit"]
    caption: str
    drawn_as: str
    seed: int
    options: Options
    model: Models
    candidate: int = 0
    scores: Scores = field(default_factory=Scores)
    pixels: str = ""
    versions: Versions = field(default_factory=Versions)
    format: int = FORMAT

    def __post_init__(self) -> None:
        seed_number("picture", self.seed)
        if not 0 <= self.candidate < MAX_SEED:
            raise UsageError(f"picture: candidate must be 0 or more, got {self.candidate}")

    def metadata(self) -> dict[str, Any]:
        """As JSON values, for `pictures.save_png`."""
        return to_dict(self)

    def of(self, candidate: int, score: float, image: np.ndarray) -> PictureRecord:
        """The record of another candidate of the same run; image is (H, W, 3) uint8."""
        scores = Scores(ranker=None if math.isnan(score) else round(score, 5))
        return replace(self, candidate=candidate, scores=scores, pixels=pixels_hash(image))

    def sheet(self, generation: Generation) -> dict[str, Any]:
        """What a sheet of candidates of this run says of itself."""
        scores = [None if math.isnan(s) else round(s, 5) for s in generation.scores.tolist()]
        return {
            **sheet_metadata(self.command, self.caption),
            "drawn_as": self.drawn_as,
            "seed": self.seed,
            "candidates": generation.order.tolist(),
            "scores": {"ranker": scores},
            "options": to_dict(self.options),
            "model": to_dict(self.model),
        }


def sheet_metadata(command: str, caption: str) -> dict[str, Any]:
    """What a sheet of many pictures says of itself; it cannot be drawn again."""
    head = {"format": FORMAT, "command": command, "sheet": True, "caption": caption}
    return {**head, "versions": to_dict(Versions())}


def pixels_hash(pixels: np.ndarray) -> str:
    """Of a picture's (H, W, 3) uint8 pixels and its size."""
    digest = hashlib.sha256(f"{pixels.shape}\0".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return f"SHA-256 {digest.hexdigest()[:32]}"


def image_hash(image: torch.Tensor) -> str:
    """Of a picture (3, H, W) in [0, 1] that was drawn from."""
    return pixels_hash(to_uint8(image))


def model_hashes(fingerprints: Mapping[str, str]) -> Models:
    """Of the fingerprints that `drawn.description` gives; take them before the precision is set."""
    parts = [fingerprints[name] for name in ("tokenizer", "vae", "prior")]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return Models(pipeline=f"SHA-256 {digest[:32]}", ranker=fingerprints.get("ranker"))


def read_record(owner: str, path: Path) -> PictureRecord:
    """The record in a picture that `dalle sample` or `dalle edit` has written.

    Raises:
        DataError: it cannot be read, is no PNG, has no record or a damaged one, or is a sheet.
    """
    content = read_bytes(path)
    text = png_text(content, path, METADATA_KEY)
    wanted = f"{owner}: again must be a PNG that dalle sample or dalle edit wrote, got {path}"
    if text is None:
        raise DataError(f"{wanted}, which has no text {METADATA_KEY!r}")
    if len(text) > MAX_TEXT:
        raise DataError(f"{wanted}, whose text {METADATA_KEY!r} has more than {MAX_TEXT} letters")
    try:
        values = parse_json(text.encode("utf-8", "surrogatepass"))
    except ValueError as problem:
        reason = str(problem).splitlines()[0]
        raise DataError(f"{wanted}, whose text {METADATA_KEY!r} is no JSON: {reason}") from problem
    if not isinstance(values, dict):
        raise DataError(f"{wanted}, whose text {METADATA_KEY!r} is no JSON object")
    if values.get("sheet") is True:
        raise DataError(f"{wanted}, a sheet of many pictures: take a single one")
    if values.get("format") != FORMAT:
        found = repr(values.get("format"))[:40]
        raise DataError(f"{wanted}, whose format is {found} and not {FORMAT}")
    record = from_dict(PictureRecord, values, where=f"{owner}: {path}", error=DataError)
    if record.command != owner:
        more = " --image PICTURE" if record.command == "edit" else ""
        raise DataError(f"{wanted}: type dalle {record.command} --again {path}{more}")
    return record


def check_model(owner: str, record: PictureRecord, models: Models, model: Path) -> None:
    """Raises DataError where a pipeline is not the one that drew the picture."""
    if models.pipeline != record.model.pipeline:
        raise DataError(
            f"{owner}: model must be the one that drew the picture ({record.model.pipeline}), got "
            f"{model} ({models.pipeline})"
        )


def check_options(owner: str, config: Any, allowed: Collection[str]) -> None:
    """Refuses options beside `--again` that the picture's record decides.

    Args:
        owner: begins the error's line.
        config: of the command, a dataclass whose fields have defaults.
        allowed: names of those that may be given.

    Raises:
        UsageError: naming the first that is given.
    """
    for each in dataclasses.fields(config):
        made = each.default_factory
        default = each.default if made is dataclasses.MISSING else made()
        value = getattr(config, each.name)
        if each.name in allowed or value == default:
            continue
        got = f"{value!r:.100}"
        if dataclasses.is_dataclass(value):
            given = dataclasses.asdict(value).items()  # type: ignore[arg-type]  # no class
            got = ", ".join(f"{name} {x}" for name, x in given if x is not None)
        raise UsageError(
            f"{owner}: {each.name} must be left out beside again, whose picture says it, got {got}"
        )


def check_image(owner: str, option: str, wanted: Input, image: torch.Tensor, path: Path) -> None:
    """Raises DataError where a picture is not the one that was drawn from."""
    if image_hash(image) != wanted.pixels:
        raise DataError(
            f"{owner}: {option} must be the picture that was drawn from ({wanted.pixels}), got "
            f"{path} ({image_hash(image)})"
        )
