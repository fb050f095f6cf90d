"""Averaged weights: the moving average by its definition, in fp32, swapped in and out, resumed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dalle.errors import CheckpointError, UsageError
from dalle.train.averaging import IterateAverage


def moved(model, amount):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount)


def test_follows_the_definition_every_n_updates():
    model = nn.Linear(2, 2)
    average = IterateAverage(model, 0.9, every=3)
    expected = model.weight.detach().double().clone()
    for step in range(12):
        moved(model, 0.5)
        average.update(step)
        if step % 3 == 2:
            expected = 0.9 * expected + 0.1 * model.weight.detach().double()
        torch.testing.assert_close(average.average["weight"].double(), expected)
    assert average.copies == 4


@pytest.mark.parametrize(("decay", "warmup"), [(0.9, False), (0.9, True), (0.999, True)])
def test_knows_what_is_left_of_the_start(decay, warmup):
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    average = IterateAverage(model, decay, warmup=warmup)
    assert average.first_share == 1
    nn.init.zeros_(model.weight)
    for step in range(200):
        average.update(step)
        if step in (0, 1, 20, 100, 199):
            left = float(average.average["weight"])
            assert average.first_share == pytest.approx(left, rel=1e-3, abs=1e-30)


def test_is_fp32_for_a_bf16_model():
    """In bf16 a step of 1e-3 of the difference would be rounded away."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    average = IterateAverage(model, 0.999)
    with torch.no_grad():
        model.weight.fill_(2.0)
    for step in range(100):
        average.update(step)
    assert average.average["weight"].dtype == torch.float32
    assert float(average.average["weight"]) == pytest.approx(2 - 0.999**100, rel=1e-4)


def test_applied_swaps_and_restores_even_after_an_error():
    model = nn.Linear(3, 1)
    average = IterateAverage(model, 0.5)
    first = model.weight.detach().clone()
    moved(model, 1.0)
    own = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="inside"), average.applied():
        assert torch.equal(model.weight, first)
        assert model.weight.requires_grad
        raise RuntimeError("inside")
    assert torch.equal(model.weight, own)


def test_warmup_forgets_the_initial_weights():
    model = nn.Linear(1, 1, bias=False)
    averages = [IterateAverage(model, 0.999, warmup=w) for w in (False, True)]
    moved(model, 100.0)
    for step in range(50):
        for average in averages:
            average.update(step)
    slow, fast = (float((model.weight.detach() - a.average["weight"]).abs()) for a in averages)
    assert slow > 90 and fast < 1


def test_state_round_trip_and_foreign_states():
    model = nn.Linear(2, 2)
    average = IterateAverage(model, 0.5)
    moved(model, 1.0)
    average.update(0)
    other = IterateAverage(nn.Linear(2, 2), 0.5)
    other.load_state_dict(average.state_dict())
    assert other.copies == 1
    assert all(torch.equal(other.average[n], t) for n, t in average.average.items())
    with pytest.raises(CheckpointError, match="weight must have shape \\(2, 3\\), got \\(2, 2\\)"):
        IterateAverage(nn.Linear(3, 2), 0.5).load_state_dict(average.state_dict())
    with pytest.raises(CheckpointError, match="bias is missing in the model"):
        IterateAverage(nn.Linear(2, 2, bias=False), 0.5).load_state_dict(average.state_dict())


def test_values_out_of_range_are_refused():
    with pytest.raises(UsageError, match="decay must be in \\[0, 1\\), got 1.0"):
        IterateAverage(nn.Linear(1, 1), 1.0)
    with pytest.raises(UsageError, match="every must be 1 or more, got 0"):
        IterateAverage(nn.Linear(1, 1), 0.9, every=0)
