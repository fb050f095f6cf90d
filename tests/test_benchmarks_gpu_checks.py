"""Parts of `python -m benchmarks.gpu`: clocks, rows, commands with a limit, parsed output."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import time
import weakref

import pytest
import torch

import bench_sparse_attention as attention
import gpu
import gpu_checks as checks
import harness
import row_text
import sanitizer_cases
from dalle_ext import AttentionPattern

XDIST = """[gw0] [ 12%] PASSED tests/ops/test_a.py::test_b[cuda-x y]
tests/ops/test_a.py::test_running
[gw1] [ 25%] FAILED tests/ops/test_a.py::test_c[cuda]
[gw1] [ 37%] SKIPPED tests/ops/test_a.py::test_d[cuda]
FAILED tests/ops/test_a.py::test_c[cuda] - AssertionError: PASSED is no outcome here
"""
PLAIN = (
    "tests/ops/test_a.py::test_b[cuda] PASSED [ 50%]\ntests/ops/test_a.py::test_e ERROR [ 99%]\n"
)


def test_outcomes_survive_a_time_out():
    run = checks.Run(None, XDIST.splitlines(), 9.0)
    found = checks.summary_of_tests(run)
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert found["failed"] == ["tests/ops/test_a.py::test_c[cuda]"]
    assert (found["passed"], found["why"]) == (False, "out of time")
    stopped = checks.summary_of_tests(checks.Run(None, XDIST.splitlines()[:1], 9.0))
    assert stopped["passed"] is None and stopped["counts"] == {"passed": 1}
    assert gpu.summary(stopped) == "stopped (out of time), 1 passed, 9 s"
    found = checks.summary_of_tests(checks.Run(1, PLAIN.splitlines(), 9.0))
    assert found["counts"] == {"passed": 1, "error": 1} and found["why"] == "exit status 1"
    assert checks.summary_of_tests(checks.Run(0, PLAIN.splitlines()[:1], 9.0))["passed"]
    assert checks.summary_of_tests(checks.Run(0, ["364 skipped"], 9.0))["why"] == "no test ran"


CLEAN = "========= COMPUTE-SANITIZER\n135 cases ran\n========= ERROR SUMMARY: 0 errors\n"
INVALID = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at dalle::kernel+0x100
=========
========= ERROR SUMMARY: 1 error
"""
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at dalle::kernel and Read access
========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)
"""
LOST = """========= COMPUTE-SANITIZER
========= Internal Sanitizer Error: The Sanitizer did not track the launch
========= ERROR SUMMARY: 0 errors
"""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (CLEAN, {"errors": 0, "warnings": 0}),
        (INVALID, {"errors": 1, "warnings": 0, "first": "Invalid __global__ read of size 4 bytes"}),
        (
            RACE,
            {"errors": 2, "warnings": 1, "first": "Error: Race reported between Write access at "
             "dalle::kernel and Read access"},
        ),
        (
            LOST,
            {"errors": 0, "warnings": 0, "why": "Internal Sanitizer Error: The Sanitizer did not "
             "track the launch"},
        ),
        ("Segmentation fault\n", {"why": "no summary"}),
    ],
)  # fmt: skip
def test_parse_sanitizer(text, found):
    assert checks.parse_sanitizer(text) == found


@pytest.mark.parametrize(
    ("script", "passed", "why"),
    [
        (f"echo '{CLEAN}'", True, None),
        (f"echo '{INVALID}'", False, None),
        (f"echo '{CLEAN}'; exit 3", False, "exit status 3"),
        (f"echo '{CLEAN}'; sleep 60 & sleep 60", None, "out of time"),
        ("true", False, "no summary"),
    ],
)
def test_sanitize(tmp_path, monkeypatch, script, passed, why):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    begin = time.monotonic()
    found = checks.sanitize("memcheck", str(checks.find_sanitizer()), ["program"], 0.5)
    assert (found["passed"], found.get("why")) == (passed, why)
    assert time.monotonic() - begin < 10, "its children end with it"


def test_every_line_of_a_command_is_told_and_kept_until_its_limit():
    told = []
    done = checks.run(["sh", "-c", "echo one; echo two; sleep 60"], 0.3, on_line=told.append)
    assert (done.status, done.lines, done.why) == (None, ["one", "two"], "out of time")
    assert [line.strip() for line in told] == ["one", "two"]
    assert checks.run(["sh", "-c", "exit 3"], 5).why == "exit status 3"


def test_versions_without_torch_imported():
    found = checks.versions()
    assert found["torch"] == torch.__version__ and found["cuda"] == torch.version.cuda
    assert {"python", "setuptools", "nvcc"} <= set(found)
    script = "import gpu_checks as c, sys; c.versions(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, env=checks.child_env())


def test_without_git_the_sources_have_a_hash(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = harness.commit()
    assert re.fullmatch("sources [0-9a-f]{12}", found) and checks.card() is None
    (tmp_path / "csrc").mkdir()
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "benchmarks" / "results")
    empty = harness.commit()
    (tmp_path / "csrc" / "a.cu").write_text("x")
    assert len({found, empty, harness.commit()}) == 3


class FakeEvent:
    """A CUDA event that reads a counter; `elapsed_time` is in milliseconds."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now

    def synchronize(self):
        FakeEvent.now += 1000.0

    def elapsed_time(self, end):
        return end.at - self.at


