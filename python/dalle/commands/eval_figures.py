"""`dalle eval recon|blur|rerank|words|report`: the paper's figures, and a page of all results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from dalle.commands.eval import OUT, SetupConfig, goes_on, options_of, report_line
from dalle.evaluate import facts, page, reconstruction, sweeps
from dalle.evaluate.results import cell


@dataclass(frozen=True, kw_only=True)
class ReconConfig:
    """Sends pictures through a discrete VAE and back: PSNR, SSIM, codes used.

    Args:
        data: SOURCE, as of dalle eval fid.
        model: folder of the dVAE, or of a pipeline.
        side: of the pictures in pixels; left out, what the model was trained on; where that is not
            known, --image-size, or 256, and a line says so.
        out: folder of recon.json, recon.md and recon.png.
        setup: options of every measure.
    """

    data: str
    model: Path
    side: int | None = None
    out: Path = OUT
    setup: SetupConfig = field(default_factory=SetupConfig)


@goes_on
def recon(config: ReconConfig) -> None:
    """Measures, writes, and says the values."""
    options = options_of(config.setup) | {"out": config.out, "side": config.side}
    result = reconstruction.recon(config.data, config.model, **options)
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

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"radius": "radii"}

    real: str
    fake: str
    radii: tuple[float, ...] = (0, 1, 2, 4, 8)
    side: int | None = None
    out: Path = OUT
    setup: SetupConfig = field(default_factory=SetupConfig)


@goes_on
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


@goes_on
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


@goes_on
def words(config: WordsConfig) -> None:
    """Draws, checks, writes, and says the shares."""
    result = facts.words(
        config.fake,
        out=config.out,
        splits=config.splits,
        seeds=config.seeds,
        **options_of(config.setup),
    )
    for line in result["warnings"]:
        print(f"eval words: warning: {line}")
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
