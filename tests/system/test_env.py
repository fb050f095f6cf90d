"""`dalle env` reports what is installed, as JSON, also where native libraries are missing."""

from __future__ import annotations

import json

import numpy
import torch

from dalle.cli import main
from dalle.env import environment


def test_report_is_json_with_what_runs_here(capsys):
    assert main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["torch"] == torch.__version__
    assert report["packages"]["numpy"] == numpy.__version__
    assert report["cpu"]["torch_threads"] == torch.get_num_threads()
    assert len(report["cuda"]["devices"]) == torch.cuda.device_count()
    assert {"cpu", "cuda", "machine", "cpu_isa"} <= set(report["dalle_ext"])
    assert set(report["extras"]) == {"demo", "clip"}


def test_missing_things_are_said(monkeypatch, capsys):
    from dalle import env

    monkeypatch.setattr(env, "DEPENDENCIES", ("no-such-distribution",))
    monkeypatch.setattr(env, "EXTRAS", {"clip": ("no_such_module",)})
    assert environment()["packages"] == {"no-such-distribution": None}
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert "no-such-distribution" in out and "missing\n" in out
    assert "missing no_such_module; pip install 'dalle-ext[clip]'" in out


def test_same_report_without_native_objects(monkeypatch, capsys):
    import dalle_ext

    gone = {"cpu": "_C_cpu.so must be built", "cuda": "none", "cpu_isa": None, "host": False}
    monkeypatch.setattr(dalle_ext, "build_info", lambda: gone)
    assert main(["env"]) == 0
    assert "_C_cpu.so must be built" in capsys.readouterr().out
