"""Worker processes that read a training's data change none of its numbers, and fail in one line."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from dalle.data.loader import StepLoader
from dalle.data.pairs import ArrayPairs, left_out
from dalle.errors import DataError, EnvironmentProblem, UsageError
from dalle.train.config import LoopConfig
from dalle.train.dvae import DvaeTask, DvaeTrainConfig
from dalle.train.loop import train
from dalle.train.metrics import read_metrics
from dalle.train.prior import PriorTask
from support.prior import SMALL, make_parts, make_task

LOOP = {"picture_every": 0, "log_every": 1, "checkpoint_every": 2, "workers": 0}


class Broken(ArrayPairs):
    """Pictures 1 and 3 do not decode."""

    def load(self, i):
        if i in (1, 3):
            raise DataError("does not decode")
        return super().load(i)


def pairs():
    _, _, toy = make_parts()
    return Broken("toy", toy.images, toy.captions)


def losses(folder):
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl")]


def of_dvae(workers):
    _, vae, _ = make_parts()
    config = DvaeTrainConfig(image_size=8, batch_size=5)
    return DvaeTask(vae, pairs(), config, workers=workers)


def of_prior(workers):
    parts = make_parts()
    model = make_task(parts).model
    config = replace(SMALL, augment="paper", bpe_dropout=0.1)
    return PriorTask(model, parts[0], parts[1], pairs(), config, workers=workers)


@pytest.mark.parametrize("make", [of_dvae, of_prior])
def test_the_loss_curve_has_the_same_bits_with_any_number_of_workers_and_after_a_resume(
    make, tmp_path
):
    counts = []
    for workers in (0, 1, 4):
        task = make(workers)
        out = tmp_path / str(workers)
        train(task, LoopConfig(out=out, steps=4, **LOOP))
        counts.append(task.pairs.left_out)
        assert task.loader._iterator is None  # the training has ended its workers
    assert losses(tmp_path / "1") == losses(tmp_path / "0") == losses(tmp_path / "4")
    assert counts[0] == counts[1] == counts[2] and set(counts[0]) <= {1, 3} and counts[0]
    half = make(2)
    train(half, LoopConfig(out=tmp_path / "half", steps=2, **LOOP))
    again = make(3)
    train(again, LoopConfig(out=tmp_path / "half", steps=4, **LOOP))
    assert losses(tmp_path / "half") == losses(tmp_path / "0")
    waits = [r["data_wait"] for r in read_metrics(tmp_path / "half" / "metrics.jsonl")]
    assert all(0 < wait < 1 for wait in waits)


def test_steps_out_of_order_are_read_too_and_the_callers_generator_does_not_move():
    loader = StepLoader("x", lambda step: torch.tensor(step), pairs(), workers=1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert [int(loader.get(step)) for step in (3, 4, 9, 0, 1)] == [3, 4, 9, 0, 1]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_problem_of_the_data_is_raised_here_in_its_own_line():
    def load(step):
        if step == 1:
            raise DataError("toy: a batch must hold a picture that can be used, got none")
        return np.zeros(2)

    loader = StepLoader("x", load, pairs(), workers=1)
    loader.get(0)
    with pytest.raises(DataError) as caught:
        loader.get(1)
    assert str(caught.value) == "toy: a batch must hold a picture that can be used, got none"
    assert left_out(loader.pairs) == ""


def test_a_worker_that_is_killed_gives_one_line(monkeypatch):
    waits = _MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(waits, "__defaults__", (0.2,))  # seconds, 5 in life
    loader = StepLoader("prior train", lambda step: torch.zeros(1), pairs(), workers=1)
    loader.get(0)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(EnvironmentProblem, match="^prior train: workers must go on, got: ") as e:
        for step in range(1, 9):  # what it has read before is given out first
            loader.get(step)
    assert "\n" not in str(e.value)


def test_workers_ignore_the_signals_of_the_group():
    def handlers(step):
        return [signal.getsignal(n) is signal.SIG_IGN for n in (signal.SIGINT, signal.SIGHUP)]

    assert StepLoader("x", handlers, pairs(), workers=1).get(0) == [True] * 2


def test_number_of_workers():
    with pytest.raises(UsageError, match="^x: workers must be "):
        StepLoader("x", lambda step: 0, pairs(), workers=-1)
