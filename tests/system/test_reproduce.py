"""`dalle reproduce`: the whole page from a small pipeline, resume, and what does not fit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from dalle.cli import main
from dalle.data.shapes import parse
from dalle.errors import DataError, Interrupted
from dalle.reproduce import pace, run
from dalle.reproduce.context import Context
from dalle.reproduce.figure import Figure
from dalle.reproduce.registry import FIGURES, Entry
from dalle.reproduce.sets import guess
from dalle.reproduce.sizes import FULL, QUICK
from support.evaluation import refused, shapes_pipeline, write_pictures
from support.reproducing import TINY, PageParts


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce") / "pipeline"
    shapes_pipeline().save_pretrained(folder)
    return folder


def start(model, out):
    out.mkdir(exist_ok=True)
    return Context(model, out, sizes=TINY, device=torch.device("cpu"), data="shapes")


def test_what_could_not_be_made_says_so_and_is_tried_again(model, tmp_path, monkeypatch):
    def refuse(_):
        raise DataError("reproduce: not here")

    makers = Entry.maker
    monkeypatch.setattr(
        Entry, "maker", lambda self: refuse if "scores" in self.place else makers(self)
    )
    some = ["figure_1", "figure_9", "figure_11"]
    made = run.reproduce(start(model, tmp_path / "out"), some)
    assert made["figure_9"]["missing"] == "Not made: reproduce: not here"
    assert made["figure_9"]["command"] and made["figure_9"]["title"]
    assert made["figure_11"]["ours"]["same"] is True
    assert json.loads((tmp_path / "out" / "figures.json").read_text()) == made
    # An interrupted run, or one of other figures, takes what is there.
    monkeypatch.setattr(Entry, "maker", None)
    with pytest.raises(TypeError):
        run.reproduce(start(model, tmp_path / "out"), some)
    again = run.reproduce(start(model, tmp_path / "out"), ["figure_1"])
    assert again["figure_1"] == made["figure_1"]


def test_a_figure_that_memory_is_too_small_for_leaves_the_others(model, tmp_path, monkeypatch):
    def refuse(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has")

    makers = Entry.maker
    monkeypatch.setattr(
        Entry, "maker", lambda self: refuse if "figure_6" in self.place else makers(self)
    )
    made = run.reproduce(start(model, tmp_path / "out"), ["figure_6", "figure_11"])
    assert made["figure_6"]["missing"].startswith("Not made: out of memory: the GPU's memory must")
    assert made["figure_11"]["ours"]["same"]


def test_shapes_that_are_trained_here_are_of_this_length_and_seed(model, tmp_path):
    other = write_pictures(tmp_path / "pictures", 24, side=24)
    (tmp_path / "out").mkdir()

    def context(sizes, seed):
        return Context(model, tmp_path / "out", sizes=sizes, seed=seed, data=str(other),
                       device=torch.device("cpu"))  # fmt: skip

    contexts = [context(QUICK, 0), context(FULL, 0), context(QUICK, 1)]
    assert len({each.trained_shapes for each in contexts}) == 3
    contexts[0].trained_shapes.mkdir(parents=True)
    (contexts[0].trained_shapes / "config.json").write_text("{}")
    assert [each.shapes_seconds for each in contexts] == [0, 1800, 120]


def test_ctrl_c_keeps_what_is_made_and_says_so(model, tmp_path, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Entry, "maker", lambda self: stop)
    context = start(model, tmp_path / "out")
    with pytest.raises(Interrupted, match="^reproduce: stopped; 0 of 19 figures are in .*index"):
        run.reproduce(context)
    later = json.loads((context.out / "figures.json").read_text())
    assert list(later) == list(FIGURES)
    assert {figure["missing"] for figure in later.values()} == {"Not made yet."}


def test_a_training_that_is_stopped_keeps_what_is_made(model, tmp_path, monkeypatch):
    def stop(_):
        raise Interrupted("demo: stopped in stage prior")

    monkeypatch.setattr(Entry, "maker", lambda self: stop)
    with pytest.raises(Interrupted, match="^reproduce: stopped; 0 of 19 figures"):
        run.reproduce(start(model, tmp_path / "out"), ["figure_2"])


def test_the_time_that_is_left_follows_the_pace(capsys, model, tmp_path):
    assert run._left([10, 20, 30], 0, 0) == 60
    assert run._left([10, 20, 30], 1, 5) == 25
    assert run._left([1, 20], 1, 60) == 20  # too little has been seen
    run.reproduce(start(model, tmp_path / "out"), ["figure_11"])
    said = capsys.readouterr().err
    assert "1/1 figure_11: Attention masks (about 0:01 to the end)" in said
    assert "--test: 1 figure, about 0:01 on a CPU of two cores, 18 others are there or not" in said


def test_shared_work_is_expected_of_the_first_that_needs_it(model, tmp_path):
    """Before any work, at the sizes of the commands."""
    (tmp_path / "out").mkdir()
    for sizes, least, most in ((QUICK, 60, 600), (FULL, 3600, 12 * 3600)):
        context = Context(model, tmp_path / "out", sizes=sizes, device=torch.device("cpu"),
                          data="shapes")  # fmt: skip
        todo = list(FIGURES)
        seconds = dict(zip(todo, pace.expected(context, todo), strict=True))
        assert least < sum(seconds.values()) < most
        assert seconds["figure_5"] > 20 and seconds["table_1"] == seconds["table_2"] == 1
        assert pace.expected(context, ["table_1"]) == [seconds["figure_5"]]
        assert pace.expected(context, ["table_1"], ["figure_5"]) == [1]
        assert pace.expected(context, ["figure_8"]) == [seconds["figure_7"]]
        said = pace.plan(context, todo, list(seconds.values()))
        assert said.startswith(f"--{sizes.name}: 19 figures, about ") and "figure_5 " in said


def test_the_other_keys_are_there_after_one_figure(model, tmp_path):
    made = run.reproduce(start(model, tmp_path / "out"), ["figure_11"])
    assert list(made) == list(FIGURES)
    assert made["figure_11"]["missing"] == "" and made["table_2"]["missing"] == "Not made yet."


def test_binding_is_shown_on_shapes_whatever_the_set(model, tmp_path):
    """A pipeline of pictures of one's own composes them, and one of shapes binds."""
    pictures = write_pictures(tmp_path / "pictures", 24, side=24)
    (tmp_path / "run" / "work").mkdir(parents=True)
    (tmp_path / "run" / "work" / "demo.json").write_text('{"data": "shapes"}')
    (tmp_path / "run" / "pipeline").symlink_to(model)
    context = Context(model, tmp_path, sizes=TINY, device=torch.device("cpu"), data=str(pictures),
                      shapes=tmp_path / "run" / "pipeline")  # fmt: skip
    assert context.shapes_seconds == 0
    made = run.reproduce(context, ["figure_2"])["figure_2"]
    assert all(parse(caption).relation for caption in made["ours"]["binding_captions"])
    assert {caption.split()[0] for caption in made["ours"]["captions"]} == {"picture"}
    assert made["pictures"] == ["figure_2.png", "figure_2_binding.png"]


