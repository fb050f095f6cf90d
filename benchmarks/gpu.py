"""Measures on a machine with an NVIDIA GPU: `python -m benchmarks.gpu [--minutes 4] [--out DIR]`.

Cases and goals are those of `bench_*.py`, rows those of `harness.py`. Most wanted first: ours in
every case, its eager rivals, `pytest -m cuda`, FlexAttention, compute-sanitizer, what else must be
compiled. The result file is written after every step, so a run that is cut short leaves what it
has. A process of its own measures: a kernel that hangs or crashes loses one step.

    --carried    take the libraries in dalle_ext/ if they load and run on this card, else build
    --dry-run    every case at tiny sizes on the CPU, in this process; a file only with --out

Exit codes: 0, 1 something failed or was wrong, 2 usage, 4 no GPU, 6 interrupted.
"""

from __future__ import annotations

import argparse
import math
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_checks as checks  # noqa: E402

sys.path[:0] = checks.PATHS  # so that it runs from any folder, without PYTHONPATH
import harness  # noqa: E402
import row_text  # noqa: E402
from gpu_worker import Bench, Worker  # noqa: E402

if TYPE_CHECKING:
    from harness import Row

OURS, EAGER, FLEX, REST = "ours", "eager", "flex", "rest"
GUESS = {OURS: 2.0, EAGER: 4.0, FLEX: 40.0, REST: 25.0}  # seconds, before one of its kind was seen
LIMIT = {OURS: 90.0, EAGER: 90.0, FLEX: 300.0, REST: 240.0}  # seconds after which a step hangs
START = 240.0  # seconds that a measuring process may take to import torch and find the card
RESERVE = 3.0  # seconds kept back for the result file
LEAST = (8, 0)  # compute capability
OUT_OF_TIME = "out of time"
NEEDED = "a CUDA device must be there"
WRITABLE = "--out must be a folder that can be written"


