"""`python -m benchmarks.gpu`: cases, goals, time, clocks, reports."""

from __future__ import annotations

import pytest
import torch

from gpu import bench, goals, names, report
from gpu.budget import RESERVE, Budget
from gpu.cases import Case, all_cases
from gpu.supervise import OUT_OF_TIME, unmeasured

ROW = Case("sparse_attention", "row", "float16", (8, 62, 64, 256, 32, 32), 20.0)
H200 = "NVIDIA H200"


def test_cases_cover_what_was_asked_for():
    cases = all_cases(dry_run=False)
    attention = {(c.kind, c.size[1], c.dtype) for c in cases if c.op == "sparse_attention"}
    kinds = ("row", "column", "conv", "causal")
    dtypes = ("float16", "bfloat16")
    assert attention == {(kind, h, d) for kind in kinds for h in (62, 16) for d in dtypes}
    assert {c.size[2] for c in cases if c.op == "sparse_attention"} == {64}
    gumbel = [(c.size, c.dtype) for c in cases if c.op == "gumbel_softmax"]
    assert gumbel == [((8192, 8192), d) for d in ("float32", *dtypes)]
    assert {c.op for c in cases} >= {"formats", "grad_scale", "adam16", "powersgd", "block"}
    assert len({c.name for c in cases}) == len(cases) and cases[0].op == "card"
    tiny = all_cases(dry_run=True)
    assert [(c.op, c.kind, c.dtype) for c in tiny] == [(c.op, c.kind, c.dtype) for c in cases]


@pytest.mark.parametrize(
    ("kind", "which", "number", "floor", "goal"),
    [
        ("row", "forward", "1f", 76, 105),
        ("column", "backward", "1b", 152, 300),
        ("conv", "forward", "1c", 76, 135),
        ("conv", "backward", "1c", 160, 400),
    ],
)
def test_goals_of_attention(kind, which, number, floor, goal):
    case = Case("sparse_attention", kind, "bfloat16", ROW.size, 20.0)
    found = goals.goal_of(case, which)
    assert (found.number, found.floor_us, found.goal_us) == (number, floor, goal)
    few = Case("sparse_attention", kind, "bfloat16", (8, 16, *ROW.size[2:]), 20.0)
    assert goals.goal_of(few, which).goal_us == pytest.approx(goal * 16 / 62)


def test_goals_of_the_16_bit_ops():
    size = (2**28,)
    pack = goals.goal_of(Case("formats", "1-6-9", "float32", size, 5.0), "pack")
    assert pack.floor_us == pytest.approx(6 * 2**28 / 4.3e6) and pack.goal_us < 1.08 * pack.floor_us
    assert pack.ratios == {names.COPY: pytest.approx(1 / 1.07)}
    step = goals.goal_of(Case("adam16", "", "float32", size, 5.0), "step")
    assert step.ratios == {names.ADAMW: 1.6, names.ADAMW8: 1.2}
    assert goals.goal_of(Case("adam16", "", "float16", size, 5.0), "step") is None


def test_goals_of_powersgd():
    numbers = [
        (case.name, which, goal.number)
        for case in all_cases(dry_run=False) if case.op == "powersgd"
        for which in case.passes if (goal := goals.goal_of(case, which)) is not None
    ]  # fmt: skip
    assert numbers == [
        ("powersgd 1 of 3968 x 3968, rank 112", "compress", "5a"),
        ("powersgd 1 of 3968 x 3968, rank 112", "project", "5a"),
        ("powersgd 1 of 3968 x 15872, rank 112", "round", "5d"),
        ("powersgd orthogonalize 1 of 3968, rank 112", "orthogonalize", "5b"),
        ("powersgd orthogonalize 16 of 3968, rank 112", "orthogonalize", "5b"),
        ("powersgd orthogonalize 1 of 3968, rank 896", "orthogonalize", "5c"),
    ]


def test_no_goal_where_none_was_set():
    size = ROW.size
    assert goals.goal_of(Case("sparse_attention", "causal", "float16", size, 1), "forward") is None
    assert goals.goal_of(Case("gumbel_softmax", "", "float16", (8192, 8192), 1), "backward") is None
    for case in all_cases(dry_run=True):
        assert all(goals.goal_of(case, which) is None for which in case.passes), case


