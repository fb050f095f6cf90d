"""Reports of a run: `metrics.jsonl` always, a progress bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dalle.console import duration, is_main_process, number, say
from dalle.files import parse_json, read_lines, regular_opener, saving, write_atomic

METRICS_FILE = "metrics.jsonl"
MAX_LINE_BYTES = 16 << 20
MAX_FILE_BYTES = 8 << 30


def read_metrics(path: Path, damaged: list[int] | None = None) -> list[dict[str, Any]]:
    """The records in a metrics file, in order; lines that are no record are left out.

    Args:
        path: of the file.
        damaged: the numbers of such lines, from 1, are added here; a crash cuts off the last.

    Raises:
        OSError: no regular file, or it cannot be read.
    """
    records = []
    for line_number, line in enumerate(read_lines(path, MAX_LINE_BYTES, MAX_FILE_BYTES), 1):
        try:
            record: Any = None if line is None else parse_json(line)
        except ValueError:
            record = None
        if record is not None and _is_record(record):
            records.append(record)
        elif damaged is not None:
            damaged.append(line_number)
    return records


def _is_record(value: Any) -> bool:
    """Whether `value` is one that `Metrics` writes: a step, and numbers, nulls or lists of them."""

    def plain(item: Any) -> bool:
        if isinstance(item, list):
            return all(plain(inner) for inner in item)
        if isinstance(item, int):
            return not isinstance(item, bool) and abs(item) < 2**63  # what numpy takes
        return item is None or isinstance(item, float)

    if not isinstance(value, dict) or not all(plain(item) for item in value.values()):
        return False
    step = value.get("step")
    return isinstance(step, int) and 0 <= step < 2**63


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: such a value is written as null."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(_without_nan(record)).encode() + b"\n"


class Metrics:
    """Collects the values of each step and reports their means every interval.

    A record of `metrics.jsonl`: step (updates done), the mean of every value since the last record
    (lists where a task gives tensors of more than one element), val_NAME (scores on the held-out
    part, where there are any), lr (of the optimizer's first group), steps_per_second,
    images_per_second (where a task counts "images"), data_wait (share of the time in which it
    waited for data, where a task gives the seconds), seconds (of this run), eta (seconds left).

    Args:
        folder: where `metrics.jsonl` lies; records of steps after `start` (which a killed run wrote
            after its last checkpoint) are dropped, the rest is continued.
        name: shown in front, e.g. "dvae".
        start: updates already done.
        steps: updates in all.
    """

    def __init__(self, folder: Path, *, name: str, start: int, steps: int) -> None:
        self.path = folder / METRICS_FILE
        self.last: dict[str, Any] = {}
        self._name, self._start, self._steps = name, start, steps
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}
        self._failed = False
        self._begin = self._last_time = time.monotonic()
        self._last_step = start
        self._file: io.FileIO | None = None
        self._opened_id: tuple[int, int] | None = None
        self._partial_line = False  # does the file end in the middle of a record?
        if is_main_process() and self.path.exists():
            damaged: list[int] = []
            with saving(name, self.path):
                records = [r for r in read_metrics(self.path, damaged) if r["step"] <= start]
                write_atomic(
                    self.path, "".join(json.dumps(_without_nan(r)) + "\n" for r in records).encode()
                )
            self.last = records[-1] if records else {}
            if damaged:
                lines = f"line {damaged[0]}" if len(damaged) == 1 else f"{len(damaged)} lines"
                say(f"{name}: {self.path}: left out {lines} that no training wrote whole")
        terminal = False
        with contextlib.suppress(AttributeError, ValueError):  # stderr is None or closed
            terminal = is_main_process() and sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=start, desc=name, disable=not terminal)

    @property
    def seconds(self) -> float:
        """Since the run (not the training as a whole) began."""
        return time.monotonic() - self._begin

    def add(self, values: Mapping[str, float | torch.Tensor]) -> None:
        """Takes the values of one step; "images" is a count, "data_wait" are seconds,
        everything else is averaged."""
        for key, value in values.items():
            array = value.detach().double().cpu() if isinstance(value, torch.Tensor) else value
            self._sums[key] = self._sums.get(key, 0.0) + np.asarray(array, dtype=np.float64)
            self._counts[key] = self._counts.get(key, 0) + 1
        with contextlib.suppress(OSError, ValueError):  # as in `say`
            self._bar.update(1)

    def write(
        self,
        step: int,
        lr: float,
        scores: Mapping[str, float] | None = None,
        *,
        ended: float | None = None,
    ) -> dict[str, Any]:
        """Ends the interval: one record into the file, and a log line where there is no bar.

        Args:
            step: updates done.
            lr: the step size.
            scores: on the held-out part, written as val_NAME.
            ended: when the step ended, of `time.monotonic`, where that is not now.
        """
        now = time.monotonic() if ended is None else ended
        elapsed = max(now - self._last_time, 1e-9)
        record: dict[str, Any] = {"step": step}
        for key, total in self._sums.items():
            if key not in ("images", "data_wait"):
                record[key] = (total / self._counts[key]).tolist()
        record |= {f"val_{name}": float(score) for name, score in (scores or {}).items()}
        record["lr"] = lr
        record["steps_per_second"] = (step - self._last_step) / elapsed
        if "images" in self._sums:
            record["images_per_second"] = float(self._sums["images"]) / elapsed
        if "data_wait" in self._sums:
            record["data_wait"] = float(self._sums["data_wait"]) / elapsed
        record["seconds"] = self.seconds
        record["eta"] = (self._steps - step) * self.seconds / max(step - self._start, 1)
        self._sums, self._counts = {}, {}
        self._last_time, self._last_step = now, step
        self._append(record)
        self._show(record)
        self.last = record
        return record

    def _append(self, record: dict[str, Any]) -> None:
        if not is_main_process():
            return
        try:
            if self._file is not None and self._opened_id != self._path_id():
                self._file.close()  # it was removed, or the folder was
                self._file, self._partial_line = None, False
            if self._file is None:
                self._file = open(self.path, "ab", buffering=0, opener=regular_opener)  # noqa: SIM115
                self._opened_id = self._path_id()
            line = _line(record)
            if self._partial_line:
                line = b"\n" + line
            self._partial_line = self._file.write(line) != len(line)
            if self._partial_line:  # a short write: the next one would raise this
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as problem:
            self._report_once(problem)

    def _path_id(self) -> tuple[int, int] | None:
        """Device and inode of the file at the path; None where there is none."""
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def _report_once(self, problem: OSError) -> None:
        if not self._failed:
            say(f"{self._name}: {self.path} must be writable, got: {problem.strerror}")
        self._failed = True

    def _show(self, record: dict[str, Any]) -> None:
        hidden = {"step", "seconds", "eta", "steps_per_second"}
        scalars = {k: v for k, v in record.items() if not isinstance(v, list)}
        shown = {k: number(v) for k, v in scalars.items() if k not in hidden}
        if not self._bar.disable:
            self._bar.set_postfix(shown, refresh=False)
            return
        text = " ".join(f"{key} {value}" for key, value in shown.items())
        rate, eta = number(record["steps_per_second"]), duration(record["eta"])
        say(f"{self._name} {record['step']}/{self._steps} {text} | {rate} steps/s, ETA {eta}")

    def close(self) -> None:
        """Ends the bar and the file."""
        with contextlib.suppress(OSError, ValueError):
            self._bar.close()
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
