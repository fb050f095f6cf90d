"""What `python -m benchmarks.gpu` runs beside the measurements: versions, build, tests, sanitizer.

Nothing here imports torch.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PATHS = [str(ROOT / folder) for folder in (".", "python", "python/buildtools", "benchmarks")]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SMI = ("name", "driver_version", "memory.total", "clocks.max.sm", "power.limit")
OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")
TEST = re.compile(r"tests/\S+::.*?(?= (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b|$| - )")


class Run(NamedTuple):
    """What a command did: exit status (None: stopped at its limit), its lines, seconds."""

    status: int | None
    lines: list[str]
    seconds: float

    @property
    def why(self) -> str:
        """How it ended."""
        return "out of time" if self.status is None else f"exit status {self.status}"


def child_env(**more: str) -> dict[str, str]:
    """For children: our folders on their path, the tools beside this Python too."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return os.environ | {"PYTHONPATH": os.pathsep.join(PATHS), "PATH": path, **more}


def run(
    command: Sequence[str],
    limit: float,
    env: dict[str, str] | None = None,
    *,
    cwd: Path = ROOT,
    on_line: Callable[[str], None] = lambda line: None,
) -> Run:
    """Runs `command`; ends it and its children after `limit` seconds, and keeps what it said."""
    begin = time.monotonic()
    pipe, said = subprocess.PIPE, subprocess.STDOUT
    process = subprocess.Popen(
        command, stdout=pipe, stderr=said, stdin=subprocess.DEVNULL, cwd=cwd,
        env=env or child_env(), text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(max(limit, 0.01), stop)
    timer.start()
    lines = []
    try:
        for line in process.stdout or ():
            lines.append(line.rstrip())
            on_line(line)
        process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:  # Ctrl-C
            stop()
            process.wait()
    return Run(None if stopped.is_set() else process.returncode, lines, time.monotonic() - begin)


def tail(done: Run) -> list[str]:
    """The last lines that say something."""
    return [line for line in done.lines if line.strip()][-8:]


def installed(package: str) -> str | None:
    """The version of a package, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, Any]:
    """Python, torch and its CUDA, and what a build needs, in less than a second.

    Raises:
        SystemExit: a torch that is too old, in one line.
    """
    import torch_dir

    folder, nvcc = torch_dir.find_torch(), torch_dir.find_nvcc()
    torch, cuda = torch_dir.torch_version(folder) if folder else (None, None)
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch, "cuda": cuda}
    for package in ("setuptools", "triton", "flash-attn-4"):
        found[package] = installed(package)
    said = run([nvcc, "--version"], 10).lines if nvcc else []
    found["nvcc"] = next((line.split("release ")[1] for line in said if "release " in line), nvcc)
    return found


def card() -> dict[str, str] | None:
    """What nvidia-smi says of the first card: driver, memory, clock, power limit."""
    try:
        smi = run(["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"], 10)
        return dict(zip(SMI, smi.lines[0].split(", "), strict=True))
    except (OSError, IndexError, ValueError):
        return None


def architecture(capability: Sequence[int]) -> str:
    """What TORCH_CUDA_ARCH_LIST must say for one card: 9.0a has Hopper's own instructions."""
    name = f"{capability[0]}.{capability[1]}"
    return name + "a" if name == "9.0" else name


def build(capability: Sequence[int], limit: float) -> dict[str, Any]:
    """Builds for this card alone and puts the libraries into `dalle_ext/`.

    From a folder without pyproject.toml, so that any setuptools will do.
    """
    wanted = architecture(capability)
    env = child_env(TORCH_CUDA_ARCH_LIST=wanted, DALLE_EXT_CUDA="1")
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, str(ROOT / "setup.py"), "-q", "build_ext", "--inplace"]
        done = run(command, limit, env, cwd=Path(scratch))
        if done.status == 0:
            for path in Path(scratch, "dalle_ext").glob("*.so"):
                shutil.copy2(path, ROOT / "dalle_ext" / path.name)
    found = {"architecture": wanted, "passed": done.status == 0, "seconds": round(done.seconds, 1)}
    return found if done.status == 0 else found | {"why": done.why, "tail": tail(done)}


def outcomes(lines: Sequence[str]) -> dict[str, str]:
    """Test -> PASSED, FAILED, ... from the lines of `pytest -v`, with or without pytest-xdist."""
    found = {}
    for line in lines:
        name, outcome = TEST.search(line), OUTCOME.search(line)
        if name and outcome:
            found[name.group().strip()] = outcome.group()
    return found


def summary_of_tests(done: Run) -> dict[str, Any]:
    """Counts and failures; passed: a test passed, none failed; None where time ran out before."""
    results = outcomes(done.lines)
    counts = Counter(outcome.lower() for outcome in results.values())
    bad = sorted(name for name, outcome in results.items() if outcome in ("FAILED", "ERROR"))
    passed = None if done.status is None and not bad else done.status == 0 and counts["passed"] > 0
    found = {"passed": passed, "counts": dict(counts), "failed": bad}
    found["seconds"] = round(done.seconds, 1)
    if found["passed"]:
        return found
    return found | {"why": "no test ran" if done.status == 0 else done.why, "tail": tail(done)}


def tests(limit: float, on_line: Callable[[str], None]) -> Run:
    """`pytest -m cuda -n 8 -v` on the tests of the ops; without pytest-xdist in one process."""
    spread = ["-n", "8"] if installed("pytest-xdist") else []
    plain = ["-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "--tb=line"]
    command = [sys.executable, "-m", "pytest", "-m", "cuda", *spread, "-v", *plain, "tests/ops"]
    return run(command, limit, child_env(OMP_NUM_THREADS="1"), on_line=on_line)


def find_sanitizer() -> str | None:
    """The path of compute-sanitizer, from PATH or the CUDA toolkit; None where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")


def parse_sanitizer(text: str) -> dict[str, Any]:
    """What compute-sanitizer's summary says.

    Returns:
        errors (hazards of racecheck that are errors) and warnings, and the first report, if any;
        or why: "no summary" where the tool did not come to its end.
    """
    race = re.findall(
        r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)", text
    )
    plain = re.findall(r"ERROR SUMMARY: (\d+) errors?", text)
    if not race and not plain:
        return {"why": "no summary"}
    errors = int(race[-1][0]) if race else int(plain[-1])
    found: dict[str, Any] = {"errors": errors, "warnings": int(race[-1][1]) if race else 0}
    said = [line.strip("= ").strip() for line in text.splitlines() if line.startswith("=====")]
    said = [line for line in said if line and "COMPUTE-SANITIZER" not in line]
    if errors or found["warnings"]:
        found["first"] = said[0]
    lost = [line for line in said if line.startswith("Internal Sanitizer Error")]
    return found | {"why": lost[0]} if lost else found


def sanitize(tool: str, sanitizer: str, command: Sequence[str], limit: float) -> dict[str, Any]:
    """One tool over `sanitizer_cases.py`, watching our kernels only; passed as of the tests.

    torch's caching allocator is off, so that an access beyond a tensor leaves its allocation.
    """
    options = ["--tool", tool, "--kernel-regex", "kns=dalle", "--report-api-errors", "no"]
    env = child_env(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    done = run([sanitizer, *options, *command], limit, env)
    found = parse_sanitizer("\n".join(done.lines)) | {"seconds": round(done.seconds, 1)}
    if done.status != 0:
        found |= {"why": done.why} if done.status is None else {"why": done.why, "tail": tail(done)}
    found["passed"] = "why" not in found and found["errors"] == 0
    if done.status is None and not found.get("errors"):
        found["passed"] = None
    return found
