"""`dalle reproduce --full`: the code of every figure runs, at the least sizes in place of hours."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from dalle.cli import main
from dalle.reproduce import exchange, sizes
from dalle.reproduce.registry import FIGURES, Entry
from dalle.reproduce.run import NOT_MADE
from support.evaluation import shapes_pipeline, write_pictures
from support.reproducing import TINY, TRAINED, PageParts, two_processes

PAPER = [f"figure_{i}" for i in range(1, 15)] + ["table_1", "table_2"]
SMALL = replace(TINY, name="full", quantizers=TRAINED)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full") / "run" / "pipeline"
    shapes_pipeline().save_pretrained(folder)
    return folder


def run_full(model, out, monkeypatch, *words):
    monkeypatch.setattr(sizes, "FULL", SMALL)
    assert main(["reproduce", "--full", "--model", str(model), "--out", str(out), *words]) == 0
    made = json.loads((out / "figures.json").read_text())
    assert list(made) == list(FIGURES)
    for key, figure in made.items():
        assert not figure["missing"].startswith((NOT_MADE, "Not made yet")), (key, figure)
        assert " --full " in figure["command"] and figure["paper"], key
        assert all((out / name).stat().st_size > 500 for name in figure["pictures"]), key
        assert figure["title"] and figure["section"] and (figure["differs"] or figure["missing"])
        assert figure["ours"] or (figure["pictures"] == [] and figure["missing"]), key
    text, seen = (out / "index.html").read_text(), PageParts()
    seen.feed(text)
    assert seen.ids == list(FIGURES) and set(PAPER) <= set(made)
    assert all("/" not in source and (out / source).is_file() for source in seen.sources)
    assert "http" not in text.replace("http-equiv", "")
    return made


def test_every_figure_of_a_full_run(model, tmp_path, monkeypatch, capsys):
    """Shapes: all parts of all figures, the trainings with two quantizers too."""
    monkeypatch.setattr(exchange, "_run", two_processes)
    made = run_full(model, tmp_path / "out", monkeypatch, "--data", "shapes")
    said = capsys.readouterr()
    assert "reproduce: --full: 19 figures, about " in said.err
    assert "reproduce: 19 figures: " in said.out and "not made" not in said.out
    assert len(made["figure_9"]["pictures"]) == 3 and len(made["figure_7"]["pictures"]) == 2
    assert made["quantizers"]["ours"]["source"] == "trained here"
    for key in ("figure_7", "figure_8"):  # no second pipeline was given: said in plain words
        assert "the same model without its ranker stands in" in made[key]["missing"]
        assert "same model without its ranker" in made[key]["text"]
    monkeypatch.setattr(Entry, "maker", None)  # what is there is not made again
    again = run_full(model, tmp_path / "out", monkeypatch, "--data", "shapes")
    assert again == made and "took" not in capsys.readouterr().err


@pytest.mark.night
def test_two_processes_of_a_full_run(model, tmp_path, monkeypatch):
    made = run_full(model, tmp_path / "out", monkeypatch, "--data", "shapes")
    units = made["figure_5"]["ours"]["shard_elements"]
    assert set(units) == {"embeddings and heads", "layers.0", "layers.1"}


@pytest.mark.night
@pytest.mark.parametrize("ranker", [True, False])
def test_a_full_run_of_a_folder(model, tmp_path, monkeypatch, ranker):
    """Few pictures of one's own: shapes are trained here, a second model is the other one."""
    monkeypatch.setattr(exchange, "_run", two_processes)
    pictures = write_pictures(tmp_path / "pictures", 24, side=24)
    pipeline = shapes_pipeline()
    if not ranker:
        pipeline.ranker = None
    pipeline.save_pretrained(tmp_path / "other")
    words = ("--data", str(pictures), "--other", str(model if not ranker else tmp_path / "other"))
    own = model if ranker else tmp_path / "other"
    made = run_full(own, tmp_path / "out", monkeypatch, *words)
    assert (tmp_path / "out" / "shapes" / "full-0" / "pipeline" / "config.json").is_file()
    assert re.search(r"trained on shapes here in \d+\.\d minutes", made["figure_2"]["text"])
    assert "no second held-out part" in made["figure_9"]["missing"] or not ranker
    assert ("no ranker" in made["figure_9"]["missing"]) != ranker
    assert "--other" in made["figure_8"]["command"]
