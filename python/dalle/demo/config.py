"""Options of `dalle demo`, and the folder it works in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dalle.configs import check_numbers
from dalle.console import say
from dalle.errors import DataError, UsageError
from dalle.files import read_object, saving, temporary_name, to_json
from dalle.pictures import save_bytes
from dalle.version import __version__

STAGES = ("data", "tokenizer", "dvae", "ranker", "prior", "samples", "report")


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
        if self.data not in ("emoji", "shapes"):
            raise UsageError(f"demo: data must be emoji or shapes, got {self.data!r}")
        if self.preset not in ("default", "smoke"):
            raise UsageError(f"demo: preset must be default or smoke, got {self.preset!r}")
        if self.minutes is not None and not 0 < self.minutes < 10_000:
            raise UsageError(f"demo: minutes must be above 0, got {self.minutes}")
        if self.seed < 0:
            raise UsageError(f"demo: seed must be 0 or more, got {self.seed}")


class Workspace:
    """The demo's folder: where things lie, and the seconds each stage has taken so far.

    Raises:
        UsageError: the folder holds a demo of other options.
        EnvironmentProblem: it cannot be written.
    """

    def __init__(self, config: DemoConfig) -> None:
        self.config = config
        self.out = Path(config.out)
        self.work = self.out / "work"
        self.pipeline = self.out / "pipeline"
        self.samples = self.work / "samples.safetensors"
        self.scores = self.work / "scores.json"
        identity = {
            "data": config.data,
            "minutes": config.minutes,
            "seed": config.seed,
            "preset": config.preset,
        }
        path = self.work / "demo.json"
        if path.exists():
            saved = self._read(path)
            if saved is None:
                raise DataError(
                    f"demo: {path} must be as dalle demo wrote it, got other bytes; "
                    "choose another --out, or remove it to go on with these options"
                )
            for key, value in identity.items():
                if saved.get(key) != value:
                    raise UsageError(
                        f"demo: {key} must be {saved.get(key)} as in {self.out}, got {value}; "
                        "choose another --out"
                    )
        else:
            self.write(path, {**identity, "dalle_version": __version__})

    def write(self, path: Path, values: dict[str, Any]) -> None:
        """Writes a work file: JSON with the SHA-256 of the rest in it."""
        save_bytes(path, to_json({**values, "sha256": _digest(values)}))

    def read(self, path: Path) -> dict[str, Any]:
        """What `write` wrote; empty without a file, or where it is damaged, which is reported.

        A damaged file is set aside, so that the demo goes on and writes it again.
        """
        if not path.exists():
            return {}
        values = self._read(path)
        if values is None:
            nonce = temporary_name(path).name.rpartition("-")[2]
            aside = path.with_name(f"damaged-{path.name}-{nonce}")
            with saving("demo", path):
                path.rename(aside)
            say(f"demo: {path} was not as dalle demo wrote it; set aside as {aside.name}")
        return values or {}

    def _read(self, path: Path) -> dict[str, Any] | None:
        """The values in a work file, or None where they do not match its SHA-256."""
        try:
            values = read_object(path, DataError)
        except DataError:
            return None
        return None if values.pop("sha256", "") != _digest(values) else values

    def targets(self) -> list[Path]:
        """The files that the end of a stage writes."""
        parts = {name: "model.safetensors" for name in ("vae", "ranker", "prior")}
        models = [
            self.pipeline / part / name
            for part, data in {"tokenizer": "tokenizer.json", **parts}.items()
            for name in (data, "config.json")
        ]
        reports = [
            self.out / "index.html",
            self.out / "summary.json",
            self.pipeline / "config.json",
        ]
        return [*models, self.pipeline / "ranker" / "tokenizer" / "config.json", *reports]

    def folder(self, stage: str) -> Path:
        """Where a training stage keeps checkpoints, metrics and pictures."""
        return self.work / stage

    def trained(self, part: str) -> bool:
        """Is a part of the pipeline finished (its config.json is written last)?"""
        name = "tokenizer.json" if part == "tokenizer" else "config.json"
        return (self.pipeline / part / name).exists()

    def timings(self) -> dict[str, dict[str, float]]:
        """Stage -> seconds (wall) and cpu_seconds, over all runs."""
        return self.read(self.work / "timings.json")

    def add_time(self, stage: str, seconds: float, cpu_seconds: float) -> None:
        """Adds a session's time to a stage."""
        timings = self.timings()
        entry = timings.setdefault(stage, {"seconds": 0.0, "cpu_seconds": 0.0})
        entry["seconds"] = round(entry["seconds"] + seconds, 2)
        entry["cpu_seconds"] = round(entry["cpu_seconds"] + cpu_seconds, 2)
        self.write(self.work / "timings.json", timings)

    def read_scores(self) -> dict[str, Any]:
        """All scores so far."""
        return self.read(self.scores)

    def add_scores(self, values: dict[str, Any]) -> None:
        """Adds to the scores."""
        self.write(self.scores, {**self.read_scores(), **values})


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(to_json(values)).hexdigest()