def test_judging_a_time():
    goal = goals.goal_of(ROW, "forward")
    assert goals.judge(goal, 100e-6, H200) == {
        **{"number": "1f", "floor_us": 76, "goal_us": 105, "met": True},
        "over_floor": pytest.approx(100 / 76),
    }
    missed = goals.judge(goal, 210e-6, H200)
    assert missed["met"] is False and missed["missed_by"] == pytest.approx(2.0)
    assert goals.judge(goal, 1e-9, "NVIDIA A100")["met"] is None, "another card, another goal"
    assert goals.judge(goal, None, H200)["met"] is None
    assert goals.judge(None, 1e-3, H200) is None


def test_judging_a_ratio():
    goal = goals.goal_of(ROW, "forward")
    assert goals.judge_ratio(goal, names.FLEX, 2.3) == {"ratio": 2.3, "goal": 2.3, "met": True}
    missed = goals.judge_ratio(goal, names.MASK, 3.0)
    assert missed == {"ratio": 3.0, "goal": 6.0, "met": False, "missed_by": 2.0}
    assert goals.judge_ratio(goal, "another", 3.0) == {"ratio": 3.0}
    assert goals.judge_ratio(None, names.FLEX, 3.0) == {"ratio": 3.0}


def test_budget_counts_down_and_learns():
    clock = iter([100.0, 110.0, 110.0, 110.0, 150.0, 500.0]).__next__
    budget = Budget(60.0, clock)
    assert budget.remaining() == 50.0 - RESERVE
    assert budget.fits(ROW), "its own guess, 20 s"
    budget.took(ROW, 80.0)
    budget.took(ROW, 100.0)
    assert budget.estimate(ROW) == 90.0
    assert budget.estimate(all_cases(dry_run=False)[0]) == 10.0, "nothing is known of its op"
    assert not budget.fits(ROW)
    assert budget.to_go([ROW, ROW]) == 10.0 - RESERVE, "never more than there is"
    assert budget.remaining() == 0.0


def raw(**ours):
    return {
        **{"case": ROW.name, "pass": "forward", "ours": ours, "unit": "TFLOP/s", "work": 0.042},
        **{"flops": 42_000_000_000, "bytes": 328_000_000},
        "rivals": {
            names.FLEX: {"seconds": 300e-6, "peak_bytes": 2**20},
            names.CUDNN: {"not_measured": "RuntimeError: none"},
        },
    }


def test_a_row_gets_its_columns():
    rates = {"copy": 4100.0, "float16 GEMM": 700.0}
    done = report.finish(ROW, raw(seconds=100e-6, peak_bytes=0), rates, H200)
    assert done["ours"]["rate"] == pytest.approx(420)
    assert done["floor"] == {
        "bytes_us": pytest.approx(80),
        "flops_us": pytest.approx(60),
        "ours_over_floor": pytest.approx(1.25),
    }
    assert done["goal"]["met"] is True
    flex = done["rivals"][names.FLEX]
    assert (flex["ratio"], flex["goal"], flex["met"]) == (pytest.approx(3.0), 2.3, True)
    assert done["rivals"][names.CUDNN] == {"not_measured": "RuntimeError: none"}
    text = report.lines_of(done)
    assert "100.0 us     420.0 TFLOP/s      0.0 MiB goal 105 us met" in text[0]
    assert text[1].endswith("300.0 us     140.0 TFLOP/s      1.0 MiB    3.00x goal 2.3x met")
    assert text[2].endswith("not measured: RuntimeError: none")


def test_a_row_without_ours_or_without_anything():
    wrong = report.finish(ROW, raw(not_measured="AssertionError: error 1"), {}, H200)
    assert wrong["goal"]["met"] is None and "ratio" not in wrong["rivals"][names.FLEX]
    assert "floor" not in wrong
    assert "not measured: AssertionError: error 1" in report.lines_of(wrong)[0]
    row = unmeasured(ROW, OUT_OF_TIME)[1]
    left = report.finish(ROW, row, {}, H200)
    assert left["goal"] == {"number": "1b", "floor_us": 152, "goal_us": 300, "met": None}
    assert report.lines_of(left)[0].endswith(" not measured: out of time")


