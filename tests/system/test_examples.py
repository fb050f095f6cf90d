"""`examples/`: the model of one's own learns, and its gradient scales are at work."""

from __future__ import annotations

import torch

import own_model


def test_own_model_learns(monkeypatch, capsys):
    """Fewer steps than in the file, compiled without a C++ compiler; chance is ln 16 = 2.77."""
    scalers, scale_branches = [], own_model.scale_branches
    monkeypatch.setattr(
        own_model,
        "scale_branches",
        lambda model: scalers.append(scale_branches(model)) or scalers[0],
    )
    torch._dynamo.reset()
    assert own_model.main(steps=40, backend="aot_eager") < 0.3
    assert capsys.readouterr().out.splitlines()[1].startswith("step 40: loss 0.")
    metrics = scalers[0].metrics()
    assert scalers[0].updates == 40 and metrics["skipped"] == 0
    assert bool((metrics["block_scale"] > 13).all())  # they grew from 2^13 at each update
    assert len(scalers[0]) == len(own_model.Model().branches) == 4