def test_the_page_in_the_documentation_is_whole():
    folder = Path(__file__).parents[2] / "docs" / "paper_redrawn"
    made = json.loads((folder / "figures.json").read_text())
    assert list(made) == list(FIGURES)
    text = (folder / "index.html").read_text()
    seen = PageParts()
    seen.feed(text)
    assert seen.ids == list(FIGURES)
    backgrounds = re.findall(r"url\('([^']+)'\)", text)
    named = {name for figure in made.values() for name in figure["pictures"]}
    assert named == {*seen.sources, *backgrounds}
    assert {path.name for path in folder.iterdir()} == {*named, "figures.json", "index.html"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_500_000
    assert not any(figure["missing"].startswith("Not made") for figure in made.values())
    assert "/home" not in text and "/tmp" not in text and "/work" not in text


def test_a_damaged_figure_is_made_again(model, tmp_path):
    context = start(model, tmp_path / "out")
    run.reproduce(context, ["figure_11"])
    (path,) = (context.cache / "figures").rglob("figure_11.json")
    picture = context.out / "figure_11.png"
    kept, before = path.read_text(), picture.read_bytes()
    for damage in ("{", "[]", '{"figure": {"key": 3}, "pictures": {}}', '{"figure": {}}', "{}"):
        path.write_text(damage)
        assert run._kept(context, "figure_11") is None
    path.write_text(kept)
    assert run._kept(context, "figure_11").ours["same"]
    picture.write_bytes(b"of a run with other sizes")
    assert run._kept(context, "figure_11") is None
    picture.unlink()
    run.reproduce(context, ["figure_11"])
    assert picture.read_bytes() == before


def test_numbers_that_json_lacks_are_null():
    figure = Figure(ours={"a": float("nan"), "b": [float("inf"), 1.0], 3: (1, 2)})
    assert figure.to_dict()["ours"] == {"a": None, "b": [None, 1.0], "3": [1, 2]}


def test_the_set_is_known_by_the_tokenizer():
    assert guess("reproduce", shapes_pipeline()) == "shapes"


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("--only figure_99", 2, "only must be of figure_1, "),
        ("--quick --full", 2, "full must be off with quick, got both"),
        ("--seed -1", 2, "seed must be 0 or more, got -1"),
        ("--model nowhere", 3, "model: nowhere/config.json: must be a readable file"),
        ("--model pipe --data nosuch", 3, "data: nosuch must be a folder, got no such folder"),
        ("--model pipe --other nowhere", 3, "other: nowhere/config.json: must be a readable"),
        ("--model pipe --out pipe/page", 2, "out must be outside model, got pipe/page"),
        ("--model run/pipeline --out run", 2, "out must be another folder than the run of model"),
        ("--model pipe --out pictures/000.png", 4, "out must be a folder that can be written"),
        ("--model pipe --other pipe", 2, "other must be another pipeline than model, got pipe"),
        ("--model pipe --shapes other/pipeline", 2, "shapes must be a pipeline of the set shapes"),
        ("--model pipe --out loop", 4, "out must be a folder that can be written, got loop: "),
        ("--model loop", 3, "model: loop/config.json: must be a readable file, got: "),
        ("--model pictures", 3, "model: pictures/config.json: must be a readable file"),
    ],
)
def test_what_does_not_fit_gets_one_line(model, tmp_path, monkeypatch, capsys, line, code, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipe").symlink_to(model)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "other" / "work").mkdir(parents=True)
    (tmp_path / "other" / "work" / "demo.json").write_text('{"data": "emoji"}')
    (tmp_path / "other" / "pipeline").symlink_to(model)
    shutil.copytree(model, tmp_path / "run" / "pipeline")
    (tmp_path / "run" / "work").mkdir()
    write_pictures(tmp_path / "pictures", 2)
    text = refused(capsys, ["reproduce", "--out", "page", *line.split()], code)
    assert text.startswith(f"reproduce: {words}")
    assert not (tmp_path / "page").exists()


def test_one_figure_as_a_command(model, tmp_path, capsys):
    words = [
        "reproduce",
        "--model",
        str(model),
        "--data",
        "shapes",
        "--out",
        str(tmp_path / "page"),
    ]
    assert main([*words, "--only", "figure_11", "losses"]) == 0
    assert "reproduce: 2 figures: " in capsys.readouterr().out
    made = json.loads((tmp_path / "page" / "figures.json").read_text())
    assert made["figure_11"]["command"].endswith("--only figure_11")
    assert "No metrics.jsonl" in made["losses"]["missing"]
