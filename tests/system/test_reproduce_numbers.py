"""Figures of numbers of `dalle reproduce`: scales, exchanges, scores, curves."""

from __future__ import annotations

import json

import pytest
import torch

from dalle.errors import EnvironmentProblem
from dalle.plan import compression
from dalle.reproduce import curves, exchange, factors, scales, scores
from dalle.reproduce.context import Context
from dalle.reproduce.exchange_worker import CLUSTER, MACHINE
from dalle.reproduce.figure import Figure
from support.evaluation import shapes_pipeline
from support.reproducing import TINY


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


def event(name, start, end, elements=0, thread=1):
    return {"name": name, "start": 1e3 * start, "end": 1e3 * end, "thread": thread,
            "elements": elements}  # fmt: skip


def step(gathered):
    """One block: gathered, forward, gathered, backward, then its gradients are exchanged."""
    events = [event("FSDP::root_pre_forward", 0, 1)]
    if gathered:
        events += [event("FSDP::all_gather (layers.0)", 1, 3),
                   event("gloo:all_gather", 1, 3, 50, 2),
                   event("FSDP::pre_forward (layers.0)", 1, 4)]  # fmt: skip
    else:
        events += [event("FSDP::pre_forward (layers.0)", 3, 4)]
    events += [
        event("FSDP::post_forward (layers.0)", 10, 10.5),
        event("FSDP::pre_backward (layers.0)", 11, 12),
        event("FSDP::post_backward_accumulate (layers.0)", 20, 21),
        event("FSDP::post_backward_reduce (layers.0)", 21, 25),
    ]
    if gathered:
        return [*events, event("gloo:all_reduce", 22, 24, 100, 3)]
    return [
        *events,
        event("gloo:all_to_all", 14, 18, 640, 5),
        event("gloo:all_to_all", 22, 26, 320, 5),
    ]


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
    sent = {"bytes_sent": 100, "bytes_uncompressed": 400, "seconds": 1.0}

    def run(folder):
        job = json.loads((folder / "job.json").read_text())
        assert job["timeline"]["rank"] == 4 and (folder / "batches.safetensors").is_file()
        losses = [{"rank": rank, "losses": [3.0, 2.0 + rank / 200],
                   "report": sent if rank else None}
                  for rank in job["ranks"]["ranks"]]  # fmt: skip
        found = {MACHINE: {"events": step(True), "rank": 0},
                 CLUSTER: {"events": step(False), "rank": 4, "report": sent}}  # fmt: skip
        (folder / "result.json").write_text(json.dumps({**found, "ranks": losses}))

    monkeypatch.setattr(exchange, "_run", run)
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
    assert "People" in seven["missing"] and "not by people" in seven["tables"][0]["title"]
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


def test_losses_come_from_the_run_around_the_pipeline(context):
    assert "No metrics.jsonl" in curves.losses(context).missing
    folder = context.model.parent / "work" / "prior"
    folder.mkdir(parents=True)
    records = [{"step": i, "loss": 2.0 / i, "text_loss": 1.0, "image_loss": 2.0} for i in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    figure = curves.losses(context)
    assert whole(figure, context)["ours"] == {"prior": {"updates": 2, "loss": 1.0}}
    assert "dvae, ranker" in figure.missing


def test_quantizers_come_from_the_newest_result_file(context, tmp_path, monkeypatch):
    monkeypatch.setattr(curves.dalle, "__file__", str(tmp_path / "python" / "dalle" / "x.py"))
    assert "no result file" in curves.quantizers(context).missing
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    for day, psnr in ((1, 20.0), (2, 30.0)):
        table = {"gumbel": {"psnr": psnr}, "straight-through": {"psnr": psnr + 1}}
        (folder / f"2026-01-0{day}_quantizers.json").write_text(json.dumps({"table": table}))
    found = curves.quantizers(context)
    assert found.tables[0]["rows"] == [["gumbel", 30.0], ["straight-through", 31.0]]
    (folder / "2026-01-03_quantizers.json").write_text("[")
    assert "2026-01-03_quantizers.json" in curves.quantizers(context).missing
