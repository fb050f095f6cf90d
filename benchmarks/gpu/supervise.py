"""Asks a worker process for case after case. One that hangs or dies loses its case, no more."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from gpu.budget import Budget
from gpu.cases import Case

CASE_LIMIT = 90.0  # seconds after which a case counts as hung
OUT_OF_TIME = "out of time"
Row = dict[str, Any]


def unmeasured(case: Case, why: str, done: Sequence[Row] = ()) -> list[Row]:
    """A row that says why for each pass of `case` that has none in `done`."""
    known = {row["pass"] for row in done}
    rows = [{"case": case.name, "pass": which, "not_measured": why} for which in case.passes]
    return [row for row in rows if row["pass"] not in known]


class Worker:
    """One worker process; it starts with the first case it is asked for."""

    def __init__(self, command: Sequence[str], env: dict[str, str] | None = None) -> None:
        self.said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=self.said,
            text=True,
            env=env,
            start_new_session=True,
        )
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stdout or ():
            self.answers.put(line)
        self.answers.put("")  # the end

    def ask(self, number: int, limit: float, on_row: Callable[[Row], None]) -> str | None:
        """Has case `number` measured within `limit` seconds.

        Returns:
            None, or in one line why the case did not end; the worker is then of no more use.
        """
        try:
            print(number, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return self._last_words()
        until = time.monotonic() + limit
        while True:
            try:
                line = self.answers.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return f"not done after {limit:.0f} s"
            if not line.endswith("\n"):  # the end, or half an answer before it
                return self._last_words()
            answer = json.loads(line)
            if "row" in answer:
                on_row(answer["row"])
            elif "end" in answer:
                return None

    def _last_words(self) -> str:
        code = self.process.wait()
        self.said.seek(0)
        lines = [line.strip() for line in self.said.read().splitlines() if line.strip()]
        return f"the worker ended with {code}: {lines[-1] if lines else 'no word'}"[:240]

    def end(self) -> None:
        """Ends the process and its children (compilers), whatever they do."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.said.close()


def measure(
    cases: Sequence[Case],
    start: Callable[[], Worker],
    budget: Budget,
    on_case: Callable[[int, Case, list[Row]], None],
) -> None:
    """Measures `cases` in order while time lasts; `on_case` gets the rows of each, or why not."""
    worker: Worker | None = None
    try:
        for number, case in enumerate(cases):
            if not budget.fits(case):
                on_case(number, case, unmeasured(case, OUT_OF_TIME))
                continue
            rows: list[Row] = []
            begin = budget.elapsed()
            worker = worker or start()
            limit = min(CASE_LIMIT, budget.remaining())
            problem = worker.ask(number, limit, rows.append)
            budget.took(case, budget.elapsed() - begin)
            if problem is not None:
                why = problem if budget.remaining() > 0 else OUT_OF_TIME
                rows += unmeasured(case, why, rows)
                worker.end()
                worker = None
            on_case(number, case, rows)
    finally:
        if worker is not None:
            worker.end()


def child_env(path: Sequence[str]) -> dict[str, str]:
    """The environment of a child that imports what this process imports from `path`."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in path)}
