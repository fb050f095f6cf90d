"""Two runs never draw into one folder, also where they begin in the same moment."""

from __future__ import annotations

import fcntl
import os

from dalle.commands.drawn import RECORD, output_folder


def test_folders_of_runs_one_after_another(tmp_path, capsys):
    out = tmp_path / "samples"
    assert output_folder("sample", out, False) == out and capsys.readouterr().err == ""
    assert output_folder("sample", out, False) == out  # this process's, and nothing in it yet
    (out / RECORD).write_text("{}")
    assert output_folder("sample", out, False) == tmp_path / "samples-2"
    assert "holds samples of an earlier run; these go to" in capsys.readouterr().err
    assert output_folder("sample", out, True) == out


def test_folders_of_runs_that_begin_together(tmp_path, monkeypatch, capsys):
    out = tmp_path / "samples"
    out.mkdir()
    other = os.open(out, os.O_RDONLY)  # what another process holds
    fcntl.flock(other, fcntl.LOCK_EX)
    assert output_folder("sample", out, False) == tmp_path / "samples-2"
    said = capsys.readouterr().err
    assert "is drawn into by another process; these go to" in said and said.count("\n") == 1
    assert output_folder("sample", out, True) == out  # told to
    os.close(other)  # it has ended, and has left nothing
    assert output_folder("sample", out, False) == out
    monkeypatch.setattr(fcntl, "flock", _unsupported)
    assert output_folder("sample", tmp_path / "new", False) == tmp_path / "new"


def _unsupported(*_):
    raise OSError("no locks")
