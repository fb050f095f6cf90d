"""`python -m benchmarks.gpu` and the programs it runs: tools, worker, a dry run, a whole run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import harness
from gpu import checks, run
from gpu.budget import Budget
from gpu.cases import all_cases
from gpu.supervise import OUT_OF_TIME, Worker, measure

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("....\n12 passed, 3 skipped in 4.78s\n", {"passed": 12, "skipped": 3}),
        (
            "FAILED a - 7 passed\n1 failed, 344 passed, 2 errors in 403.91s (0:06:43)\n",
            {"failed": 1, "passed": 344, "errors": 2},
        ),
        ("1 error in 0.10s\n", {"errors": 1}),
        ("Killed\n", {}),
    ],
)
def test_parse_pytest(text, counts):
    assert checks.parse_pytest(text) == counts


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
        (
            INVALID,
            {"errors": 1, "warnings": 0, "first": "Invalid __global__ read of size 4 bytes"},
        ),
        (
            RACE,
            {
                **{"errors": 2, "warnings": 1},
                "first": "Error: Race reported between Write access at dalle::kernel and "
                "Read access",
            },
        ),
        (
            LOST,
            {
                **{"errors": 0, "warnings": 0},
                "why": "Internal Sanitizer Error: The Sanitizer did not track the launch",
            },
        ),
        ("Segmentation fault\n", {"why": "no summary"}),
    ],
)
def test_parse_sanitizer(text, found):
    assert checks.parse_sanitizer(text) == found


@pytest.mark.parametrize(
    ("script", "passed", "why"),
    [
        (f"echo '{CLEAN}'", True, None),
        (f"echo '{INVALID}'", False, None),
        (f"echo '{CLEAN}'; exit 3", False, "exit status 3"),
        (f"echo '{CLEAN}'; sleep 60", False, "out of time"),
        ("true", False, "no summary"),
    ],
)
def test_sanitize(tmp_path, script, passed, why):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    found = checks.sanitize("memcheck", str(tool), ["program"], 1.0, {})
    assert (found["passed"], found.get("why")) == (passed, why)


def test_the_sanitizer_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert checks.find_sanitizer() is None
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert checks.find_sanitizer() == str(tool)


def test_architecture():
    assert checks.architecture((9, 0)) == "9.0a"
    assert checks.architecture((8, 6)) == "8.6"


def test_a_command_is_ended_with_its_children():
    begin = time.monotonic()
    done = checks.run(["sh", "-c", "echo said; sleep 60 & sleep 60"], 0.3)
    assert done.status is None and done.tail == ["said"] and time.monotonic() - begin < 10


WORKER = """
import json, os, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    number = int(line)
    row = {"case": CASES[number], "pass": "forward", "number": number}
    print(json.dumps({"row": row}), flush=True)
    if number == 1:
        time.sleep(60)
    if number == 2:
        sys.stderr.write("warned\\nCUDA error: an illegal memory access\\n")
        sys.exit(7)
    print(json.dumps({"end": number}), flush=True)
"""


def test_a_worker_that_hangs_or_dies_loses_one_case(monkeypatch):
    cases = [c for c in all_cases(dry_run=True) if c.op == "sparse_attention"][:5]
    monkeypatch.setattr("gpu.supervise.CASE_LIMIT", 1.0)
    script = f"CASES = {[case.name for case in cases]}\n{WORKER}"
    started, found = [], {}

    def start():
        started.append(Worker([sys.executable, "-c", script]))
        return started[-1]

    def on_case(number, case, rows):
        assert case is cases[number]
        found[number] = [(row["pass"], row.get("not_measured")) for row in rows]
        if number == 3:
            budget.seconds = 0.0

    budget = Budget(600.0)
    measure(cases, start, budget, on_case)
    assert len(started) == 3 and all(w.process.poll() is not None for w in started)
    hung, died = (
        "not done after 1 s",
        "the worker ended with 7: CUDA error: an illegal memory access",
    )
    assert found == {
        0: [("forward", None)],
        1: [("forward", None), ("backward", hung)],
        2: [("forward", None), ("backward", died)],
        3: [("forward", None)],
        4: [("forward", OUT_OF_TIME), ("backward", OUT_OF_TIME)],
    }


def door(*arguments):
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.night
def test_dry_run_walks_through_every_case():
    before = sorted((ROOT / "benchmarks/results").iterdir())
    done = door("--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    for case in all_cases(dry_run=True):
        for which in case.passes:
            assert f"{case.name} {which} " in done.stdout
    assert "nothing below is a result" in done.stdout and "goal" not in done.stdout
    # On the CPU: no cuDNN, no backward of FlexAttention; bitsandbytes is not required; everything
    # else is timed.
    left_out = [line for line in done.stdout.splitlines() if "not measured: " in line]
    known = ("SDPA cuDNN", "does not support backward", "bitsandbytes AdamW8bit")
    assert all(any(why in line for why in known) for line in left_out)
    assert sorted((ROOT / "benchmarks/results").iterdir()) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_line():
    done = door()
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("benchmarks.gpu: a CUDA device must be there, got ")
    assert len(done.stderr.splitlines()) == 1 and torch.__version__ in done.stderr


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
        run.main(given)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"benchmarks.gpu: {message}\n"


@pytest.fixture
def pretended_gpu(monkeypatch, tmp_path):
    """A session that takes the CPU for an H200 and the dry run's worker for a measuring one."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "no_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(run, "all_cases", lambda dry_run: all_cases(dry_run=True)[:2])
    monkeypatch.setattr(checks, "tests", lambda limit: {"passed": True, "seconds": limit})
    monkeypatch.setattr(checks, "find_sanitizer", lambda: None)
    real = run.Worker
    monkeypatch.setattr(run, "Worker", lambda command, env: real([*command, "--dry-run"], env))
    return tmp_path


