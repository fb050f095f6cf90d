"""The command line: quick help without torch, options and config files, exit codes."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dalle
from dalle import cli
from dalle.cli import COMMANDS, load_target, main
from dalle.errors import stopped_with
from support import cli_target
from support.cli_target import TOY, LoopOptions, ToyConfig, line_of


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(COMMANDS, ("toy", "train"), ("support.cli_target:train", "trains a toy"))
    cli_target.SEEN.clear()


@pytest.mark.parametrize(("before", "after"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_sleep_while_they_wait_unless_told_otherwise(monkeypatch, before, after):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if before:
        monkeypatch.setenv("OMP_WAIT_POLICY", before)
    assert main(["--version"]) == 0
    assert os.environ["OMP_WAIT_POLICY"] == after


def test_help_needs_no_torch_and_half_a_second():
    code = (
        "import sys\nfrom dalle.cli import main\nassert main(['--help']) == 0\n"
        "print(sorted({'torch', 'numpy', 'tyro', 'yaml', 'PIL'} & set(sys.modules)))"
    )
    best = 9.0
    for _ in range(3):
        before = os.times()
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        after = os.times()
        user = after.children_user - before.children_user
        best = min(best, user + after.children_system - before.children_system)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("[]\n") and "usage: dalle COMMAND" in run.stdout
    assert best < 0.5  # CPU seconds: the wall clock hangs on the machine's load


def test_import_dalle_needs_no_torch_and_names_are_lazy():
    code = "import sys, dalle; assert 'torch' not in sys.modules; print(dir(dalle))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "DiscreteVAE" in run.stdout
    with pytest.raises(AttributeError, match="module 'dalle' has no attribute 'Dalle'"):
        dalle.Dalle  # noqa: B018


@pytest.mark.parametrize("name", ["DiscreteVAE", "Pipeline", "Prior", "Tokenizer"])
def test_lazy_names_resolve(name):
    assert getattr(dalle, name).__name__ == name


def test_module_and_version():
    run = subprocess.run(
        [sys.executable, "-m", "dalle", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout == f"dalle {dalle.__version__}\n"
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'version = "{dalle.__version__}"' in pyproject


@pytest.mark.parametrize("verb", list(COMMANDS))
def test_every_command_has_a_target_with_a_dataclass(verb, capsys):
    function, config_type = load_target(verb)
    assert callable(function) and dataclasses.is_dataclass(config_type)
    assert config_type.__dataclass_params__.frozen
    with pytest.raises(SystemExit) as stop:
        main([*verb, "--help"])
    assert stop.value.code == 0
    assert f"usage: dalle {' '.join(verb)}" in capsys.readouterr().out


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == main([]) == 0
    out = capsys.readouterr().out
    assert all(f"  {' '.join(verb)} " in out for verb in COMMANDS)
    assert main(["toy"]) == main(["toy", "--help"]) == 0
    out = capsys.readouterr().out
    assert "trains a toy" in out and "\n  env" not in out


def test_options_fill_the_dataclass():
    words = "--batch-size 4 --grid 2 3 --mode column --quick --top 5 --words a b --steps=9"
    assert main([*TOY, *words.split()]) == 0
    assert cli_target.SEEN == [
        ToyConfig(
            loop=LoopOptions(out=Path("x"), steps=9),
            batch_size=4,
            grid=(2, 3),
            mode="column",
            quick=True,
            top=5,
            words=("a", "b"),
        )  # fmt: skip
    ]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["tyo"], r"command must be one of .*toy, .*, got tyo \(did you mean toy\?\)"),
        (["toy", "trian"], r"dalle toy: command must be one of train, got trian \(did you mean"),
        ([*TOY, "--bach-size", "3"], r"--bach-size is not an option \(did you mean --batch-size\?"),
        ([*TOY, "--zzz"], r"--zzz is not an option$"),
        ([*TOY, "--batch-size", "many"], "Error parsing --batch-size: .*'many'"),
        ([*TOY, "--mode", "diagonal"], r"invalid choice 'diagonal' .*'row', 'column'"),
        ([*TOY, "--batch-size"], "batch-size"),
        (["toy", "train"], "--out"),
        ([*TOY, "--batch-size", "0"], "^toy: batch_size must be 1 or more, got 0$"),
        ([*TOY, "--config"], "--config must be followed by a file"),
        ([*TOY, "--config", "no/such.yaml"], "no/such.yaml: must be a readable file"),
        ([*TOY, "stray"], "stray"),
        (["toy", "train", "--out", ""], "toy train: --out must have a value, got an empty one"),
        (["toy", "train", "--out="], "toy train: --out must have a value, got an empty one"),
        ([*TOY, "--words"], "^dalle toy train: --words must have a value, got none$"),
        ([*TOY, "--words", "a", "--words", "--quick"], "--words must have a value, got none$"),
        ([*TOY, "--grid", "--quick"], "^dalle toy train: --grid must have a value, got none$"),
        ([*TOY, "--lr", "nan"], "^toy train: lr must be a finite number, got nan$"),
        ([*TOY, "--lr=-inf"], "^toy train: lr must be a finite number, got -inf$"),
        ([*TOY, "--batch-size", "9" * 30], "^toy train: batch_size must be at most 1048576 in"),
        ([*TOY, "--batch-size", "9" * 5000], "must be an integer of at most 4300 digits$"),
        ([*TOY, "--top", "many"], "--top: must be of its type or None, got 'many'$"),
        ([*TOY, "--top", "x" * 9000], f"--top: must be of its type or None, got '{'x' * 200}'$"),
        ([*TOY, "--batch-size", "x" * 9000], "must be an integer, got 'x{199,200}$"),
        ([*TOY, "--mode", "\x1b[2J"], r"invalid choice '\\x1b\[2J'"),
        ([*TOY, "--words", "a\0b"], "options must hold no NUL character"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(capsys, words, match):
    assert main(words) == 2
    assert re.search(match, line_of(capsys))
    assert cli_target.SEEN == []


@pytest.mark.parametrize(
    ("fail", "code", "match"),
    [
        ("numbers", 5, "toy: loss must be finite, got nan"),
        ("interrupted", 6, "toy: stopped"),
        ("keyboard", 130, "stopped by the keyboard"),
        ("disk", 4, "dalle: out/x: No space left on device"),
        ("file", 3, "dalle: in/x: No such file or directory"),
        ("memory", 4, "out of memory"),
        ("bug", 1, r"a fault of dalle itself .cli.py, line \d+.: 'oops' .--debug"),
    ],
)
def test_errors_are_one_line_and_their_exit_code(capsys, fail, code, match):
    assert main([*TOY, "--fail", fail]) == code
    assert re.search(match, line_of(capsys))


@pytest.mark.parametrize(
    ("error", "match", "code"),
    [
        (ModuleNotFoundError("No module named 'x'", name="x.y"), "package x must load, got: No", 4),
        (ImportError("advice\nOriginal error was: no symbol", name="np"), "got: no symbol;", 4),
        (ImportError("libt.so: failed to map segment from shared object"), "out of memory: ", 4),
        (RuntimeError("f, a.cpp:3, dalle_ext: DALLE_EXT_CPU_ISA must be v2, got z"),
         "^dalle: DALLE_EXT_CPU_ISA must be v2, got z$", 4),
        (OSError(errno.EIO, "Input/output error"), "^dalle: Input/output error$", 4),
        (ValueError(), r"^dalle: a fault of dalle itself: no reason given \(--debug", 1),
    ],
)  # fmt: skip
def test_errors_of_the_surroundings(error, match, code):
    line, found = cli.describe_error(error)
    assert re.search(match, line) and found == code


def test_a_folder_that_was_removed(tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(TOY) == 4 and main(["--version"]) == 0
    assert "the folder you are in must be there" in capsys.readouterr().err


def test_debug_shows_the_traceback(capsys):
    assert main([*TOY, "--fail", "bug", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_closed_pipe_is_quiet():
    code = f"{sys.executable} -m dalle --help | true"
    run = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert run.stderr == ""


def test_a_command_that_was_stopped_may_say_how_to_go_on():
    with pytest.raises(KeyboardInterrupt) as stopped, stopped_with("toy: the same goes on"):
        raise KeyboardInterrupt
    assert cli.describe_error(stopped.value) == ("toy: the same goes on", 130)


def test_describe_error_never_has_two_lines():
    line, code = cli.describe_error(RuntimeError("\nfirst\nsecond"))
    assert code == 1 and "second" not in line and "first" in line
