"""The folder of `dalle train` and `dalle demo`: its files, and the seconds each stage has taken."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle.console import say
from dalle.errors import DataError, UsageError
from dalle.files import json_sha256, read_object, saving, temporary_name, to_json
from dalle.pictures import save_bytes
from dalle.version import __version__

STAGES = ("data", "tokenizer", "dvae", "ranker", "prior", "samples", "report")


class Workspace:
    """A run's folder: where things lie, and the seconds each stage has taken so far.

    Args:
        command: "train" or "demo", begins every line.
        out: the folder.
        options: JSON values by name; a folder with others is refused.
        seed: for everything random.

    Raises:
        UsageError: the folder holds a run of other options, or something of another command.
        DataError: its list of options is damaged.
        EnvironmentProblem: it cannot be written.
    """

    def __init__(self, command: str, out: Path, options: Mapping[str, Any], seed: int) -> None:
        self.command, self.options, self.seed = command, dict(options), seed
        self.out = Path(out)
        self.work = self.out / "work"
        self.pipeline = self.out / "pipeline"
        self.samples = self.work / "samples.safetensors"
        self.scores = self.work / "scores.json"
        self._identity = {**self.options, "seed": seed}
        self._check()
        with saving(command, self.work):
            self.work.mkdir(parents=True, exist_ok=True)

    def _check(self) -> bool:
        """Refuses a folder that is another run's; whether it is this run's already."""
        command, path = self.command, self.work / f"{self.command}.json"
        if not path.exists():
            others = (self.work / "train.json", self.work / "demo.json", self.pipeline)
            for other in others:
                if other.exists():
                    raise UsageError(
                        f"{command}: {self.out} must hold nothing of another run, got "
                        f"{other.relative_to(self.out)}; choose another --out"
                    )
            return False
        saved = self._read(path)
        if saved is None:
            raise DataError(
                f"{command}: {path} must be as dalle {command} wrote it, got other bytes; "
                "choose another --out, or remove it to go on with these options"
            )
        chosen = self.read(self.work / "chosen.json")  # as config.yaml holds it
        changed = [
            key
            for key, value in self._identity.items()
            if saved.get(key) != value and not (saved.get(key) is None and chosen.get(key) == value)
        ]
        if changed and self._begun():
            was, now = (
                "left out" if values.get(changed[0]) is None else values[changed[0]]
                for values in (saved, self._identity)
            )
            raise UsageError(
                f"{command}: {changed[0]} must be {was} as in {self.out}, got {now}; "
                "choose another --out"
            )
        return not changed

    def _begun(self) -> bool:
        """Whether a stage has begun; before that the options may still change."""
        names = ("timings.json", "scores.json", "training.json")
        return self.pipeline.exists() or any((self.work / name).exists() for name in names)

    def claim(self) -> None:
        """Makes the folder this run's, with the lock held.

        Where another call of other options ended before its first stage, what it had chosen and
        measured is forgotten.

        Raises: as the class does.
        """
        if self._check():
            return
        for name in ("sizes.json", "pace.json", "precision.json", "chosen.json"):
            with saving(self.command, self.work / name):
                (self.work / name).unlink(missing_ok=True)
        identity = {**self._identity, "dalle_version": __version__}
        self.write(self.work / f"{self.command}.json", identity)

    def write(self, path: Path, values: dict[str, Any]) -> None:
        """Writes a work file: JSON with the SHA-256 of the rest in it."""
        save_bytes(path, to_json({**values, "sha256": json_sha256(values)}))

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
            with saving(self.command, path):
                path.rename(aside)
            name = self.command
            say(f"{name}: {path} was not as dalle {name} wrote it; set aside as {aside.name}")
        return values or {}

    def _read(self, path: Path) -> dict[str, Any] | None:
        """The values in a work file, or None where they do not match its SHA-256."""
        try:
            values = read_object(path, DataError)
        except DataError:
            return None
        return None if values.pop("sha256", "") != json_sha256(values) else values

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
        """Stage -> seconds (wall) and cpu_seconds over all runs, and whether it is done (1)."""
        return self.read(self.work / "timings.json")

    def add_time(self, stage: str, seconds: float, cpu_seconds: float, *, done: bool) -> None:
        """Adds a run's time to a stage, unless an earlier run has ended it.

        Args:
            stage: which.
            seconds, cpu_seconds: of this run.
            done: whether the stage has come to its end.
        """
        timings = self.timings()
        entry = timings.setdefault(stage, {"seconds": 0.0, "cpu_seconds": 0.0, "done": 0.0})
        if entry["done"]:
            return
        entry["seconds"] = round(entry["seconds"] + seconds, 2)
        entry["cpu_seconds"] = round(entry["cpu_seconds"] + cpu_seconds, 2)
        entry["done"] = float(done)
        self.write(self.work / "timings.json", timings)

    def read_scores(self) -> dict[str, Any]:
        """All scores so far."""
        return self.read(self.scores)

    def add_scores(self, values: dict[str, Any]) -> None:
        """Adds to the scores."""
        self.write(self.scores, {**self.read_scores(), **values})