def test_a_whole_run_writes_one_file(pretended_gpu, capsys):
    assert run.main(["--no-build"]) == 0
    out = capsys.readouterr().out
    (path,) = pretended_gpu.iterdir()
    assert path.name.endswith("_gpu_h200.json") and f"written: {path}" in out
    result = json.loads(path.read_text())
    assert result["build"] == {"passed": None, "why": "--no-build"}
    assert result["checks"]["passed"] and 0 < result["checks"]["seconds"] < 0.3 * 600
    assert result["sanitizer"] == {"why": "compute-sanitizer: not found"}
    assert "compute-sanitizer: not found" in out and "to go" in out
    assert {"date", "commit", "build"} <= set(result["machine"]) and "nvidia-smi" in result[
        "driver"
    ]
    names = [(row["case"], row["pass"]) for row in result["rows"]]
    assert names == [(c.name, which) for c in run.all_cases(dry_run=False) for which in c.passes]
    forward = result["rows"][3]
    assert set(forward["floor"]) == {"bytes_us", "flops_us", "ours_over_floor"}
    assert forward["ours"]["seconds"] > 0 and "ratio" in forward["rivals"]["SDPA, mask"]


def test_what_does_not_fit_is_in_the_file(pretended_gpu):
    assert run.main(["--no-build", "--minutes", "0.1"]) == 0
    (path,) = pretended_gpu.iterdir()
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 5 and {row["not_measured"] for row in rows} == {OUT_OF_TIME}


def test_a_failed_test_fails_the_run(pretended_gpu, monkeypatch):
    failed = {"passed": False, "why": "exit status 1", "seconds": 1.0, "counts": {"failed": 2}}
    monkeypatch.setattr(checks, "tests", lambda limit: failed)
    assert run.main(["--no-build", "--minutes", "0.1"]) == 1
    (path,) = pretended_gpu.iterdir()
    assert json.loads(path.read_text())["checks"] == failed


def test_each_sanitizer_is_in_the_file(pretended_gpu, monkeypatch, tmp_path_factory):
    tool = tmp_path_factory.mktemp("tool") / "compute-sanitizer"
    race = "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)"
    plain = "========= ERROR SUMMARY: 0 errors"
    tool.write_text(f'#!/bin/sh\n[ "$2" = racecheck ] && echo "{race}" || echo "{plain}"\n')
    tool.chmod(0o755)
    monkeypatch.setattr(checks, "find_sanitizer", lambda: str(tool))
    assert run.main(["--no-build", "--minutes", "0.3"]) == 1
    (path,) = pretended_gpu.iterdir()
    tools = json.loads(path.read_text())["sanitizer"]["tools"]
    assert {name: found["passed"] for name, found in tools.items()} == {
        **{"memcheck": True, "racecheck": False, "synccheck": True}
    }


def test_a_failed_build_writes_nothing(pretended_gpu, monkeypatch, capsys):
    broken = checks.Run(1, "compiling\nerror: no such file\n", 1.0)
    monkeypatch.setattr(checks, "run", lambda command, limit, env: broken)
    assert run.main([]) == 1
    said = capsys.readouterr()
    assert "build: failed (exit status 1)" in said.out
    assert said.err.splitlines()[-2:] == [
        "error: no such file",
        "benchmarks.gpu: the build must succeed, got the above",
    ]
    assert list(pretended_gpu.iterdir()) == []


def test_the_build_is_for_the_card_at_hand(monkeypatch):
    seen = {}

    def build(command, limit, env):
        seen.update(command=command, limit=limit, env=env)
        return checks.Run(0, "", 1.0)

    monkeypatch.setattr(checks, "run", build)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert checks.build((9, 0), 7.0)["architectures"] == "9.0a"
    assert (seen["env"]["DALLE_EXT_CUDA"], seen["limit"]) == ("1", 7.0)
    assert seen["command"][-4:-1] == ["--no-build-isolation", "--no-deps", "-e"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a")
    assert checks.build((9, 0), 7.0)["architectures"] == "8.0;9.0a"


@pytest.mark.parametrize(
    ("done", "passed", "why"),
    [
        (checks.Run(0, "9 passed, 1 skipped in 1.00s", 1.0), True, None),
        (checks.Run(1, "1 failed, 8 passed in 1.00s", 1.0), False, "exit status 1"),
        (checks.Run(0, "364 skipped in 7.54s", 1.0), False, "no test ran"),
        (checks.Run(None, "....", 1.0), False, "out of time"),
    ],
)
def test_outcome_of_the_tests(monkeypatch, done, passed, why):
    monkeypatch.setattr(checks, "run", lambda command, limit: done)
    found = checks.tests(5.0)
    assert (found["passed"], found.get("why")) == (passed, why)


def test_small_cases_run():
    from gpu import small_cases

    assert small_cases.run("cpu") == 3 * (4 * 2 * 5 + 5 + 5 + 1 + 8)
