"""Ramps, warm-up and halving of step sizes as in the paper, and after a resume."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dalle.errors import UsageError
from dalle.train.schedules import PlateauHalving, cosine_ramp, linear_warmup


@pytest.mark.parametrize(
    ("start", "end", "steps"),
    [(0, 6.6, 5000), (1, 1 / 16, 150_000), (1e-4, 1.25e-6, 1_200_000)],
)
def test_cosine_ramp_of_the_paper(start, end, steps):
    assert cosine_ramp(0, start, end, steps) == pytest.approx(start)
    assert cosine_ramp(steps // 2, start, end, steps) == pytest.approx((start + end) / 2)
    assert cosine_ramp(steps, start, end, steps) == end
    assert cosine_ramp(3_000_000, start, end, steps) == end
    quarter = end + (start - end) * (1 + math.cos(math.pi / 4)) / 2
    assert cosine_ramp(steps // 4, start, end, steps) == pytest.approx(quarter)


@given(st.floats(-10, 10), st.floats(-10, 10), st.integers(0, 100), st.integers(0, 120))
def test_cosine_ramp_is_monotone_and_bounded(start, end, steps, step):
    here, there = (cosine_ramp(s, start, end, steps) for s in (step, step + 1))
    low, high = min(start, end), max(start, end)
    assert low - 1e-9 <= here <= high + 1e-9
    assert (there - here) * (end - start) >= -1e-12


def test_linear_warmup_of_the_paper():
    assert linear_warmup(0, 4.5e-4, 5000) == pytest.approx(4.5e-4 / 5000)
    assert linear_warmup(2499, 4.5e-4, 5000) == pytest.approx(2.25e-4)
    assert linear_warmup(4999, 4.5e-4, 5000) == 4.5e-4
    assert linear_warmup(400_000, 4.5e-4, 5000) == 4.5e-4
    assert linear_warmup(0, 1.0, 0) == 1.0


def test_negative_steps_are_refused():
    with pytest.raises(UsageError, match="cosine_ramp: step must be 0 or more, got -1"):
        cosine_ramp(-1, 0, 1, 10)
    with pytest.raises(UsageError, match="linear_warmup: steps must be 0 or more, got -5"):
        linear_warmup(0, 1, -5)


def test_plateau_halves_by_its_rule():
    plateau = PlateauHalving(window=2, patience=2, min_delta=0.1, max_halvings=2)
    losses = [5, 5, 4, 4, 4, 4, 3.95, 3.95]  # means 5, 4 (progress), 4, 3.95 (none): halved
    assert [plateau.update(x) for x in losses] == [1, 1, 1, 1, 1, 1, 1, 0.5]
    for _ in range(4):
        plateau.update(3.0)  # one window of progress, one without
    assert plateau.factor == 0.5
    for _ in range(100):
        plateau.update(3.0)
    assert (plateau.halvings, plateau.factor) == (2, 0.25)


def test_plateau_of_the_paper_ends_at_a_32nd():
    plateau = PlateauHalving(window=1, patience=1)
    for _ in range(100):
        plateau.update(1.0)
    assert 4.5e-4 * plateau.factor == pytest.approx(1.40625e-5)


def test_nonfinite_window_is_no_progress():
    plateau = PlateauHalving(window=1, patience=1)
    assert plateau.update(math.nan) == 0.5
    assert plateau.update(1.0) == 0.5


@given(st.lists(st.floats(0, 10), min_size=1, max_size=60), st.integers(0, 59))
def test_plateau_continues_exactly_from_its_state(losses, cut):
    whole, first = (PlateauHalving(window=3, patience=1) for _ in range(2))
    expected = [whole.update(x) for x in losses]
    found = [first.update(x) for x in losses[:cut]]
    second = PlateauHalving(window=3, patience=1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert found + [second.update(x) for x in losses[cut:]] == expected


@pytest.mark.parametrize(
    ("name", "value"), [("window", 0), ("patience", 0), ("min_delta", -1), ("max_halvings", -1)]
)
def test_plateau_refuses_values_out_of_range(name, value):
    with pytest.raises(UsageError, match=f"PlateauHalving: {name} must be . or more, got {value}"):
        PlateauHalving(**{name: value})
