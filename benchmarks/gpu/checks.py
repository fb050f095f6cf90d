"""Before anything is timed: the build, the tests on the GPU, compute-sanitizer on small cases."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck", "synccheck")
NOT_FOUND = "compute-sanitizer: not found"


@dataclass(frozen=True)
class Run:
    """What a command did: exit status (None: stopped at its limit), all it said, seconds."""

    status: int | None
    text: str
    seconds: float

    @property
    def tail(self) -> list[str]:
        """Its last lines."""
        return [line for line in self.text.splitlines() if line.strip()][-8:]


def run(command: Sequence[str], limit: float, env: dict[str, str] | None = None) -> Run:
    """Runs `command` in the root of the checkout; ends it and its children at `limit` seconds."""
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            command,
            stdout=said,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=env,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said.seek(0)
        return Run(status, said.read(), time.monotonic() - begin)


def architecture(capability: tuple[int, int]) -> str:
    """What TORCH_CUDA_ARCH_LIST must say for one card: 9.0a has Hopper's own instructions."""
    name = f"{capability[0]}.{capability[1]}"
    return name + "a" if capability == (9, 0) else name


def build(capability: tuple[int, int], limit: float) -> dict[str, Any]:
    """Installs the checkout in place, CUDA kernels for this card alone unless told otherwise."""
    env = {"TORCH_CUDA_ARCH_LIST": architecture(capability), "DALLE_EXT_CUDA": "1"} | os.environ
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    done = run([*pip, "-e", str(ROOT)], limit, env)
    found = {"architectures": env["TORCH_CUDA_ARCH_LIST"], "seconds": round(done.seconds, 1)}
    if done.status == 0:
        return found | {"passed": True}
    why = "out of time" if done.status is None else f"exit status {done.status}"
    return found | {"passed": False, "why": why, "tail": done.tail}


def parse_pytest(text: str) -> dict[str, int]:
    """Counts of pytest's last line (passed, failed, errors, ...); empty if there is none."""
    lines = [line for line in text.splitlines() if re.search(r"\d+ \w+.* in [\d.]+s", line)]
    found = re.findall(r"(\d+) (passed|failed|skipped|errors?|xfailed)", lines[-1]) if lines else []
    return {"errors" if name == "error" else name: int(count) for count, name in found}


def tests(limit: float) -> dict[str, Any]:
    """`pytest -m cuda` in its own process; passed only if a test ran and none failed."""
    done = run([sys.executable, "-m", "pytest", "-m", "cuda", "--tb=line", "tests"], limit)
    counts = parse_pytest(done.text)
    passed = done.status == 0 and counts.get("passed", 0) > 0
    found: dict[str, Any] = {"passed": passed, "counts": counts, "seconds": round(done.seconds, 1)}
    if passed:
        return found
    why = "out of time" if done.status is None else f"exit status {done.status}"
    why = "no test ran" if done.status == 0 else why
    return found | {"why": why, "tail": done.tail}


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


def sanitize(tool: str, sanitizer: str, command: Sequence[str], limit: float, env: Any) -> Any:
    """One tool over the small cases, watching our kernels only; passed if it ended without errors.

    torch's caching allocator is off, so that an access beyond a tensor leaves its allocation.
    """
    options = ["--tool", tool, "--kernel-regex", "kns=dalle", "--report-api-errors", "no"]
    env = {**env, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = run([sanitizer, *options, *command], limit, env)
    found = parse_sanitizer(done.text) | {"seconds": round(done.seconds, 1)}
    if done.status is None:
        found["why"] = "out of time"
    elif done.status != 0:
        found |= {"why": f"exit status {done.status}", "tail": done.tail}
    found["passed"] = "why" not in found and found["errors"] == 0
    return found
