"""`ResblockScaler`: a copy with its model goes on, one alone keeps to its model; start scales."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from dalle.errors import UsageError
from dalle.precision import ResblockScaler


def pickled(x):
    return pickle.loads(pickle.dumps(x))


def steps_of(scaler, layers, updates):
    optimizer = torch.optim.SGD([p for layer in layers for p in layer.parameters()], lr=0.1)
    for step in range(updates):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        for name, layer in zip(("a", "b"), layers, strict=True):
            x, inside = scaler[name].enter(x)
            x = x + scaler[name].leave(layer(inside))
        x.square().mean().backward()
        scaler.step(optimizer)
        optimizer.zero_grad()
    return [p.detach().clone() for layer in layers for p in layer.parameters()], scaler.scales


@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
def test_a_copied_scaler_and_model_go_on(way):
    layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    scaler = ResblockScaler({"a": layers[0], "b": layers[1]})
    steps_of(scaler, layers, 3)
    others, other = way((layers, scaler))
    mine, theirs = steps_of(scaler, layers, 3), steps_of(other, others, 3)
    assert all(torch.equal(a, b) for a, b in zip(mine[0], theirs[0], strict=True))
    assert torch.equal(mine[1], theirs[1]) and mine[1].data_ptr() != theirs[1].data_ptr()


def test_a_scaler_copied_alone_keeps_to_its_model_and_says_so_of_another():
    layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    scaler = ResblockScaler({"a": layers[0], "b": layers[1]})
    steps_of(copy.deepcopy(scaler), layers, 1)
    steps_of(copy.copy(scaler), layers, 1)
    alone = pickled(scaler)
    with pytest.raises(UsageError, match="optimizer must hold parameters of the blocks"):
        steps_of(alone, layers, 1)
    steps_of(scaler, layers, 1)  # gradients that wait here excuse no other model
    with pytest.raises(UsageError, match="optimizer must hold parameters of the blocks"):
        other = copy.deepcopy(layers)
        other[0].weight.grad = torch.ones_like(other[0].weight)
        scaler.step(torch.optim.SGD(other.parameters(), lr=0.1))
    head = nn.Linear(3, 3)
    head.weight.grad = torch.ones(3, 3)
    layers.requires_grad_(False)
    assert not bool(scaler.step(torch.optim.SGD(head.parameters(), lr=0.1)).skipped)


def test_a_start_scale_that_is_far_too_high_is_said(capfd):
    """After ten updates, that all were skipped, or whose gradients overflowed on their way."""
    layer = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = ResblockScaler({"a": layer})
    for _ in range(10):
        assert capfd.readouterr().err == ""
        layer.weight.grad = torch.full((3, 3), math.inf)
        assert bool(scaler.step(optimizer).skipped)
    said = capfd.readouterr().err
    assert said.startswith("ResblockScaler: all of the first 10 updates were skipped")
    assert "block a" in said and said.count("\n") == 1
    for initial, line in ((2.0**120, "most scaled gradients that enter block a overflow"), (1, "")):
        scaler = ResblockScaler({"a": layer}, initial=initial, low=1, high=2.0**126)
        for _ in range(12):
            x, inside = scaler["a"].enter(torch.full((4, 3), 1e4))
            (x + scaler["a"].leave(layer(inside))).square().sum().backward()
            scaler.step(optimizer)
            optimizer.zero_grad()
            layer.weight.data.zero_()
        said = capfd.readouterr().err
        assert line in said if line else said == ""
