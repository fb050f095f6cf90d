"""What all measures share: their options, the sets they open, the network, the features."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dalle.configs import did_you_mean, field_names, integer, seed_number
from dalle.console import progress_shown
from dalle.data.pairs import Pairs
from dalle.data.sources import drawn_size
from dalle.devices import pick_device
from dalle.errors import CheckpointError, UsageError
from dalle.evaluate.cache import CACHE, Features, extract
from dalle.evaluate.drawings import DrawConfig, captions_to_draw, draw_source
from dalle.evaluate.extractors import Extractor, load_extractor
from dalle.evaluate.intervals import MOST, bootstrap, resamples
from dalle.evaluate.results import as_path
from dalle.evaluate.sets import DRAWN_SIDE, Source, describe, is_pipeline, open_source
from dalle.pipeline import Pipeline

OWN_JUDGE = "the features are of the network that chose the samples, which favours its choice"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Options of every measure.

    Attributes:
        extractor: the network: ranker, clip, inception-tf or inception-torchvision.
        weights: its weights: a folder for ranker (a pipeline's too) and clip, a safetensors file
            for the others. Nothing is downloaded. Left out with ranker: that of a pipeline which
            draws, else of run/pipeline, else of out/demo/pipeline.
        count: pictures of each set at most, evenly spaced.
        first_only: of the output of dalle sample, only the best picture of each caption.
        image_size: side of the pictures of a built-in set. Left out, that of the pictures which a
            pipeline draws, else 64.
        bootstrap: resamples for the interval; 0 for none. Left out, 200, but 20 for features of
            more than 512 numbers.
        seed: of the interval, of random subsets, of a set that is drawn.
        batch_size: pictures at once.
        cache: folder of features and drawings, where a command goes on that was stopped.
        device: "cpu", "cuda" or "auto".
        draw: how a pipeline draws that is given as a set.
    """

    extractor: Any = "ranker"
    weights: Path | None = None
    count: int | None = None
    first_only: bool = False
    image_size: int | None = None
    bootstrap: int | None = None
    seed: int = 0
    batch_size: int = 64
    cache: Path = CACHE
    device: str = "auto"
    draw: DrawConfig = field(default_factory=DrawConfig)


def make_setup(owner: str, options: dict[str, Any]) -> Setup:
    """A `Setup` of keyword arguments; those of `DrawConfig` are taken too.

    Raises:
        UsageError: an unknown one.
    """
    known, of_draw = field_names(Setup), field_names(DrawConfig)
    choices = sorted({*known, *of_draw})
    for name in options:
        if name not in choices:
            named, hint = ", ".join(choices), did_you_mean(name, choices)
            raise UsageError(f"{owner}: option must be one of {named}, got {name}{hint}")
    drawing = {name: value for name, value in options.items() if name in of_draw}
    rest = {name: value for name, value in options.items() if name in known}
    if drawing:
        rest["draw"] = DrawConfig(**drawing)
    return Setup(**rest)


