"""Figures of numbers of `dalle reproduce`: scales, exchanges, scores, curves."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from dalle.dvae.straight_through import QUANTIZERS
from dalle.errors import EnvironmentProblem
from dalle.plan import compression
from dalle.reproduce import curves, exchange, factors, pictures, quantizers, scales, scores
from dalle.reproduce.context import Context
from dalle.reproduce.exchange_worker import CLUSTER, MACHINE
from dalle.reproduce.figure import Figure
from support.evaluation import shapes_pipeline
from support.reproducing import TINY, TRAINED, step, two_processes


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    root = tmp_path_factory.mktemp("numbers")
    shapes_pipeline().save_pretrained(root / "run" / "pipeline")
    (root / "out").mkdir()
    return Context(
        root / "run" / "pipeline",
        root / "out",
        sizes=TINY,
        device=torch.device("cpu"),
        data="shapes",
    )


def whole(figure, context):
    """JSON values, files that are there, and words that a reader needs."""
    values = json.loads(json.dumps(figure.to_dict(), allow_nan=False))
    assert Figure.from_dict(values, "here").to_dict() == values
    assert all((context.out / name).stat().st_size > 1000 for name in figure.pictures)
    assert figure.command.startswith("dalle reproduce --test --model ")
    assert figure.paper and (figure.ours or figure.missing)
    return values


def test_figure_6_has_no_empty_column(context, monkeypatch):
    made, score, fact = context.best_drawing, "mean score of the ranker", "every fact right"
    other = replace(made, captions=["grinning face"] * len(made.captions))
    unranked = replace(other, scores=np.full_like(made.scores, np.nan))
    for drawn, heads in ((made, [["", score, fact]]), (other, [["", score]]), (unranked, [])):
        monkeypatch.setitem(vars(context), "best_drawing", drawn)
        tables = whole(pictures.figure_6(context), context)["tables"]
        assert [each["columns"] for each in tables] == heads
        for row in (row for each in tables for row in each["rows"]):
            assert len(row) == len(heads[0]) and None not in row


def test_spans_are_computing_and_exchanges():
    alone = exchange.spans(step(True), sharded=True)
    assert alone == {
        "forward": [(4, 10)], "backward": [(12, 20)], "gather": [(1, 3)], "scatter": [(22, 24)],
        "factors": [],
    }  # fmt: skip
    assert exchange.hidden_share(alone) == 0
    apart = exchange.spans(step(False), sharded=False)
    assert apart["factors"] == [(14, 18), (22, 26)] and not apart["scatter"]
    assert exchange.hidden_share(apart) == pytest.approx(0.5)
    assert exchange.hidden_share({"gather": [], "scatter": [], "factors": []}) is None
    assert factors.measured_factors(step(False)) == {"P": 640, "Q": 320}


def test_exchanges_of_a_measured_run(context, monkeypatch):
    monkeypatch.setattr(exchange, "_run", two_processes)
    five = whole(exchange.figure_5(context), context)
    assert five["ours"]["shard_elements"] == {"layers.0": 50}
    assert five["ours"]["hidden_share"] == {MACHINE: 0, CLUSTER: pytest.approx(0.5)}
    monkeypatch.setattr(exchange, "_run", None)  # measured once
    one = whole(factors.table_1(context), context)
    assert one["ours"]["compression"]["3968"] == pytest.approx(1 - 5 * 896 / (8 * 3968))
    assert one["ours"]["least_rank"] == 4
    saved = one["tables"][1]["rows"][1]
    assert saved[3:] == [compression(64, 1, 4), 0.5]  # of fp32, so half of that of 16 bits
    two = whole(factors.table_2(context), context)
    rows = two["tables"][0]["rows"]
    assert rows[0][1:4] == ["4 of 3968 x 496", "4 of 3968 x 112", "4 of 112 x 496"]
    total = 12 * 3968**2 // 8
    assert sum(row[4] for row in rows[:3]) == 2 * total
    assert sum(row[5] for row in rows[:3]) / (2 * total) == pytest.approx(5 * 896 / (8 * 3968))
    assert two["tables"][1]["rows"][0] == ["P", 2 * 2 * 9 * 64 * 4, 640]


def test_processes_that_cannot_run_are_one_line(context, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(exchange.subprocess, "Popen", refuse)
    words = "^reproduce: two processes must run beside each other, got Resource temporarily"
    with pytest.raises(EnvironmentProblem, match=words):
        exchange._run(tmp_path)


@pytest.mark.night
def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    """However that one ends: its end of the pipe is then closed."""
    command = [sys.executable, "-m", "dalle.reproduce.exchange_worker", str(tmp_path), "0"]
    (tmp_path / "job.json").write_text("{}")
    (tmp_path / "batches.safetensors").write_bytes(save({"text": torch.zeros(1)}))
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(20)  # for the other process
        process.stdin.close()
        assert process.wait(20) == 1


@pytest.mark.night
def test_two_processes_measure_themselves(context, monkeypatch):
    monkeypatch.setattr(context, "cache", context.out / "night")
    figure = exchange.figure_5(context)
    units = figure.ours["shard_elements"]
    assert set(units) == {"embeddings and heads", "layers.0", "layers.1"}
    assert figure.ours["hidden_share"][MACHINE] is not None
    measured = factors.table_2(context).ours["measured_bytes"]
    assert measured == {"P": 2 * 2 * 9 * 64 * 4, "Q": 2 * 2 * 7 * 64 * 4}  # q, k, v are one matrix


def test_scales_of_a_short_run(context):
    twelve = whole(scales.figure_12(context), context)
    assert twelve["ours"]["blocks"] == 4 and twelve["ours"]["range_bits"] >= 0
    assert list(twelve["ours"]["log2_scale"]) == [
        "layers.0.attention", "layers.0.mlp", "layers.1.attention", "layers.1.mlp"]  # fmt: skip
    four = whole(scales.figure_4(context), context)
    assert set(four["ours"]["late_half"]) == {"one scale", "own scales"}
    assert four["ours"]["blocks"] == 6


def test_votes_say_that_the_judge_is_no_person(context):
    seven = whole(scores.figure_7(context), context)
    assert set(seven["ours"]["judges"]) == {"checker", "ranker"}
    assert seven["paper"]["majority"]["more realistic"] == [90.0, 10.0]
    assert "No people voted" in seven["missing"] and "not by people" in seven["tables"][0]["title"]
    for judged in seven["ours"]["judges"].values():
        assert set(judged) == {"better match"}  # no vote on what is more realistic
        low, high = judged["better match"]["ours"]["interval"]
        assert low <= judged["better match"]["ours"]["share"] <= high


def test_sweeps_are_never_called_fid(context):
    nine = whole(scores.figure_9(context), context)
    assert nine["ours"]["metrics"]["distance"] == "FD-ranker"
    assert [p["radius"] for p in nine["ours"]["a"]] == [0, 1, 2, 4, 8]
    assert [p["candidates"] for p in nine["ours"]["c"]] == [1, 2]
    assert len(nine["pictures"]) == 3 and "not FID" in nine["missing"]
    cub = nine["tables"][1]
    assert cub["rows"][0][cub["columns"].index("paper's FID")] == 56.2


def test_overlap_share_stands_beside_the_papers(context):
    found = whole(scores.overlap(context), context)
    assert 0 <= found["ours"]["share"] <= 1 and found["paper"]["coco"] == 0.21
    assert found["pictures"] == ["overlap.png", "overlap_sheet.png"]


def test_a_pipeline_without_a_ranker_says_so(context, monkeypatch):
    monkeypatch.setattr(context.pipeline, "ranker", None)
    for maker in (scores.figure_7, scores.figure_9, scores.overlap):
        figure = maker(context)
        assert not figure.ours and "no ranker" in figure.missing
        whole(figure, context)
    eight = whole(pictures.figure_8(context), context)
    assert "another sample of the same model stands in" in eight["missing"]
    rows = np.asarray(Image.open(context.out / "figure_8.png")).reshape(2, 24, 2, 24, 3)
    assert (rows[:, :, 0] != rows[:, :, 1]).any()


def test_losses_come_from_the_run_around_the_pipeline(context):
    assert "No metrics.jsonl" in curves.losses(context).missing
    folder = context.model.parent / "work" / "prior"
    folder.mkdir(parents=True)
    records = [{"step": i, "loss": 2.0 / i, "text_loss": 1.0, "image_loss": 2.0} for i in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    figure = curves.losses(context)
    assert whole(figure, context)["ours"] == {"prior": {"updates": 2, "loss": 1.0}}
    assert "dvae, ranker" in figure.missing


def test_the_recorded_table_of_quantizers_is_the_newest_result(context):
    """It comes with the package, and the documentation quotes it."""
    figure = whole(quantizers.quantizers(context), context)
    assert figure["missing"].startswith("Not trained in this run: the table was recorded on 20")
    root = Path(__file__).parents[2]
    newest = max((root / "benchmarks" / "results").glob("*_quantizers.json"))
    recorded = quantizers.RECORD.read_bytes()
    assert recorded == newest.read_bytes()
    found = json.loads(recorded)
    assert found["table"] == figure["ours"]["table"]
    assert "dirty" not in found["machine"]["commit"]
    assert {len([r for r in found["rows"] if r["quantizer"] == q]) for q in QUANTIZERS} == {3}
    page = (root / "docs" / "training.md").read_text()
    for name, cells in found["table"].items():
        assert f"| {name} | {' | '.join(cells.values())} |" in page
    shown = quantizers.PICTURE.read_bytes()
    assert shown == (root / "docs" / "images" / "quantizers.png").read_bytes()


def test_quantizers_are_trained_here_and_kept(context, monkeypatch):
    own = Context(context.model, context.out, sizes=replace(TINY, quantizers=TRAINED),
                  device=context.device, data="shapes")  # fmt: skip
    figure = whole(quantizers.quantizers(own), own)
    assert not figure["missing"] and list(figure["ours"]["table"]) == list(QUANTIZERS)
    assert figure["ours"]["dvae_steps"] == 10 and "mean and" in figure["text"]
    monkeypatch.setattr(quantizers, "measure", None)  # a second run reads what is there
    assert quantizers.quantizers(own).to_dict()["ours"] == figure["ours"]
