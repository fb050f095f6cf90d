"""`dalle pipeline make`: trained parts into the one folder that `dalle sample` takes."""

from __future__ import annotations

import os
import shlex
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from dalle.config_files import value_of_run
from dalle.data.texts import read_captions
from dalle.dvae.model import DiscreteVAE
from dalle.errors import DataError, UsageError
from dalle.files import atomic_folder, make_folder, real_path, saving
from dalle.pipeline import Pipeline
from dalle.prior.model import Prior
from dalle.prior.sampling import SamplingConfig
from dalle.ranker.model import ContrastiveRanker
from dalle.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class PipelineMakeConfig:
    """Checks that trained parts fit each other, and copies them into one folder.

    Attributes:
        tokenizer: folder of `dalle tokenizer train` (run/tokenizer), the one that the prior was
            trained with.
        vae: model folder of `dalle dvae train` (run/dvae/model), the one that the prior was trained
            with.
        prior: model folder of `dalle prior train` (run/prior/model).
        ranker: model folder of `dalle ranker train` (run/ranker/model); without one the samples
            stay in the order in which they were drawn.
        out: folder of the pipeline, new or empty.
        sampling: how `dalle sample` and `Pipeline.generate` draw a code where they are not told.
        num_candidates: how many samples a caption these choose from where they are not told; left
            out, 64 and the paper's 512.
    """

    tokenizer: Path
    vae: Path
    prior: Path
    out: Path = Path("run/pipeline")
    ranker: Path | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    num_candidates: int | None = None


def make(config: PipelineMakeConfig) -> None:
    """Loads every part, checks, writes all or nothing, and says what to type next."""
    out = real_path(make_folder(config.out, "pipeline make"))
    if any(out.iterdir()):
        raise UsageError(f"pipeline make: out must be new or empty, got files in {config.out}")
    if out == Path.cwd():  # a new folder takes its place
        raise UsageError(f"pipeline make: out must not be the folder you are in, got {config.out}")
    pipeline = Pipeline(
        Tokenizer.from_pretrained(config.tokenizer),
        DiscreteVAE.from_pretrained(config.vae),
        Prior.from_pretrained(config.prior),
        None if config.ranker is None else ContrastiveRanker.from_pretrained(config.ranker),
        sampling=config.sampling,
        num_candidates=config.num_candidates,
    )
    with saving("pipeline make", config.out), atomic_folder(out) as folder:
        pipeline.save_pretrained(folder)
    size, how = pipeline.image_size, "without" if config.ranker is None else "with"
    print(f"pipeline make: pictures of {size} x {size} pixels, {how} a ranker, in {config.out}")
    model = shlex.quote(str(config.out))
    caption = shlex.quote(a_caption(config.prior))
    print(f"pipeline make: next: dalle sample {caption} --model {model}")


def a_caption(prior: Path) -> str:
    """A caption of the folder that a prior was trained on, or "A CAPTION" where none is known."""
    folder = Path(value_of_run(prior, "data") or ".no-such-folder")
    with suppress(OSError, DataError, ValueError):
        names = (entry.name for entry in os.scandir(folder) if entry.name.endswith(".txt"))
        return read_captions(folder / min(islice(names, 1000)))[0]
    return "A CAPTION"
