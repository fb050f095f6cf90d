"""Options of `dalle train` and `dalle demo`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dalle.configs import check_numbers, require
from dalle.demo.sizing import SizesConfig
from dalle.errors import UsageError

DEMO_SETS = ("emoji", "shapes")  # with recipes and scores of their own


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """From a caption to a picture: trains tokenizer, dVAE, ranker and prior, draws, writes a page.

    The same command goes on where it was stopped.

    Args:
        data: "emoji" (real artwork, captions of held-out combinations) or "shapes" (procedural,
            scored by a checker that reads each picture back).
        out: folder for the page, pictures, summary.json and the trained pipeline.
        minutes: how long it shall take: scales the number of updates of every training stage, by
            the machine's pace in the first seconds. Left out, the numbers are those of the recipe.
        device: "cpu", "cuda" or "auto".
        seed: for everything random.
        preset: "default", or "smoke": a few updates of the smallest sizes, to see that all parts
            work.
    """

    data: Literal["emoji", "shapes"] = "emoji"
    out: Path = Path("out/demo")
    minutes: float | None = None
    device: str = "auto"
    seed: int = 0
    preset: Literal["default", "smoke"] = "default"

    def __post_init__(self) -> None:
        check_numbers("demo", self)
        if self.data not in DEMO_SETS:
            raise UsageError(f"demo: data must be {' or '.join(DEMO_SETS)}, got {self.data!r}")
        if self.preset not in ("default", "smoke"):
            raise UsageError(f"demo: preset must be default or smoke, got {self.preset!r}")
        if self.minutes is not None and not 0 < self.minutes < 10_000:
            raise UsageError(f"demo: minutes must be above 0, got {self.minutes}")
        if self.seed < 0:
            raise UsageError(f"demo: seed must be 0 or more, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """From a folder of pictures with captions to a model that draws.

    Trains tokenizer, discrete VAE, ranker and prior one after another, joins them to a pipeline,
    scores it on pictures that were held out, and writes a page. Of codes the dVAE is ready and is
    not trained. The same command goes on where it was stopped.

    Args:
        data: shapes, emoji, or a folder of JPEG, PNG or WebP pictures, each with a .txt of the same
            name that holds its caption; or tar shards, a table, or codes of `dalle data encode`
            (docs/data.md); several by weights: --data a=0.7 --data b=0.3.
        vae: with codes, the model folder of the dVAE that made them.
        out: folder for the page, pictures, summary.json, config.yaml and the trained pipeline.
        time: how long it may take: quick is five minutes, hour, night is eight hours. It chooses
            sizes and numbers of updates, from the pictures and the measured pace as well.
        minutes: how long it may take, in place of the time's.
        validation: share of the pictures that are held out, to score the models on.
        device: "cpu", "cuda" or "auto".
        seed: for everything random.
        sizes: sizes and numbers of updates, each chosen where it is left out.
    """

    data: str
    vae: Path | None = None
    out: Path = Path("run")
    time: Literal["quick", "hour", "night"] = "quick"
    minutes: float | None = None
    validation: float = 0.1
    device: str = "auto"
    seed: int = 0
    sizes: SizesConfig = field(default_factory=SizesConfig)

    def __post_init__(self) -> None:
        check_numbers("train", self)
        times = ("quick", "hour", "night")
        require("train", self, f"one of {', '.join(times)}", times.__contains__, "time")
        require("train", self, "above 0", lambda x: x is None or 0 < x < 1e6, "minutes")
        require("train", self, "above 0 and at most 0.5", lambda x: 0 < x <= 0.5, "validation")
        require("train", self, "0 or more", lambda x: x >= 0, "seed")
        if self.vae is not None and self.data in DEMO_SETS:
            require_codes(self.vae)


def require_codes(vae: Path) -> None:
    """Refuses a dVAE that is ready with pictures.

    Raises:
        UsageError: always.
    """
    raise UsageError(
        "train: vae must be left out with pictures, of which a dVAE is trained, got "
        f"{vae}; it goes with codes: dalle data encode"
    )