class Problem(Exception):
    """What ends the run, in one line, with its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Session:
    """One run: the time, the rows so far, the file that holds them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.begin, self.options, self.dry = time.monotonic(), options, bool(options.dry_run)
        self.rows: dict[tuple[int, str | None], Row] = {}
        self.result: dict[str, Any] = {"versions": checks.versions()}
        self.path: Path | None = None
        self.unwritten: str | None = None
        self.spent: dict[Any, list[float]] = {}
        self.bench: Bench | Worker | None = None
        self.hello: dict[str, Any] = {}

    def say(self, text: str) -> None:
        """One line with the time."""
        print(f"[{time.monotonic() - self.begin:4.0f} s] {text}", flush=True)

    def left(self) -> float:
        """Seconds that work may still take."""
        end = self.begin + self.options.minutes * 60 - RESERVE
        return max(0.0, end - time.monotonic())

    def name_file(self, card: str) -> None:
        """Where the result goes; refuses a folder that cannot be written before anything runs."""
        slug = re.sub(r"[^a-z0-9]+", "_", card.lower().replace("nvidia", "")).strip("_")
        folder = self.options.out or (None if self.dry else harness.RESULTS)
        if folder is None:
            return
        self.path = folder / f"{date.today().isoformat()}_gpu_{slug}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.write()
        except OSError as error:
            self.path = None
            raise Problem(f"{WRITABLE}, got {folder}: {error.strerror}", 2) from None

    def write(self) -> None:
        """The file as things stand."""
        if self.path is not None:
            more = {"seconds": round(time.monotonic() - self.begin, 1)}
            harness.write(self.path, {**self.result, **more, "rows": list(self.rows.values())})

    def save(self) -> None:
        """`write`, but a disk that is full costs no measurement: the rows are printed anyway."""
        try:
            self.write()
        except OSError as error:
            if self.unwritten is None:
                self.say(f"{WRITABLE}, got {self.path}: {error.strerror}; going on")
            self.unwritten = str(error.strerror)
        else:
            self.unwritten = None

    def start(self) -> Bench | Worker:
        """What measures; starts it if nothing does. Raises RuntimeError as `Worker.answer`."""
        if self.bench is None:
            self.bench = Bench(dry_run=True) if self.dry else Worker()
            self.hello = self.bench.hello(START)
        return self.bench

    def stop(self) -> None:
        """Ends what measures; it starts again when it is asked."""
        if self.bench is not None:
            self.bench.end()
            self.bench = None

    def open(self) -> None:
        """Versions, the card, the libraries, the file."""
        found = self.result["versions"]
        self.say(", ".join(f"{name} {value}" for name, value in found.items()))
        self.result["card"] = checks.card()
        self.say(f"card: {self.result['card']}")
        if found["torch"] is None:
            raise Problem("torch must be installed, got none", 4)
        if self.dry:
            self.say("dry run on the CPU at tiny sizes: nothing below is a result")
        elif found["cuda"] is None:
            raise Problem(f"{NEEDED}, got torch {found['torch']} without CUDA", 4)
        hello = self.look()
        if hello["card"] is None:
            raise Problem(f"{NEEDED}, got none under torch {found['torch']}", 4)
        self.name_file(hello["card"])
        if not self.dry:
            if tuple(hello["capability"]) < LEAST:
                got = f"{checks.architecture(hello['capability'])} ({hello['card']})"
                raise Problem(f"compute capability must be 8.0 or more, got {got}", 4)
            if hello["problem"] or not self.options.carried:
                hello = self.build(hello)
        if hello["problem"]:
            raise Problem(f"the libraries must run, got: {hello['problem']}", 1)
        self.result["machine"], self.plan = hello["machine"], hello["plan"]
        self.save()

    def look(self) -> dict[str, Any]:
        """See `Bench.hello`."""
        try:
            self.start()
        except RuntimeError as error:
            raise Problem(f"the measuring process must start, got: {error}", 1) from None
        return self.hello

    def build(self, hello: dict[str, Any]) -> dict[str, Any]:
        """Builds for the card, since the libraries at hand are unwanted or do not run on it."""
        if self.options.carried:
            self.say(f"--carried: {hello['problem']}; building")
        if self.result["versions"]["nvcc"] is None:
            raise Problem("nvcc must be on PATH or under CUDA_HOME, got none; or bring libraries "
                          "that run on this card, with --carried", 1)  # fmt: skip
        self.stop()
        built = self.result["build"] = checks.build(hello["capability"], self.left())
        self.say(f"build for {built['architecture']}: {built['seconds']:.0f} s")
        if not built["passed"]:
            print("\n".join(built["tail"]), file=sys.stderr)
            raise Problem(f"the build must succeed, got {built['why']}", 1)
        return self.look()

    def steps(self, phase: str) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Case and rivals: what only runs shares a step, what is compiled has its own."""
        for number, (_, _, rivals) in enumerate(self.plan):
            chosen = tuple(name for name, when in rivals.items() if when == phase)
            if phase == OURS:
                yield number, ()
            elif phase == EAGER and chosen:
                yield number, chosen
            elif phase != EAGER:
                yield from ((number, (name,)) for name in chosen)

    def measure(self, phase: str) -> None:
        """Every step of a phase that fits into the time."""
        for number, rivals in self.steps(phase):
            op, what, _ = self.plan[number]
            seen = self.spent.setdefault((op, rivals), [])
            guess = 0.0 if self.dry else GUESS[phase]
            needed = sum(seen) / len(seen) if seen else guess
            if self.left() <= (1.0 if phase == OURS else needed):
                rows = self.unmeasured(what, rivals, OUT_OF_TIME)
            else:
                begin = time.monotonic()
                rows = self.ask(number, rivals, min(LIMIT[phase], self.left()))
                seen.append(time.monotonic() - begin)
            self.keep(number, rows)

    def ask(self, number: int, rivals: Sequence[str], limit: float) -> list[Row]:
        """The rows of a step, or why there are none."""
        try:
            rows, alive = self.start().measure(number, rivals, limit)
        except RuntimeError as error:
            self.stop()
            why = str(error) if self.left() > 0 else OUT_OF_TIME
            return self.unmeasured(self.plan[number][1], rivals, why)
        if not alive:
            self.stop()
        return rows

    @staticmethod
    def unmeasured(what: str, rivals: Sequence[str], why: str) -> list[Row]:
        """Rows that say why."""
        names: Sequence[str | None] = rivals or (None,)
        rows = harness.rows_of(what, {}, names, 0.0, "", None)
        key = "rival_not_measured" if rivals else "not_measured"
        return [row | {key: why} for row in rows]

    def keep(self, number: int, rows: list[Row]) -> None:
        """Adds floors, prints, writes."""
        rates = {row["what"]: row["rate"] for row in self.rows.values() if row.get("op") == "card"}
        for row in rows:
            add_floor(row, rates)
            self.rows[number, None if row["rival"] == harness.H200 else row["rival"]] = row
            if not is_late(row):
                print(row_text.line(row), flush=True)
        self.save()

    def tests(self) -> None:
        """`pytest -m cuda`; what has passed is kept where the time runs out."""
        if self.dry or self.left() < 20:
            self.result["tests"] = {"passed": None, "why": "dry run" if self.dry else OUT_OF_TIME}
            return
        self.stop()  # its memory
        lines: list[str] = []
        saved = time.monotonic()

        def on_line(line: str) -> None:
            nonlocal saved
            lines.append(line)
            if time.monotonic() - saved > 5:
                saved = time.monotonic()
                partial = checks.Run(None, lines, saved - self.begin)
                self.result["tests"] = checks.summary_of_tests(partial)
                self.save()

        done = checks.tests(0.4 * self.left(), on_line)
        self.result["tests"] = found = checks.summary_of_tests(done)
        self.say(f"pytest -m cuda: {summary(found)}")
        for name in found["failed"][:20]:
            print(f"    failed: {name}")
        self.save()

    def sanitize(self) -> None:
        """compute-sanitizer over every kernel at small sizes."""
        sanitizer = None if self.dry else checks.find_sanitizer()
        tools: dict[str, Any] = {}
        self.result["sanitizer"] = tools
        if sanitizer is None:
            tools["why"] = "dry run" if self.dry else "compute-sanitizer: not found"
            return
        self.stop()
        command = [sys.executable, str(Path(__file__).with_name("sanitizer_cases.py")), "cuda"]
        for tool in checks.TOOLS:
            if self.left() < 20:
                tools[tool] = {"passed": None, "why": OUT_OF_TIME}
                continue
            tools[tool] = checks.sanitize(tool, sanitizer, command, 0.2 * self.left())
            self.say(f"compute-sanitizer {tool}: {summary(tools[tool])}")
            self.save()

    def run(self) -> None:
        """Everything, most wanted first."""
        self.open()
        self.measure(OURS)
        self.measure(EAGER)
        self.tests()
        self.measure(FLEX)
        self.sanitize()
        self.measure(REST)

    def close(self) -> int:
        """What was wrong once more, as the end of the output is what is read; the exit code."""
        self.save()
        rows = list(self.rows.values())
        wrong = {row["what"]: row for row in rows if is_wrong(row)}
        for row in list(wrong.values())[:20]:
            print(f"WRONG: {row_text.line(row)}")
        judged = [row for row in rows if row["goal"] is not None and row["ratio"] is not None]
        met, late = sum(row["ratio"] >= row["goal"] for row in judged), sum(map(is_late, rows))
        if not self.dry:
            self.say(f"{met} of {len(judged)} goals met")
        self.say(f"{len(rows)} rows, {late} out of time, {len(wrong)} cases wrong")
        checked = [self.result.get("tests"), *self.result.get("sanitizer", {}).values()]
        failed = [c for c in checked if isinstance(c, dict) and c.get("passed") is False]
        if self.path is not None:
            state = f"not written ({self.unwritten})" if self.unwritten else "written"
            print(f"{state}: {self.path}", flush=True)
        return 1 if wrong or failed or self.unwritten else 0


def is_late(row: Row) -> bool:
    """Whether there was no time for it."""
    return OUT_OF_TIME in (row.get("not_measured"), row.get("rival_not_measured"))


def is_wrong(row: Row) -> bool:
    """Whether ours was off or failed; not where time or the card's memory was too short."""
    why = str(row.get("not_measured", row.get("unchecked")))
    return not why.startswith(("skipped", OUT_OF_TIME)) and not harness.is_right(row)