class Session:
    """One measure at work.

    Args:
        owner: begins every line, e.g. "eval fid".
        setup: its options.
    """

    def __init__(self, owner: str, setup: Setup) -> None:
        self.owner, self.setup = owner, setup
        self.seed = seed_number(owner, setup.seed)
        if setup.bootstrap is not None:
            integer(owner, "bootstrap", setup.bootstrap, 0, MOST)
        integer(owner, "batch_size", setup.batch_size, 1)
        as_path(owner, "cache", setup.cache)
        if not isinstance(setup.device, (str, torch.device)):
            got = type(setup.device).__name__
            raise UsageError(f"{owner}: device must be auto, cpu or another's name, got {got}")
        self.device = pick_device(str(setup.device))
        if setup.image_size is not None:
            integer(owner, "image_size", setup.image_size, 1)
        self.side = DRAWN_SIDE  # of a built-in set's pictures, where the options do not say it
        self._of_pipeline: Path | None = None
        self._pipelines: dict[str, Pipeline] = {}

    def look(self, *sources: object) -> None:
        """Loads the pipelines among the sets first: their pictures' size goes for built-in sets."""
        for source in sources:
            if isinstance(source, (str, Path, Pipeline)) and is_pipeline(source):
                self.side = self.pipeline(source).image_size

    def take(
        self, name: str, source: str | Path | Pairs | Pipeline, real: Source | None = None
    ) -> Source:
        """Opens a SOURCE; a pipeline draws the captions of the options, else those of `real`."""
        setup = self.setup
        if isinstance(source, Pipeline) or is_pipeline(source):
            return self._drawn(source, real)
        return open_source(
            self.owner,
            name,
            source,
            count=setup.count,
            image_size=setup.image_size or drawn_size(self.side),
            seed=self.seed,
            first_only=setup.first_only,
        )

    def pipeline(self, source: str | Path | Pairs | Pipeline) -> Pipeline:
        """A pipeline, the object or from its folder, on the device."""
        if not isinstance(source, Pipeline):
            folder = Path(str(source))
            if str(folder) not in self._pipelines:
                try:
                    self._pipelines[str(folder)] = Pipeline.from_pretrained(folder)
                except CheckpointError as error:
                    raise CheckpointError(f"{self.owner}: pipeline: {error}") from error
            source = self._pipelines[str(folder)]
            if source.ranker is not None and self._of_pipeline is None:
                self._of_pipeline = folder / "ranker"
        for part in (source.vae, source.prior, source.ranker):
            if isinstance(part, torch.nn.Module):
                part.to(self.device)
        return source

    def _drawn(self, source: str | Path | Pairs | Pipeline, real: Source | None) -> Source:
        setup = self.setup
        file = setup.draw.captions
        pairs = None if real is None else real.pairs
        captions = captions_to_draw(self.owner, file, pairs, setup.count)
        pipeline = self.pipeline(source)
        _ = self.extractor  # weights that do not fit are refused before the drawing
        return draw_source(
            self.owner,
            "pipeline" if isinstance(source, Pipeline) else str(source),
            pipeline,
            captions,
            num_candidates=setup.draw.num_candidates,
            seed=setup.draw.draw_seed,
            cache=setup.cache,
        )

    @cached_property
    def extractor(self) -> Extractor:
        """The network, loaded when it is first needed."""
        weights = self.setup.weights
        if weights is None and self.setup.extractor == "ranker":
            weights = self._of_pipeline
        return load_extractor(self.setup.extractor, weights, device=self.device, owner=self.owner)

    def features(
        self,
        name: str,
        source: Source,
        *,
        side: int | None = None,
        radius: float = 0.0,
        minimum: int = 2,
    ) -> Features:
        """Features of a set, in batches, from the cache where they are there."""
        return extract(
            self.owner,
            source,
            self.extractor,
            cache=self.setup.cache,
            batch_size=self.setup.batch_size,
            side=side,
            radius=radius,
            minimum=minimum,
            name=name,
        )

    def interval(
        self, statistic: Any, sets: list[torch.Tensor], value: float, lowest: float = -math.inf
    ) -> dict[str, Any]:
        """`bootstrap` with the options' numbers, shown as progress."""
        count = self.setup.bootstrap
        if count is None:
            count = resamples(max(x.shape[1] for x in sets if x.dim() == 2))
        with progress_shown("interval") as show:
            return bootstrap(
                statistic,
                sets,
                count=count,
                seed=self.seed,
                value=value,
                lowest=lowest,
                progress=show,
            )

    def own_judge(self, *sets: Features) -> list[str]:
        """A warning where the network is the one that chose a pipeline's samples."""
        for found in sets:
            drawn = found.source.details.get("drawn", {})
            ranker = drawn.get("pipeline", {}).get("ranker")
            if ranker == self.extractor.fingerprint and drawn.get("num_candidates", 1) > 1:
                return [OWN_JUDGE]
        return []

    def record(self, **sets: Features) -> dict[str, Any]:
        """What stands beside every value: the network, the sets, the seed."""
        network = self.extractor
        return {
            "command": self.owner,
            "n": {name: len(f) for name, f in sets.items()},
            "seed": self.seed,
            "extractor": network_record(self),
            "resize": network.resize,
            "sets": {name: describe(f.source, len(f)) for name, f in sets.items()},
        }


def network_record(session: Session) -> dict[str, Any]:
    """What a record says of the network of a session."""
    network = session.extractor
    return {
        "name": network.name,
        "fingerprint": network.fingerprint,
        "dimensions": network.dimensions,
    }
