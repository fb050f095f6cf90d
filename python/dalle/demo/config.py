"""What `dalle demo` takes, and the folder it works in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dalle import __version__
from dalle.errors import UsageError
from dalle.files import read_json, to_json
from dalle.pictures import save_bytes

STAGES = ("data", "tokenizer", "dvae", "ranker", "prior", "samples", "report")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """From a caption to a picture: trains tokenizer, dVAE, ranker and prior, draws, writes a page.

    The same command goes on where it was stopped.

    Args:
        data: "emoji" (real artwork, captions of held-out combinations) or "shapes" (procedural,
            scored by a checker that reads each picture back).
        out: folder for the page, pictures, summary.json and the trained pipeline.
        minutes: scales the number of updates of every training stage by minutes / (the default's
            minutes on two CPU cores); results depend on the updates, not on the clock.
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
            found = read_json(path, UsageError)
            for key, value in identity.items():
                if found.get(key) != value:
                    raise UsageError(
                        f"demo: {key} must be {found.get(key)} as in {self.out}, got {value}; "
                        "choose another --out"
                    )
        else:
            save_bytes(path, to_json({**identity, "dalle_version": __version__}))

    def folder(self, stage: str) -> Path:
        """Where a training stage keeps checkpoints, metrics and pictures."""
        return self.work / stage

    def trained(self, part: str) -> bool:
        """Is a part of the pipeline finished (its config.json is written last)?"""
        name = "tokenizer.json" if part == "tokenizer" else "config.json"
        return (self.pipeline / part / name).exists()

    def timings(self) -> dict[str, dict[str, float]]:
        """Stage -> seconds (wall) and cpu_seconds, over all runs."""
        path = self.work / "timings.json"
        if not path.exists():
            return {}
        found: dict[str, dict[str, float]] = json.loads(path.read_text())
        return found

    def add_time(self, stage: str, seconds: float, cpu_seconds: float) -> None:
        """Adds a session's time to a stage."""
        timings = self.timings()
        entry = timings.setdefault(stage, {"seconds": 0.0, "cpu_seconds": 0.0})
        entry["seconds"] = round(entry["seconds"] + seconds, 2)
        entry["cpu_seconds"] = round(entry["cpu_seconds"] + cpu_seconds, 2)
        save_bytes(self.work / "timings.json", to_json(timings))

    def read_scores(self) -> dict[str, Any]:
        """What scoring has found so far."""
        if not self.scores.exists():
            return {}
        found: dict[str, Any] = read_json(self.scores, UsageError)
        return found

    def add_scores(self, values: dict[str, Any]) -> None:
        """Adds to what scoring has found."""
        save_bytes(self.scores, to_json({**self.read_scores(), **values}))
