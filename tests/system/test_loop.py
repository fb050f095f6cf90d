"""The training loop: nonfinite numbers, pictures, no network access, options (R17, R30)."""

from __future__ import annotations

import math
import re
import socket

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dalle.errors import NumericalError, UsageError
from dalle.train.config import LoopConfig
from dalle.train.loop import train
from dalle.train.manifest import checkpoints
from dalle.train.seeds import start_seed, step_seed
from dalle.train.update import check_gradients, check_loss, update
from support.tiny_task import TinyTask, config


def test_trains_without_a_connection(tmp_path, no_sockets):
    result = train(TinyTask(), config(tmp_path, picture_every=10))
    assert result.step == 20 and no_sockets == []
    with pytest.raises(OSError, match="blocked"):
        socket.create_connection(("127.0.0.1", 1))
    assert len(no_sockets) == 1


def test_learns_and_reports(tmp_path):
    result = train(TinyTask(), config(tmp_path, steps=200, checkpoint_every=100))
    assert not result.interrupted and result.seconds > 0
    assert result.metrics["step"] == 200 and result.metrics["loss"] < 2.5
    assert len(checkpoints(tmp_path)) == 2


def test_an_average_that_has_seen_little_is_told(tmp_path, capsys):
    line = "of the averaged weights are still those of the start"
    train(TinyTask(), config(tmp_path, steps=20, log_every=100))  # 10 copies at .9
    assert f"tiny: 35% {line}: train longer" in capsys.readouterr().err
    train(TinyTask(), config(tmp_path, steps=60, log_every=100))
    assert line not in capsys.readouterr().err


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_gradient_stops_before_the_update(tmp_path, value):
    seen = {}

    def before(task, step):
        if step == 12:
            seen.update({k: v.clone() for k, v in task.model.state_dict().items()})
            task.model[0].weight.register_hook(lambda grad: grad * value)

    task = TinyTask(before=before)
    with pytest.raises(NumericalError, match="gradient of 0.weight must be finite") as caught:
        train(task, config(tmp_path))
    assert caught.value.exit_code == 5 and "step 12" in str(caught.value)
    for name, parameter in task.model.named_parameters():
        assert torch.equal(parameter, seen[name]), name
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000005", "step-00000010"]


def test_nonfinite_loss_is_named_and_no_checkpoint_is_written(tmp_path):
    class Own(TinyTask):
        """Does its update without `update`."""

        def train_step(self, step):
            return {"loss": math.nan if step == 5 else 1.0}

    with pytest.raises(NumericalError, match="tiny: loss must be finite, got nan at step 5"):
        train(Own(), config(tmp_path, checkpoint_every=1))
    assert checkpoints(tmp_path)[-1].name == "step-00000005"


def test_nonfinite_input_stops_before_the_update(tmp_path):
    task = TinyTask()
    weights = task.model[0].weight.detach().clone()
    loss = task.model(torch.full((4, 3), math.nan)).sum()
    with pytest.raises(NumericalError, match="loss must be finite, got nan at step 7"):
        update(task, loss, 7, lr=0.1)
    assert torch.equal(task.model[0].weight, weights)


def test_checks_pass_finite_numbers():
    model = nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    check_gradients("x", model, 0)
    check_loss("x", torch.tensor(1.0), 0, model)
    check_loss("x", 1.0, 0)


def test_update_clips_the_global_norm():
    def gradient(limit):
        task = TinyTask()
        task.optimizer = torch.optim.SGD(task.model.parameters(), lr=9.0)
        before = torch.cat([p.detach().flatten() for p in task.model.parameters()]).clone()
        torch.manual_seed(0)
        norm = update(task, 100 * task.model(torch.ones(8, 3)).sum(), 0, lr=1.0, clip_norm=limit)
        after = torch.cat([p.detach().flatten() for p in task.model.parameters()])
        return norm, float((after - before).norm())

    free_norm, free_move = gradient(None)
    norm, move = gradient(4.0)
    assert norm == free_norm == pytest.approx(free_move, rel=1e-4) and norm > 100
    assert move == pytest.approx(4.0, rel=1e-3)
    assert gradient(1e9)[1] == free_move


def test_pictures_are_png_files(tmp_path):
    train(TinyTask(), config(tmp_path, picture_every=10))
    names = sorted(p.name for p in (tmp_path / "pictures").iterdir())
    assert names == ["noise-00000010.png", "noise-00000020.png"]
    picture = np.asarray(Image.open(tmp_path / "pictures" / names[0]))
    assert picture.shape == (4, 6, 3) and (picture == 128).all()


def test_pictures_are_drawn_in_eval_mode_without_gradients(tmp_path):
    task = TinyTask()

    def pictures(step):
        assert not task.model.training and not torch.is_grad_enabled()
        return {}

    task.pictures = pictures
    train(task, config(tmp_path, picture_every=5))
    assert task.model.training


def test_pictures_that_cannot_be_written_are_told(tmp_path, capsys):
    (tmp_path / "pictures").write_text("a file in the way")
    assert train(TinyTask(), config(tmp_path, picture_every=10)).step == 20
    assert "pictures after step 10 not written" in capsys.readouterr().err


def test_deterministic_is_restored(tmp_path):
    inside = []
    task = TinyTask(before=lambda *_: inside.append(torch.are_deterministic_algorithms_enabled()))
    train(task, config(tmp_path, steps=2, deterministic=True))
    assert inside == [True, True] and not torch.are_deterministic_algorithms_enabled()


def test_what_begins_a_training_has_a_seed_of_its_own():
    """No sum of seed and number, and other 32 bits, which are all that torch reads on the CPU."""
    seeds, names = (
        (0, 1, 2, 3, 2**32, 2**32 + 1, 2**63 - 1),
        ("dvae", "ranker", "prior", "codebook"),
    )
    found = {start_seed(seed, name) % 2**32 for seed in seeds for name in names}
    assert len(found | set(seeds)) == len(seeds) * (len(names) + 1)
    assert not found & {
        step_seed(a, b, c) % 2**32 for a in range(3) for b in range(9) for c in range(6)
    }


def test_step_seeds_differ_by_seed_step_and_stream():
    seeds = {step_seed(a, b, c) for a in range(5) for b in range(50) for c in range(3)}
    assert len(seeds) == 750 and all(0 <= s < 2**63 for s in seeds)
    assert step_seed(1, 2) == step_seed(1, 2, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", -1), ("log_every", 0), ("checkpoint_every", 0), ("keep", 0), ("picture_every", -1)],
)
def test_options_out_of_range_are_refused(tmp_path, name, value):
    line = f"train: {name} must be {value + 1} or more, got {value}"
    with pytest.raises(UsageError, match=re.escape(line)):
        LoopConfig(**{"out": tmp_path, "steps": 1, name: value})


def test_the_example_in_the_docstring_runs(tmp_path, monkeypatch):
    import textwrap
    from pathlib import Path
    from typing import Any

    from torch import nn

    from dalle.train import loop

    monkeypatch.chdir(tmp_path)
    code = textwrap.dedent(loop.__doc__.split("one bit for bit:")[1])
    names = {"torch": torch, "nn": nn, "Tensor": torch.Tensor, "Any": Any, "Path": Path}
    exec(code, names)
    assert names["result"].step == 100 and Path("out/line/metrics.jsonl").exists()