def test_rates_of_the_card():
    copy = {"case": "card", "pass": "copy", "ours": {"seconds": 0.5}, "work": 2.0, "unit": "GB/s"}
    lost = {"case": "card", "pass": "float16 GEMM", "not_measured": "x"}
    assert report.rates_of([copy, lost]) == {"copy": 4.0}


@pytest.mark.parametrize(
    ("rows", "checks_passed", "tools", "well"),
    [
        ([{"ours": {"seconds": 1.0}}], True, {"memcheck": {"passed": True}}, True),
        ([{"not_measured": OUT_OF_TIME}], None, {}, True),
        ([{"not_measured": "the worker ended with -6"}], True, {}, False),
        ([{"ours": {"not_measured": "AssertionError: error"}}], True, {}, False),
        ([], False, {}, False),
        ([], True, {"racecheck": {"passed": False}}, False),
    ],
)
def test_all_well(rows, checks_passed, tools, well):
    result = {"checks": {"passed": checks_passed}, "sanitizer": {"tools": tools}, "rows": rows}
    assert report.all_well(result) is well


def test_slug():
    assert report.slug("NVIDIA H200") == "h200"
    assert report.slug("NVIDIA GeForce RTX 4090 (x)") == "geforce_rtx_4090_x"


class FakeEvent:
    """A CUDA event that reads a counter; `elapsed_time` is in milliseconds."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now

    def synchronize(self):
        FakeEvent.now += 1000.0

    def elapsed_time(self, end):
        return end.at - self.at


def advance(by):
    FakeEvent.now += by


def test_clock_of_events_leaves_the_flush_out():
    clock = bench.event_clock(lambda: advance(500.0), FakeEvent)
    assert clock(lambda: advance(3.0)) == pytest.approx(3e-3)


class FakeMemory:
    """What `torch.cuda` answers about memory."""

    def __init__(self):
        self.now = self.most = 100

    def synchronize(self):
        pass

    def reset_peak_memory_stats(self):
        self.most = self.now

    def memory_allocated(self):
        return self.now

    def max_memory_allocated(self):
        return self.most

    def allocate(self):
        self.most = max(self.most, self.now + 40)
        self.now += 10


def test_peak_is_what_a_call_adds():
    memory = FakeMemory()
    assert bench.peak_bytes(memory.allocate, memory) == 40


def test_a_candidate_that_fails_is_a_row_with_a_reason():
    def missing():
        raise RuntimeError("\n no such\nrival")

    memory = FakeMemory()
    here = bench.Bench("cpu", bench.harness.host_clock, memory, "eager", 3)
    found = here.times({"ours": lambda: memory.allocate, "rival": missing})
    assert found["rival"] == {"not_measured": "RuntimeError: no such"}
    assert found["ours"]["peak_bytes"] == 40 and found["ours"]["seconds"] >= 0


def test_a_dead_device_ends_the_worker():
    memory = FakeMemory()

    def dies():
        memory.synchronize = broken
        raise RuntimeError("illegal access")

    def broken():
        raise RuntimeError("the device is lost")

    here = bench.Bench("cuda", bench.harness.host_clock, memory, "eager", 3)
    with pytest.raises(RuntimeError, match="the device is lost"):
        here.times({"ours": lambda: dies})


def test_reason_is_one_line():
    assert bench.reason(ValueError()) == "ValueError: no message"
    assert len(bench.reason(RuntimeError("x" * 999))) == 240


def test_column_order_makes_columns_contiguous():
    from torch.nn.attention.flex_attention import create_mask

    from dalle_ext import AttentionPattern
    from gpu.attention import column_block_mask, column_order

    pattern = AttentionPattern("column", text_len=5, grid=(4, 3))
    order = column_order(pattern)
    size = pattern.length
    mask = create_mask(column_block_mask(pattern, "cpu").mask_mod, None, None, size, size, "cpu")
    assert torch.equal(mask[0, 0], pattern.mask()[order][:, order])
