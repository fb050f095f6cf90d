"""`dalle eval`: every verb fills a dataclass and calls the function of its name."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dalle.commands.presets import size_of_run
from dalle.evaluate import facts, page, reconstruction, scores, sweeps
from dalle.evaluate.distances import SUBSET_SIZE, SUBSETS
from dalle.evaluate.results import cell
from dalle.evaluate.session import Setup

OUT = Path("run/eval")


@dataclass(frozen=True, kw_only=True)
class SetupConfig(Setup):
    """`Setup`, whose network has a name here."""

    extractor: str = "ranker"


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


def clip_score(config: ClipScoreConfig) -> None:
    """Measures, writes, and says the value."""
    result = scores.clip_score(
        config.fake, real=config.real, out=config.out, **options_of(config.setup)
    )
    report_line("eval clip-score", result, config.out)


@dataclass(frozen=True, kw_only=True)
class ReconConfig:
    """Sends pictures through a discrete VAE and back: PSNR, SSIM, codes used.

    Args:
        data: SOURCE, as of dalle eval fid.
        model: folder of the dVAE, or of a pipeline.
        side: of the pictures in pixels; left out, what the model was trained on, where that is
            known, else --image-size.
        out: folder of recon.json, recon.md and recon.png.
        setup: options of every measure.
    """

    data: str
    model: Path
    side: int | None = None
    out: Path = OUT
    setup: SetupConfig = field(default_factory=SetupConfig)


def recon(config: ReconConfig) -> None:
    """Measures, writes, and says the values."""
    side = config.side
    if side is None:
        side = size_of_run(config.model) or None
    options = options_of(config.setup)
    result = reconstruction.recon(config.data, config.model, out=config.out, side=side, **options)
    report_line("eval recon", result, config.out)


@dataclass(frozen=True, kw_only=True)
class BlurConfig:
    """Measures two sets after a Gaussian blur of both (the paper's Figure 9 a, b).

    Args:
        real: SOURCE, as of dalle eval fid.
        fake: SOURCE of the generated pictures.
        radii: standard deviations of the blur in pixels.
        side: pictures are cut to a centred square of that side first; left out, that of the
            generated pictures. The paper's have 256.
        out: folder of blur.json, blur.md and blur.png.
        setup: options of every measure.
    """

    real: str
    fake: str
    radii: tuple[float, ...] = (0, 1, 2, 4, 8)
    side: int | None = None
    out: Path = OUT
    setup: SetupConfig = field(default_factory=SetupConfig)


def blur(config: BlurConfig) -> None:
    """Measures, writes, and says where."""
    result = sweeps.blur(
        config.real,
        config.fake,
        out=config.out,
        radii=config.radii,
        side=config.side,
        **options_of(config.setup),
    )
    report_points("eval blur", result, "radius", config.out)


@dataclass(frozen=True, kw_only=True)
class RerankConfig:
    """Measures the best of 1, 2, 4, ... candidates of one drawing (the paper's Figure 9 c).

    Args:
        real: SOURCE, as of dalle eval fid.
        fake: folder of a pipeline with a ranker. It draws the captions of the real set, or those of
            --captions; --num-candidates says how many samples of each, 512 if left out.
        candidates: numbers of samples to choose from; left out, 1, 2, 4, ... up to all.
        out: folder of rerank.json, rerank.md and rerank.png.
        setup: options of every measure.
    """

    real: str
    fake: str
    candidates: tuple[int, ...] = ()
    out: Path = OUT
    setup: SetupConfig = field(default_factory=SetupConfig)


def rerank(config: RerankConfig) -> None:
    """Draws, measures, writes, and says where."""
    result = sweeps.rerank(
        config.real,
        config.fake,
        out=config.out,
        candidates=config.candidates or None,
        **options_of(config.setup),
    )
    report_points("eval rerank", result, "candidates", config.out)


def report_points(command: str, result: dict[str, Any], axis: str, out: Path) -> None:
    """Prints each point of a curve, and where the files are."""
    for line in result["warnings"]:
        print(f"{command}: warning: {line}")
    for point in result["points"]:
        values = [f"{result['metrics'][key]} {cell(point[key])}" for key in result["metrics"]
                  if point[key] is not None]  # fmt: skip
        if "checker_share" in point:
            values.append(f"right {100 * point['checker_share']:.1f} %")
        print(f"{command}: {axis} {cell(point[axis])}: {', '.join(values)}")
    print(f"{command}: {result['name']}.json and {result['name']}.png in {out}")


@dataclass(frozen=True, kw_only=True)
class WordsConfig:
    """Counts which facts of a caption pictures show, by the checker of the set shapes.

    Args:
        fake: folder of a pipeline trained on shapes, or SOURCE with captions of shapes.
        splits: captions of train, test (unseen) and zero (colour and shape never seen together).
        seeds: of the drawings; the intervals are over them.
        out: folder of words.json, words.md and words.png.
        setup: options of every measure. Of a pipeline, --count captions a split (96) are drawn, and
            --num-candidates samples of each (8).
    """

    fake: str
    splits: tuple[str, ...] = ("train", "test", "zero")
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = OUT
    setup: SetupConfig = field(default_factory=SetupConfig)


def words(config: WordsConfig) -> None:
    """Draws, checks, writes, and says the shares."""
    result = facts.words(
        config.fake,
        out=config.out,
        splits=config.splits,
        seeds=config.seeds,
        **options_of(config.setup),
    )
    for split, found in result["splits"].items():
        for fact, kinds in found.items():
            shown = [
                f"{name} {100 * kinds[kind]['share']:.1f} %"
                for kind, name in result["columns"].items()
            ]
            print(f"eval words: {split}, {fact}: {', '.join(shown)}")
    print(f"eval words: words.json and words.png in {config.out}")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Makes one HTML page of all results in a folder.

    Args:
        out: the folder, as given to `--out` of the measures.
    """

    out: Path = OUT


def report(config: ReportConfig) -> None:
    """Writes index.html and says where."""
    made = page.report(config.out)
    print(f"eval report: {', '.join(made['results'])}; look at {made['page']}")
