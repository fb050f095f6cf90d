"""Arguments, phases in their order, exit codes: 0, 1 failed, 2 usage, 4 no GPU, 6 interrupted."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from gpu import checks, report
from gpu.budget import Budget
from gpu.cases import Case, all_cases
from gpu.supervise import OUT_OF_TIME, Worker, child_env, measure, unmeasured

SHARES = {"build": 0.5, "tests": 0.3, "sanitizer": 0.12}  # of the time left; the last a tool
DRY = {"passed": None, "why": "dry run"}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Ends with exit code 2."""
        print(f"benchmarks.gpu: {message}", file=sys.stderr)
        raise SystemExit(2)


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="python -m benchmarks.gpu", description="Builds, checks, measures.")
    parser.add_argument("--minutes", type=float, default=10.0, help="time for everything")
    parser.add_argument("--no-build", action="store_true", help="measure what is installed")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="tiny sizes on the CPU, no checks, no file, no result",
    )
    options = parser.parse_args(given)
    if not 0 < options.minutes < float("inf"):
        parser.error(f"--minutes must be positive and finite, got {options.minutes}")
    return options


def no_gpu() -> str | None:
    """Why nothing can be measured here, in one line; None where there is a GPU."""
    if torch.version.cuda is None:
        return f"a CUDA device must be there, got torch {torch.__version__} without CUDA"
    if not torch.cuda.is_available():
        return f"a CUDA device must be there, got none under torch {torch.__version__}"
    return None


def driver() -> str:
    """What nvidia-smi says of driver, clocks and power limit."""
    fields = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError as error:
        return f"nvidia-smi: {error.strerror}"
    return f"{fields}: {said.strip()}"


class Session:
    """One run: the result so far, the lines that are printed, the file that is written."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.dry = bool(options.dry_run)
        self.budget = Budget(options.minutes * 60)
        self.cases = all_cases(dry_run=self.dry)
        self.card = "" if self.dry else torch.cuda.get_device_name()
        self.rows: dict[int, list[dict[str, Any]]] = {
            number: unmeasured(case, "not reached") for number, case in enumerate(self.cases)
        }
        self.result: dict[str, Any] = {"build": DRY, "checks": DRY, "sanitizer": DRY}
        self.result["driver"] = None if self.dry else driver()

    def say(self, line: str) -> None:
        """One line with the time."""
        print(f"[{self.budget.elapsed():4.0f} s] {line}", flush=True)

    def save(self) -> None:
        """Writes the file as it stands, so that a run that is cut short leaves what it has."""
        if self.dry:
            return
        import harness  # loads dalle_ext, which must be built by then
        from gpu.bench import HOW

        more = {**self.result, "how": HOW, "seconds": round(self.budget.elapsed(), 1)}
        self.path = harness.record(f"gpu_{report.slug(self.card)}", self.all_rows(), **more)

    def all_rows(self) -> list[dict[str, Any]]:
        """The rows of every case, in the order of the cases."""
        return [row for rows in self.rows.values() for row in rows]

    def check(self, *, build: bool) -> None:
        """Build, tests, compute-sanitizer."""
        left = self.budget.remaining
        if build:
            capability = torch.cuda.get_device_capability()
            self.result["build"] = checks.build(capability, SHARES["build"] * left())
        else:
            self.result["build"] = {"passed": None, "why": "--no-build"}
        self.say(f"build: {summary(self.result['build'])}")
        if self.result["build"]["passed"] is False:
            return
        self.result["checks"] = checks.tests(SHARES["tests"] * left())
        self.say(f"pytest -m cuda: {summary(self.result['checks'])}")
        sanitizer = checks.find_sanitizer()
        if sanitizer is None:
            self.result["sanitizer"] = {"why": checks.NOT_FOUND}
            self.say(checks.NOT_FOUND)
            return
        command = [sys.executable, "-m", "gpu.small_cases", "cuda"]
        self.result["sanitizer"] = {"tools": {}}
        for tool in checks.TOOLS:
            limit, env = SHARES["sanitizer"] * left(), child_env(sys.path)
            found = checks.sanitize(tool, sanitizer, command, limit, env)
            self.result["sanitizer"]["tools"][tool] = found
            self.say(f"compute-sanitizer {tool}: {summary(found)}")

    def measure(self) -> None:
        """Every case in a worker process, most wanted first."""
        command = [sys.executable, "-m", "gpu.worker", *(["--dry-run"] if self.dry else [])]
        env = child_env(sys.path)
        measure(self.cases, lambda: Worker(command, env), self.budget, self.on_case)

    def on_case(self, number: int, case: Case, rows: list[dict[str, Any]]) -> None:
        """Keeps and prints what a case gave."""
        rates = report.rates_of(rows if case.op == "card" else self.rows[0])
        self.rows[number] = [report.finish(case, row, rates, self.card) for row in rows]
        for row in self.rows[number]:
            for line in report.lines_of(row):
                print(line, flush=True)
        rest = self.cases[number + 1 :]
        if not all(row.get("not_measured") == OUT_OF_TIME for row in rows):
            togo = self.budget.to_go(rest)
            self.say(f"{number + 1} of {len(self.cases)} cases, about {togo:.0f} s to go")
        self.save()


def summary(found: dict[str, Any]) -> str:
    """A phase's outcome as part of a line."""
    if found["passed"] is None:
        return f"left out ({found['why']})"
    numbers = {**found.get("counts", {})}
    numbers |= {key: found[key] for key in ("errors", "warnings") if key in found}
    text = ", ".join(f"{count} {name}" for name, count in numbers.items())
    outcome = "passed" if found["passed"] else f"failed ({found.get('why', found.get('first'))})"
    return f"{outcome}{', ' if text else ''}{text}, {found['seconds']:.0f} s"


def main(given: Sequence[str]) -> int:
    """Runs the phases; returns the exit code."""
    options = arguments(given)
    problem = None if options.dry_run else no_gpu()
    if problem is not None:
        print(f"benchmarks.gpu: {problem}", file=sys.stderr)
        return 4
    session = Session(options)
    if session.dry:
        session.say("dry run on the CPU with tiny sizes: nothing below is a result, no file")
    else:
        session.check(build=not options.no_build)
        if session.result["build"]["passed"] is False:
            print("\n".join(session.result["build"]["tail"]), file=sys.stderr)
            print("benchmarks.gpu: the build must succeed, got the above", file=sys.stderr)
            return 1
        session.save()
    try:
        session.measure()
    except KeyboardInterrupt:
        session.say("interrupted; a file, if there is one, holds what was measured")
        return 6
    well = report.all_well({**session.result, "rows": session.all_rows()})
    session.say("done" if well else "done; something failed, see above")
    if not session.dry:
        print(f"written: {session.path}")
    return 0 if well else 1
