"""What all figures share: the pipeline, its set, the captions, the drawings, the folder.

Shape letters: B captions, N pictures of each, S side of a picture in pixels.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dalle.data.augment import load_cropped, to_tensor
from dalle.data.pairs import Pairs, evenly_spaced
from dalle.demo.config import DemoConfig
from dalle.demo.run import run_demo
from dalle.demo.sets import DataSet
from dalle.errors import CheckpointError, DataError, UsageError
from dalle.evaluate.drawings import Drawn, draw
from dalle.evaluate.results import figure_png, pyplot
from dalle.files import json_sha256, read_object
from dalle.pictures import save_bytes, save_png, to_uint8
from dalle.pipeline import Pipeline
from dalle.pretrained import fingerprint
from dalle.reproduce.sets import guess, open_set, run_record
from dalle.reproduce.sizes import Sizes

OWNER = "reproduce"
LEAST_SHARE = 0.25  # of the demo's updates, however slow or busy the machine is


class Context:
    """One run of `dalle reproduce`.

    Args:
        model: folder of the pipeline.
        out: folder of the page; it exists.
        sizes: how much to compute.
        seed: for everything random.
        device: where to compute.
        data: the set that the pipeline was trained on; None: what its run says, else its tokenizer.
        shapes: folder of a pipeline trained on shapes; None: the model itself, where it is one,
            else one is trained below `out`/shapes.
        other: folder of a second pipeline of the same set.

    Attributes:
        pipeline: the model, on the device.
        set: its set.
        cache: folder where drawings and features are kept.

    Raises:
        CheckpointError: the model is no pipeline.
        DataError, UsageError: there is no such set, or `shapes` is of another one.
        EnvironmentProblem: a package is missing.
    """

    def __init__(
        self,
        model: Path,
        out: Path,
        *,
        sizes: Sizes,
        seed: int = 0,
        device: torch.device,
        data: str | None = None,
        shapes: Path | None = None,
        other: Path | None = None,
    ) -> None:
        pyplot(OWNER)
        self.model, self.out, self.sizes, self.seed = Path(model), Path(out), sizes, seed
        self.device = device
        self.given_data, self.given_shapes, self.given_other = data, shapes, other
        self.pipeline = self.load("model", self.model)
        if shapes is not None:
            require_shapes(shapes, self.load("shapes", shapes))
        if other is not None:
            self.load("other", other)
        self.set, self.set_known_by = open_set(OWNER, self.model, self.pipeline, data, seed)
        self.cache = self.out / "cache"

    def load(self, option: str, folder: Path) -> Pipeline:
        """A pipeline from its folder, on the device.

        Raises:
            CheckpointError: it is none.
        """
        try:
            pipeline = Pipeline.from_pretrained(folder)
        except CheckpointError as error:
            raise CheckpointError(f"{OWNER}: {option}: {error}") from error
        for part in (pipeline.vae, pipeline.prior, pipeline.ranker):
            if isinstance(part, torch.nn.Module):
                part.to(self.device)
        return pipeline

    @cached_property
    def pipeline_hash(self) -> str:
        """Of the weights of all parts."""
        return pipeline_hash(self.pipeline)

    @property
    def side(self) -> int:
        """S of the pipeline's pictures."""
        return self.pipeline.image_size

    @property
    def held_out(self) -> Pairs:
        """Pairs whose pictures are in no training pair."""
        return self.set.unseen[0]

    @property
    def train(self) -> Pairs:
        """The training pairs."""
        return self.set.train

    @cached_property
    def held_out_items(self) -> list[int]:
        """Which held-out pairs the shared drawing is of: evenly spaced, with usable pictures."""
        items = evenly_spaced(len(self.held_out), self.sizes.captions).tolist()
        return load_cropped(self.held_out, items, self.side)[1]

    @cached_property
    def captions(self) -> list[str]:
        """Held-out captions of the shared drawing, those of `held_out_items`."""
        return [self.held_out.captions[i] for i in self.held_out_items]

    @cached_property
    def originals(self) -> torch.Tensor:
        """True pictures of `captions`: (B, 3, S, S) in [0, 1]."""
        return self.pictures(self.held_out, self.held_out_items)

    def pictures(self, pairs: Pairs, items: Sequence[int]) -> torch.Tensor:
        """Pictures at the pipeline's size: (n, 3, S, S) in [0, 1]; broken ones are left out."""
        return to_tensor(load_cropped(pairs, items, self.side)[0])

    @cached_property
    def drawing(self) -> Drawn:
        """The shared drawing: of `captions`, the best of the first 1, 2, 4, ... candidates."""
        return self.draw(self.pipeline, self.captions, doubling(self._count(self.sizes.candidates)))

    @cached_property
    def best_drawing(self) -> Drawn:
        """Figure 6: a few of `captions`, the best of the first 1, 8, 64, 512 candidates."""
        most = self._count(self.sizes.best_candidates)
        sizes = [n for n in (1, 8, 64, 512) if n <= most]
        return self.draw(self.pipeline, self.captions[: self.sizes.best_captions], sizes)

    def _count(self, count: int) -> int:
        """Candidates; one where no ranker chooses."""
        return count if self.pipeline.ranker is not None else 1

    def draw(
        self,
        pipeline: Pipeline,
        captions: Sequence[str],
        sizes: Sequence[int],
        seed: int | None = None,
    ) -> Drawn:
        """Draws, or reads what an earlier run has drawn; with the run's seed, or another."""
        seed = self.seed if seed is None else seed
        return draw(OWNER, pipeline, captions, sizes, seed=seed, cache=self.cache)

    @property
    def trained_shapes(self) -> Path:
        """Where a pipeline of shapes is, once it was trained here: one of each length and seed."""
        return self.out / "shapes" / f"{self.sizes.name}-{self.seed}" / "pipeline"

    @property
    def trained_minutes(self) -> float:
        """How long the training of `trained_shapes` took; 0 where it is not known."""
        path = self.trained_shapes.parent / "work" / "timings.json"
        timings = read_object(path, DataError) if path.is_file() else {}
        stages = [each for each in timings.values() if isinstance(each, dict)]
        return sum(float(each.get("seconds", 0)) for each in stages) / 60

    @property
    def shapes_seconds(self) -> float:
        """Of the training that `shapes_folder` has before it; 0 where it has none."""
        there = self.trained_shapes / "config.json"
        if self.given_shapes is not None or self.set.name == "shapes" or there.exists():
            return 0.0
        return 60 * self.sizes.shapes_minutes

    @cached_property
    def shapes_folder(self) -> Path:
        """Of a pipeline trained on shapes: the given one, the model itself, or one trained here."""
        if self.given_shapes is not None:
            return self.given_shapes
        if self.set.name == "shapes":
            return self.model
        folder, sizes = self.trained_shapes, self.sizes
        if not (folder / "config.json").exists():
            run_demo(
                DemoConfig(
                    data="shapes",
                    out=folder.parent,
                    minutes=None if sizes.shapes_preset == "smoke" else sizes.shapes_minutes,
                    device=self.device.type,
                    seed=self.seed,
                    preset=sizes.shapes_preset,
                ),
                least=LEAST_SHARE,
            )
        return folder

    @cached_property
    def shapes(self) -> Pipeline:
        """The pipeline of `shapes_folder`."""
        if self.shapes_folder == self.model:
            return self.pipeline
        return self.load("shapes", self.shapes_folder)

    def shapes_set(self) -> DataSet:
        """The set shapes, at the size of the pipeline `shapes`."""
        return open_set(OWNER, self.shapes_folder, self.shapes, "shapes", self.seed)[0]

    def command(self, *words: str) -> str:
        """A command line to show: `dalle` and the words, quoted where it is needed."""
        return shlex.join(["dalle", *words])

    def own_command(self, key: str) -> str:
        """The command line that makes one figure of this run alone."""
        words = ["reproduce", f"--{self.sizes.name}", "--model", str(self.model)]
        for option in ("data", "shapes", "other"):
            value = getattr(self, f"given_{option}")
            words += [] if value is None else [f"--{option}", str(value)]
        words += ["--seed", str(self.seed)] if self.seed else []
        return self.command(*words, "--out", str(self.out), "--only", key)

    def save(self, name: str, picture: Image.Image | bytes) -> str:
        """Writes a picture beside index.html and returns its name.

        Args:
            name: of the file, .png.
            picture: of PIL, or the bytes of a PNG file.
        """
        if isinstance(picture, bytes):
            save_bytes(self.out / name, picture)
        else:
            save_png(self.out / name, picture)
        return name

    def plot(self, name: str, figure: Any) -> str:
        """Writes a diagram of matplotlib, closes it, and returns the file's name."""
        return self.save(name, figure_png(OWNER, figure))

    def sheet(
        self,
        name: str,
        images: torch.Tensor,
        captions: Sequence[str],
        labels: Sequence[Sequence[str]],
    ) -> dict[str, Any]:
        """Writes rows of pictures as one file, of which the page shows each at one size.

        Args:
            name: of the file, .png.
            images: (B, N, 3, S, S) in [0, 1].
            captions: B, one a row.
            labels: B times N, what stands below each picture.

        Returns:
            An entry of `Figure.sheets`; its "file" belongs into `Figure.pictures` too.
        """
        rows = images.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)  # (3, B S, N S)
        self.save(name, Image.fromarray(to_uint8(rows)))
        return {
            "file": name,
            "columns": images.shape[1],
            "rows": [
                {"caption": caption, "labels": list(below)}
                for caption, below in zip(captions, labels, strict=True)
            ],
        }


def require_shapes(folder: Path, pipeline: Pipeline) -> None:
    """Raises UsageError for a pipeline of another set than shapes, as far as can be seen."""
    name = run_record(folder).get("data") or guess(OWNER, pipeline)
    if name != "shapes":
        raise UsageError(
            f"{OWNER}: shapes must be a pipeline of the set shapes, got one of {name}: {folder}"
        )


def doubling(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return sorted({min(2**k, most) for k in range(most.bit_length() + 1)})


def pipeline_hash(pipeline: Pipeline) -> str:
    """Of the weights of all parts."""
    parts = {"vae": pipeline.vae, "prior": pipeline.prior, "ranker": pipeline.ranker}
    prints = {n: fingerprint(m) for n, m in parts.items() if isinstance(m, torch.nn.Module)}
    return json_sha256({"tokenizer": pipeline.tokenizer.fingerprint(), **prints})[:16]