def advance(by):
    FakeEvent.now += by


def test_clock_of_events_leaves_the_flush_out():
    clock = harness.event_clock(lambda: advance(500.0), FakeEvent)
    assert clock(lambda: advance(3.0)) == pytest.approx(3e-3)


class FakeMemory:
    """What `torch.cuda` answers about memory."""

    def __init__(self):
        self.now = self.most = 100

    def synchronize(self):
        pass

    def reset_peak_memory_stats(self):
        self.most = self.now

    def memory_allocated(self):
        return self.now

    def max_memory_allocated(self):
        return self.most

    def allocate(self):
        self.most = max(self.most, self.now + 40)
        self.now += 10


def test_a_row_holds_time_error_memory_and_why_a_rival_is_missing():
    memory = FakeMemory()

    def missing():
        raise RuntimeError("\n no such\nrival")

    def ready(device):
        calls = {"ours": lambda: memory.allocate, "there": lambda: lambda: 0, "gone": missing}
        return harness.Ready(calls, lambda *_: harness.Error(0.5, 1.0), 2.0, "GB/s", bytes=8)

    rivals = {"there": "eager", "gone": "flex"}
    case = harness.Case(
        op="x", what="x forward", ready=ready, rivals=rivals, goals={"there": 2.0}, goal_us=5.0
    )
    timer = harness.Timer("cpu", lambda run: run() or 1e-3, memory, rounds=3, h200=True)
    there, gone = harness.measure(case, timer)
    assert (there["seconds"], there["rate"], there["ratio"], there["goal"]) == (*(1e-3, 2e3), 1, 2)
    assert (there["error"], there["peak_bytes"], there["rival_error"]) == (0.5, 40, 0.5)
    assert gone["rival_not_measured"] == "RuntimeError: no such" and gone["ratio"] is None
    line = row_text.line(there)
    assert "1.00 ms" in line and "error 5.0e-01" in line and "1.00x, goal 2.0x" in line
    assert row_text.line(gone).endswith(
        "gone                     not measured: RuntimeError: no such"
    )
    (alone,) = harness.measure(case, timer, ())
    assert (alone["rival"], alone["ratio"]) == (harness.H200, pytest.approx(5e-3))
    assert harness.reason(ValueError()) == "ValueError: no message"
    assert len(harness.reason(RuntimeError("x" * 999))) == 240


def test_a_rival_that_fails_leaves_nothing_behind():
    """Its frames hold memory; in torch 2.11 a checkpoint in them goes on hooking saved tensors."""
    held = []

    def fails():
        tensor = torch.ones(3)
        held.append(weakref.ref(tensor))
        error = RuntimeError("no such rival")
        error.circle = error  # as a compiler's may: it lives on with its frames
        raise error

    ready = harness.Ready({"rival": lambda: fails}, lambda *_: None, 1.0, "GB/s")
    gc.disable()
    try:
        assert harness.prepare("rival", ready, harness.CPU, {}) is None and held[0]() is None
    finally:
        gc.enable()


def test_column_order_makes_columns_contiguous():
    from torch.nn.attention.flex_attention import create_mask

    pattern = AttentionPattern("column", text_len=5, grid=(4, 3))
    order = attention.column_order(pattern)
    rule = attention.column_block_mask(pattern, "cpu").mask_mod
    mask = create_mask(rule, None, None, pattern.length, pattern.length, "cpu")
    assert torch.equal(mask[0, 0], pattern.mask()[order][:, order])


def test_sanitizer_cases_run():
    assert sanitizer_cases.run("cpu") == 3 * (2 * 5 * (4 * 2 + 6 * 3) + 5 + 5 + 1 + 8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--minutes", "0"], "--minutes must be positive and finite, got 0.0"),
        (["--minutes", "nan"], "--minutes must be positive and finite, got nan"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_arguments(capsys, given, message):
    with pytest.raises(SystemExit) as ended:
        gpu.main(given)
    assert ended.value.code == 2 and capsys.readouterr().err == f"benchmarks.gpu: {message}\n"


def test_floors_are_made_of_what_the_card_reaches():
    rates = {"card copy": 4000.0, "card product float16": 700.0, "card product float32": 50.0}
    row = {"op": "x", "bytes": 4 * 10**8, "flops": 42 * 10**9, "product": "float16"}
    gpu.add_floor(done := {**row, "seconds": 200e-6}, rates)
    assert (done["floor_us"], done["over_floor"]) == (pytest.approx(100), pytest.approx(2.0))
    gpu.add_floor(done := {**row, "product": "float32", "seconds": None}, rates)
    assert done["floor_us"] == pytest.approx(840) and "over_floor" not in done
