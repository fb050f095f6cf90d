"""Checks our op, times it beside its rivals in one run, and keeps dated records.

Machines are noisy, so the candidates take turns: one round runs each of them once, and the median
over the rounds is compared. A ratio of medians from one run is the figure; absolute times only say
where it was measured. torch is imported where it is used, so that `python -m benchmarks.gpu` can
print versions before that.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from row_text import table

Call = Callable[[], Any]
Clock = Callable[[Call], float]
"""Runs a function of no arguments once and returns the seconds that it took."""
Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
HELD = (  # variables that decide the instruction set
    "DALLE_EXT_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "OMP_NUM_THREADS",
)
ROWS: list[Row] = []  # what this run measured; conftest.py prints and records it
FLUSH_BYTES = 2**31  # read before each call on a GPU, or a sixteenth of its memory
COMPILER = {"backend": "inductor"}  # of `compiled`
H200 = "goal on an H200"  # the rival that is a time


class Error(NamedTuple):
    """How far a result is from the definition, and how far it may be."""

    found: float
    most: float


class Ready(NamedTuple):
    """The inputs of a case, drawn on a device.

    Attributes:
        calls: "ours" and each rival -> what builds (compiles) it and returns the call to time.
        check: that name and the result of its call -> how far it is off; None: not comparable.
        work: units of `unit` (a rate) that a call does; of rivals too, whatever they compute.
        bytes, flops: the least that must move and be multiplied.
        product: the dtype of `bench_card.py` whose product bounds the flops.
    """

    calls: Mapping[str, Callable[[], Call]]
    check: Callable[[str, Any], Error | None]
    work: float
    unit: str
    bytes: int = 0
    flops: int = 0
    product: str = "float16"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison; a bench file's `cases(scale)` gives those of "cpu", "gpu" or "tiny".

    Attributes:
        op: of `dalle_ext`, or what else is measured.
        what: op, pass, shape and dtype, as the table shows it.
        ready: draws the inputs on a device.
        rivals: name, after its library -> when a GPU run comes to it: "eager", "flex" or "rest".
        goals: rival -> the ratio that we mean to reach at least.
        goal_us: microseconds that we mean to take at most, on an H200.
        rounds: see `medians`; on a CPU.
    """

    op: str
    what: str
    ready: Callable[[str], Ready]
    rivals: Mapping[str, str]
    goals: Mapping[str, float] = field(default_factory=dict)
    goal_us: float | None = None
    rounds: int = 7


@dataclass
class Timer:
    """Where and how calls are timed.

    Attributes:
        device: of the tensors.
        clock: what times one call.
        memory: `torch.cuda`, or None where nobody counts memory.
        rounds: of every case, instead of its own.
        budget: seconds for one comparison.
        h200: whether goals in microseconds are for this device.
    """

    device: str
    clock: Clock
    memory: Any = None
    rounds: int | None = None
    budget: float = 20.0
    h200: bool = False


def host_clock(run: Call) -> float:
    """Wall seconds; whoever measures a device has `run` wait for it."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def event_clock(flush: Call, event: Callable[..., Any]) -> Clock:
    """A clock of two events, `event(enable_timing=True)`; `flush` is queued before them."""

    def clock(run: Call) -> float:
        start, end = event(enable_timing=True), event(enable_timing=True)
        flush()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return clock


CPU = Timer("cpu", host_clock)


def gpu_timer() -> Timer:
    """CUDA events on the current device, 25 rounds (3 where 4 s run out).

    Before each call a large buffer is read: no input is left in the L2 cache and no dirty line
    has to leave it, and the host has queued the call before the card comes to it.
    """
    import torch

    total = torch.cuda.get_device_properties().total_memory
    buffer = torch.zeros(min(FLUSH_BYTES, total // 16) // 4, device="cuda")
    clock = event_clock(buffer.sum, torch.cuda.Event)
    h200 = "H200" in torch.cuda.get_device_name()
    return Timer("cuda", clock, torch.cuda, rounds=25, budget=4.0, h200=h200)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` for exactly the shapes that come."""
    import torch

    return torch.compile(function, dynamic=False, **COMPILER)


