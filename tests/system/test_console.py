"""Console output: no cursor moves, and a stream that fails does not end the work."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from dalle import console
from dalle.cli import main
from dalle.console import MAX_LENGTH, Stream, fitted, guarded_streams, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a red circle", "a red circle"),
        ("\x1b[2J\r\b\x07\x9b", r"\x1b[2J\r\x08\x07\x9b"),
        ("two\nlines\u2028here", r"two\nlines\u2028here"),
        ("caf\udce9", r"caf\udce9"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("élan 圆 👩\u200d🔬 a\u00a0b", "élan 圆 👩\u200d🔬 a\u00a0b"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


def test_a_very_long_text_loses_its_middle():
    shown = printable("a" * 10**6 + "end")
    assert len(shown) < MAX_LENGTH + 10 and shown.startswith("aaa") and shown.endswith("end")


def test_encodings_that_lack_letters():
    assert fitted("╭─ é → \udce9", "ascii") == r"+- \xe9 > \udce9"
    assert fitted("é", "latin-1") == "é" and fitted("\udce9", None) == r"\udce9"


def test_stdout_takes_lines_only_and_stderr_a_progress_bar():
    out, err = io.StringIO(), io.StringIO()
    Stream(out, lines=True).write("a\x1b[A\r\tb\n")
    Stream(err).write("a\x1b[A\r\tb\n")
    assert (out.getvalue(), err.getvalue()) == ("a\\x1b[A\\r\tb\n", "a\x1b[A\r\tb\n")


def test_a_stream_that_fails_is_noted_and_dropped():
    with open("/dev/full", "w") as full:
        stream = Stream(full)
        stream.write("x" * 100_000)
        stream.flush()
        assert "No space" in str(stream.problem)
        stream.write("more")
        stream.drop()  # or closing would fail
    with open(os.devnull, "w") as closed:
        pass
    for inner in (closed, None):
        stream = Stream(inner)
        stream.write("x")
        stream.flush()
        assert not stream.isatty()


def test_streams_are_given_back(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with guarded_streams() as (out, _):
        print("x")
        assert sys.stdout is out and not out.problem
    assert sys.stdout is None


def test_time_left_of_resumed_work_is_that_of_the_rest(monkeypatch, capsys):
    """600 of 1000 were done before; ten more take 20 s, so 390 take 780 s."""
    now = iter([0.0, 1.0, 21.0, 41.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with console.progress_shown("work") as show:
        show(601, 1000)
        show(611, 1000)
        show(621, 1000)
    assert capsys.readouterr().err.splitlines() == [
        "work: 61 % | ETA 12:58", "work: 62 % | ETA 12:38"]  # fmt: skip


def test_help_that_nobody_can_read(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["plan", "--help"]) == 4
    assert "stdout must be writable, got No space" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("redirect", "code", "said"),
    [
        (">&-", 0, ""),
        ("2>&-", 0, "dalle "),
        (">/dev/full", 4, "dalle: stdout must be writable, got No space left on device\n"),
        ("2>/dev/full", 0, "dalle "),
        ("<&- >&- 2>&-", 0, ""),
        ("| true", 0, ""),
    ],
)
def test_closed_and_full_streams_of_a_process(tmp_path, redirect, code, said):
    """Only a process has file descriptors of its own; `--version` needs neither torch nor numpy."""
    line = f"{sys.executable} -m dalle --version {redirect}"
    run = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert run.returncode == code and (run.stdout + run.stderr).startswith(said)
    assert bool(run.stdout + run.stderr) == bool(said)