def add_floor(row: Row, rates: dict[str, float | None]) -> None:
    """floor_us, the least time at what this card was measured to reach, and over_floor."""
    copy = rates.get("card copy")
    product = rates.get(f"card product {row.get('product', 'float16')}")
    floors = [row["bytes"] * 1e-3 / copy] if copy and row.get("bytes") else []
    floors += [row["flops"] * 1e-6 / product] if product and row.get("flops") else []
    if floors and row.get("op") != "card":
        row["floor_us"] = max(floors)
        if row["seconds"]:
            row["over_floor"] = row["seconds"] * 1e6 / row["floor_us"]


def summary(found: dict[str, Any]) -> str:
    """A check's outcome as part of a line."""
    numbers = {**found.get("counts", {})}
    numbers |= {key: found[key] for key in ("errors", "warnings") if key in found}
    text = "".join(f", {count} {name}" for name, count in numbers.items())
    outcome = {True: "passed", False: "failed", None: "stopped"}[found["passed"]]
    why = "" if found["passed"] else f" ({found.get('why', found.get('first'))})"
    return f"{outcome}{why}{text}, {found['seconds']:.0f} s"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Ends with exit code 2."""
        print(f"benchmarks.gpu: {message}", file=sys.stderr)
        raise SystemExit(2)


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="python -m benchmarks.gpu", description="Measures on a GPU.")
    parser.add_argument("--minutes", type=float, default=10.0, help="time for everything")
    parser.add_argument("--out", type=Path, help="folder of the result; benchmarks/results")
    parser.add_argument("--carried", action="store_true", help="libraries at hand if they load")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, no result")
    options = parser.parse_args(given)
    if not 0 < options.minutes < math.inf:
        parser.error(f"--minutes must be positive and finite, got {options.minutes}")
    return options


def main(given: Sequence[str]) -> int:
    """Runs it all; returns the exit code."""
    session = Session(arguments(given))
    try:
        session.run()
        return session.close()
    except KeyboardInterrupt:
        session.say("interrupted; the file holds what was measured")
        session.close()
        return 6
    except Problem as problem:
        session.result["problem"] = str(problem)
        session.save()
        print(f"benchmarks.gpu: {problem}", file=sys.stderr)
        return problem.code
    finally:
        session.stop()


def interrupt(*_: object) -> NoReturn:
    """SIGTERM, which a time limit sends, ends a run like Ctrl-C."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    sys.exit(main(sys.argv[1:]))
