"""`dalle eval`: every verb fills a dataclass and calls the function of its name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dalle.errors import Interrupted
from dalle.evaluate import scores
from dalle.evaluate.distances import SUBSET_SIZE, SUBSETS
from dalle.evaluate.results import cell
from dalle.evaluate.session import Setup

OUT = Path("run/eval")


@dataclass(frozen=True, kw_only=True)
class SetupConfig(Setup):
    """`Setup`, whose network has a name here."""

    extractor: str = "ranker"


C = TypeVar("C", bound="HasSetup")


class HasSetup(Protocol):
    """The options of a verb that keeps what it has done."""

    @property
    def setup(self) -> SetupConfig: ...


def goes_on(verb: Callable[[C], None]) -> Callable[[C], None]:
    """Makes Ctrl-C in a verb end with what is kept and how to go on.

    Raises:
        Interrupted: on Ctrl-C.
    """

    @functools.wraps(verb)
    def run(config: C) -> None:
        try:
            verb(config)
        except KeyboardInterrupt as stop:
            raise Interrupted(
                "dalle eval: stopped; whole parts are kept in "
                f"{config.setup.cache}, and the same command goes on"
            ) from stop

    return run


def options_of(setup: Setup) -> dict[str, Any]:
    """The fields of a setup as keyword arguments."""
    return {f.name: getattr(setup, f.name) for f in fields(setup)}


def report_line(command: str, result: dict[str, Any], out: Path) -> None:
    """Prints a value with its interval, and where the files are."""
    for line in result["warnings"]:
        print(f"{command}: warning: {line}")
    interval = result.get("interval")
    between = f", 95 % between {cell(interval[0])} and {cell(interval[1])}" if interval else ""
    counts = ", ".join(f"{count} {name}" for name, count in result["n"].items())
    print(f"{command}: {result['title']}{between} ({counts}); {result['name']}.json in {out}")


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Computes the features of a set and keeps them in the cache.

    Args:
        data: SOURCE: a folder of pictures or of dalle sample, a pipeline, shapes, emoji, ...
        out: folder of features.safetensors, features.json and features.png.
        setup: options of every measure.
    """

    data: str
    out: Path = OUT
    setup: SetupConfig = field(default_factory=SetupConfig)


@goes_on
def features(config: FeaturesConfig) -> None:
    """Computes, writes, and says where."""
    result = scores.features(config.data, out=config.out, **options_of(config.setup))
    report_line("eval features", result, config.out)


@dataclass(frozen=True, kw_only=True)
class FidConfig:
    """Measures the Frechet distance between the features of two sets.

    It is called FID for the network inception-tf only, else after the network, e.g. FD-ranker.

    Args:
        real: SOURCE: a folder of pictures or of dalle sample, a pipeline, or a set by name, as
            shapes:test.
        fake: SOURCE of the generated pictures. A pipeline draws the captions of the real set, or
            those of a file.
        out: folder of fid.json, fid.md and fid.png.
        infinite: extrapolate to infinitely many generated pictures as well.
        setup: options of every measure.
    """

    real: str
    fake: str
    out: Path = OUT
    infinite: bool = False
    setup: SetupConfig = field(default_factory=SetupConfig)


@goes_on
def fid(config: FidConfig) -> None:
    """Measures, writes, and says the value."""
    result = scores.fid(
        config.real,
        config.fake,
        out=config.out,
        infinite=config.infinite,
        **options_of(config.setup),
    )
    report_line("eval fid", result, config.out)
    if config.infinite:
        print(f"eval fid: extrapolated to infinite n: {cell(result['infinite']['value'])}")


@dataclass(frozen=True, kw_only=True)
class KidConfig:
    """Measures the kernel distance between the features of two sets (KID for inception-tf).

    Args:
        real: SOURCE, as of dalle eval fid.
        fake: SOURCE of the generated pictures.
        out: folder of kid.json, kid.md and kid.png.
        subsets: random subsets whose mean it is.
        subset_size: pictures of each; smaller sets are compared whole.
        setup: options of every measure.
    """

    real: str
    fake: str
    out: Path = OUT
    subsets: int = SUBSETS
    subset_size: int = SUBSET_SIZE
    setup: SetupConfig = field(default_factory=SetupConfig)


@goes_on
def kid(config: KidConfig) -> None:
    """Measures, writes, and says the value."""
    result = scores.kid(
        config.real,
        config.fake,
        out=config.out,
        subsets=config.subsets,
        subset_size=config.subset_size,
        **options_of(config.setup),
    )
    report_line("eval kid", result, config.out)


@dataclass(frozen=True, kw_only=True)
class InceptionScoreConfig:
    """Measures the Inception Score of a set; without classes, a score over captions.

    Args:
        fake: SOURCE of the generated pictures.
        real: SOURCE whose captions are the classes, and which a pipeline draws.
        out: folder of is.json, is.md and is.png.
        splits: parts with a score of their own.
        setup: options of every measure.
    """

    fake: str
    real: str | None = None
    out: Path = OUT
    splits: int = 10
    setup: SetupConfig = field(default_factory=SetupConfig)


@goes_on
def inception_score(config: InceptionScoreConfig) -> None:
    """Measures, writes, and says the value."""
    result = scores.is_(
        config.fake,
        real=config.real,
        out=config.out,
        splits=config.splits,
        **options_of(config.setup),
    )
    report_line("eval is", result, config.out)


@dataclass(frozen=True, kw_only=True)
class PrcConfig:
    """Measures precision and recall of generated pictures in a space of features.

    Args:
        real: SOURCE, as of dalle eval fid.
        fake: SOURCE of the generated pictures.
        out: folder of prc.json, prc.md and prc.png.
        k: neighbours that a ball reaches.
        setup: options of every measure.
    """

    real: str
    fake: str
    out: Path = OUT
    k: int = 3
    setup: SetupConfig = field(default_factory=SetupConfig)


@goes_on
def prc(config: PrcConfig) -> None:
    """Measures, writes, and says the values."""
    result = scores.prc(
        config.real, config.fake, out=config.out, k=config.k, **options_of(config.setup)
    )
    report_line("eval prc", result, config.out)


@dataclass(frozen=True, kw_only=True)
class ClipScoreConfig:
    """Measures how well pictures fit their captions, by a ranker or a CLIP.

    Args:
        fake: SOURCE with captions.
        real: SOURCE whose captions a pipeline draws.
        out: folder of clip-score.json, clip-score.md and clip-score.png.
        setup: options of every measure.
    """

    fake: str
    real: str | None = None
    out: Path = OUT
    setup: SetupConfig = field(default_factory=SetupConfig)


@goes_on
def clip_score(config: ClipScoreConfig) -> None:
    """Measures, writes, and says the value."""
    result = scores.clip_score(
        config.fake, real=config.real, out=config.out, **options_of(config.setup)
    )
    report_line("eval clip-score", result, config.out)