def medians(
    candidates: Mapping[str, Call],
    *,
    rounds: int = 7,
    budget: float = 20.0,
    clock: Clock = host_clock,
) -> dict[str, float]:
    """Median seconds of each candidate, taken in turns after one unmeasured round.

    Args:
        candidates: name -> function of no arguments.
        rounds: rounds to measure; fewer (at least 3) where `budget` seconds run out.
        budget: seconds for the whole comparison.
        clock: what times one call.
    """
    begin = time.perf_counter()
    for run in candidates.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - begin > budget:
            break
        for name, run in candidates.items():
            times[name].append(clock(run))
    return {name: statistics.median(values) for name, values in times.items()}


def reason(error: BaseException) -> str:
    """An error as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if type(error).__name__ == "OutOfMemoryError":
        return f"skipped, too little memory: {lines[0] if lines else 'allocation refused'}"[:240]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:240]


def peak_bytes(run: Call, memory: Any) -> int:
    """Bytes that `run` allocates at its peak; `memory` is `torch.cuda` or what answers like it."""
    memory.synchronize()
    memory.reset_peak_memory_stats()
    before = memory.memory_allocated()
    kept = run()
    memory.synchronize()
    del kept
    return memory.max_memory_allocated() - before


def prepare(name: str, ready: Ready, timer: Timer, found: Row) -> Call | None:
    """Builds, runs and checks one candidate; None, and `not_measured` in `found`, if it fails.

    A result that is wrong is timed all the same: its row says how far it is off.
    """
    try:
        call = ready.calls[name]()
        result = call()
        if timer.memory is not None:
            timer.memory.synchronize()  # what the call did wrong shows here
        try:
            error = ready.check(name, result)
            if error is not None:
                found["error"], found["error_limit"] = error
        except AssertionError as problem:
            found["wrong"] = reason(problem)
        except Exception as problem:  # of the definition: too little memory for it, say
            found["unchecked"] = reason(problem)
        del result
        if timer.memory is not None:
            found["peak_bytes"] = peak_bytes(call, timer.memory)
    except Exception as problem:  # a rival that is missing or refuses is a result, too
        found["not_measured"] = reason(problem)
    else:
        return call
    gc.collect()  # what failed holds memory, and a checkpoint's hooks on every later graph
    return None


def is_right(found: Row) -> bool:
    """Whether a candidate was measured, and its result held (NaN does not)."""
    held = "error" not in found or found["error"] <= found["error_limit"]
    return held and not {"wrong", "unchecked", "not_measured"} & found.keys()


def assert_right(rows: list[Row]) -> None:
    """Fails, with the table, where ours or a rival was not measured or is too far off."""
    for row in rows:
        theirs = {k.removeprefix("rival_"): v for k, v in row.items() if k.startswith("rival_")}
        assert is_right(row) and is_right(theirs), table(rows)


def measure(case: Case, timer: Timer = CPU, rivals: Iterable[str] | None = None) -> list[Row]:
    """Checks, then times ours and `rivals` (all of the case) in turns.

    Returns:
        A row for each rival; one without a rival where there is none. Keys as `compare` gives
        them, and op, bytes, flops; of ours error, error_limit, peak_bytes, wrong, unchecked,
        not_measured, and the same with rival_ before.
    """
    names = list(case.rivals if rivals is None else rivals)
    found: dict[str, Row] = {name: {} for name in ("ours", *names)}
    try:
        ready = case.ready(timer.device)
    except Exception as problem:
        found["ours"]["not_measured"] = reason(problem)
        ready, calls = Ready({}, lambda *_: None, 0.0, ""), {}
    else:
        calls = {name: prepare(name, ready, timer, found[name]) for name in found}
    given = {name: call for name, call in calls.items() if call is not None}
    options = {"rounds": timer.rounds or case.rounds, "budget": timer.budget}
    try:
        seconds = medians(given, clock=timer.clock, **options)
    except Exception as problem:  # one that ran when it was checked
        seconds = {}
        for name in given:
            found[name]["not_measured"] = reason(problem)
    rows = rows_of(case.what, seconds, names or [None], ready.work, ready.unit, case.goals)
    for row in rows:
        beside = found.get(row["rival"], {})
        row |= {"op": case.op, "bytes": ready.bytes, "flops": ready.flops, **found["ours"]}
        row |= {"product": ready.product} if ready.flops else {}
        row |= {f"rival_{key}": value for key, value in beside.items()}
        if row["rival"] is None and case.goal_us and timer.h200:
            row |= {"rival": H200, "rival_seconds": case.goal_us * 1e-6, "goal": 1.0}
            if row["seconds"]:
                row["ratio"] = row["rival_seconds"] / row["seconds"]
    ROWS.extend(rows)
    return rows


def rows_of(
    what: str,
    seconds: Mapping[str, float],
    rivals: Sequence[str | None],
    work: float,
    unit: str,
    goals: Mapping[str, float] | None,
) -> list[Row]:
    """A row for each of `rivals`, from the median seconds by name."""
    ours = seconds.get("ours")
    rows = []
    for rival in rivals:
        theirs = None if rival is None else seconds.get(rival)
        row: Row = {"what": what, "seconds": ours, "rate": work / ours if ours else None}
        row |= {"unit": unit, "rival": rival, "rival_seconds": theirs}
        row["ratio"] = theirs / ours if theirs and ours else None
        rows.append(row | {"goal": (goals or {}).get(rival or "")})
    return rows


def compare(
    what: str,
    ours: Call,
    rivals: dict[str, Call],
    *,
    work: float,
    unit: str,
    goals: dict[str, float] | None = None,
    rounds: int = 7,
) -> list[Row]:
    """Times `ours`, which the caller has checked, beside each rival on the CPU.

    `what`, `goals` and `rounds` are as in `Case`, `work` and `unit` as in `Ready`.

    Returns:
        A row a rival, or one: what, seconds, rate, unit, rival, rival_seconds, ratio (rival /
        ours), goal.
    """
    seconds = medians({"ours": ours, **rivals}, rounds=rounds)
    rows = rows_of(what, seconds, list(rivals) or [None], work, unit, goals)
    ROWS.extend(rows)
    return rows


def commit() -> str:
    """What git says of this checkout; without git or outside of one a hash of the sources."""
    root = RESULTS.parents[1]
    run = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    found = hashlib.sha256()
    for folder in ("csrc", "dalle_ext", "python", "benchmarks"):
        for path in sorted((root / folder).rglob("*.*")):
            if path.suffix in (".py", ".h", ".hpp", ".cpp", ".cu", ".cuh"):
                found.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return f"sources {found.hexdigest()[:12]}"


COMMIT = functools.cache(commit)  # result files that a run writes make no other commit of it


def machine() -> dict[str, Any]:
    """Processor, threads, versions and commit, as every result file names them."""
    import torch

    import dalle_ext

    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": date.today().isoformat(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "commit": COMMIT(),
        "build": dalle_ext.build_info(),
    }


def write(path: Path, whole: Row) -> None:
    """Writes JSON with `rows` last; a cut short run and a full disk leave the file as it was.

    Raises:
        OSError: it cannot be written.
    """
    head = json.dumps({key: value for key, value in whole.items() if key != "rows"}, indent=1)
    rows = ",\n".join(map(json.dumps, whole["rows"]))  # a line each
    scratch = path.with_suffix(".tmp")
    try:
        scratch.write_text(f'{head.removesuffix("}").rstrip()},\n "rows": [\n{rows}\n]}}\n')
        scratch.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise


def record(name: str, rows: list[Row], **more: Any) -> Path:
    """Writes machine, `more` and the rows to `results/<date>_<name>.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{date.today().isoformat()}_{name}.json"
    write(path, {"machine": machine(), **more, "rows": rows})
    return path
