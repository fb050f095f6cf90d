"""The loop reads an update's numbers when the next one is queued, and trains the same."""

from __future__ import annotations

import json
import math
import os
import signal
import traceback
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import dalle_ext
from dalle.errors import DataError, NumericalError
from dalle.precision import queued
from dalle.precision.queued import HostCopy
from dalle.train import loop, update
from dalle.train.config import LoopConfig
from dalle.train.dvae import DvaeTask
from dalle.train.loop import TrainingInterrupted, train
from dalle.train.manifest import checkpoints
from dalle.train.muon import MuonAdamW
from support import dvae, ranker
from support.prior import SMALL, make_parts, make_task
from support.tiny_task import TinyTask, config, state_hash


def fused(task):
    """With the optimizer that it has on a GPU."""
    groups = [{**group, "fused": True} for group in task.optimizer.param_groups]
    task.optimizer = torch.optim.AdamW(groups, fused=True)
    return task


PLATEAU = replace(SMALL, decay="plateau", plateau_window=1, plateau_patience=1, plateau_min_delta=1)
WARM = replace(dvae.WARM, warm_start_steps=3, health_every=2)
TASKS = {
    "fp32": lambda: make_task(make_parts(), replace(SMALL, clip_norm=0.5)),
    "plateau": lambda: make_task(make_parts(), PLATEAU),
    "muon": lambda: make_task(make_parts(), replace(SMALL, optimizer="muon", clip_norm=0.5)),
    "bf16": lambda: make_task(make_parts(), precision="bf16"),
    "fp16-scaled": lambda: make_task(make_parts(), precision="fp16-scaled"),
    "fp16-scaled, adamw": lambda: make_task(
        make_parts(), replace(SMALL, optimizer="adamw"), precision="fp16-scaled"
    ),
    "dvae": lambda: dvae.make_task(WARM),
    "ranker": lambda: fused(ranker.toy_task(ranker.SMALL)),
}
TIMES = {"data_wait", "steps_per_second", "images_per_second", "seconds", "eta"}


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def options(out, **changes):
    return LoopConfig(**{"out": out, "steps": 7, "log_every": 2, "picture_every": 0} | changes)


class Device(TorchDispatchMode):
    """What is computed from some tensors is "on the device"; `reads` are those of the host."""

    READS = {"_local_scalar_dense", "item", "equal", "nonzero", "masked_select", "_unique2"}
    METHODS = ("tolist", "numpy", "cpu", "__array__", "item", "__float__", "__bool__", "__int__")

    def __init__(self, patch, tensors):
        super().__init__()
        self.reads, self.watching, self.counted = [], False, 0
        for tensor in tensors:
            tensor.on_device = True
        for name in self.METHODS:
            patch.setattr(torch.Tensor, name, self.watched(getattr(torch.Tensor, name)))
        read = HostCopy.read

        def allowed(copy):
            watching, self.watching = self.watching, False
            values = read(copy)
            for value in values.values():
                if isinstance(value, torch.Tensor):
                    value.on_device = False
            self.watching, self.counted = watching, self.counted + 1
            return values

        patch.setattr(HostCopy, "read", allowed)

    def watched(self, method):
        def call(tensor, *args, **kwargs):
            self.note(method.__name__, [tensor])
            watching, self.watching = self.watching, False  # one note, whatever it calls
            try:
                return method(tensor, *args, **kwargs)
            finally:
                self.watching = watching

        return call

    def note(self, name, tensors):
        if self.watching and any(getattr(t, "on_device", False) for t in tensors):
            frames = [f for f in traceback.extract_stack() if "/dalle/" in f.filename]
            self.reads.append(f"{name} in {frames[-1].name if frames else '?'}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        if func.__name__.split(".")[0] in self.READS:
            self.note(func.__name__, tensors)
        out = func(*args, **(kwargs or {}))
        if any(getattr(t, "on_device", False) for t in tensors):
            for tensor in tree_iter(out):
                if isinstance(tensor, torch.Tensor):
                    tensor.on_device = True
        return out


def watch_reads(task, folder, patch):
    """The host's reads of a training after its start, up to the checkpoint at its end."""
    device = Device(patch, [*task.model.parameters(), *task.model.buffers()])
    step, save = task.train_step, loop.Saver.save

    def first(at):
        if isinstance(task, DvaeTask) and at == WARM.warm_start_steps:
            device.watching = False  # the codebook is made, once
        values = step(at)
        device.watching = True
        return values

    def last(saver, *args, **kwargs):
        device.watching = False
        save(saver, *args, **kwargs)

    task.train_step = first
    patch.setattr(loop.Saver, "save", last)
    with device:
        train(task, options(folder))
    return device


@pytest.mark.parametrize("name", TASKS)
def test_the_host_reads_nothing_before_the_next_step_is_queued(tmp_path, monkeypatch, name):
    with monkeypatch.context() as patch:
        device = watch_reads(TASKS[name](), tmp_path / "late", patch)
    assert device.reads == [] and device.counted >= 14  # verdict and values of each step
    assert [row["step"] for row in rows(tmp_path / "late")] == [2, 4, 6, 7]
    # The same training, each update read at once: the same rows, weights, averages and state.
    task, again = TASKS[name](), TASKS[name]()
    monkeypatch.setattr(update, "skips_on_device", lambda optimizer: False)
    if name != "fp16-scaled, adamw":
        monkeypatch.setattr("dalle.precision.scaler.skips_on_device", lambda optimizer: False)
    train(again, options(tmp_path / "now"))
    monkeypatch.undo()
    train(task, options(tmp_path / "late again"))
    assert rows(tmp_path / "late") == rows(tmp_path / "now") == rows(tmp_path / "late again")
    assert state_hash(task) == state_hash(again)


def test_the_watch_finds_a_read(tmp_path, monkeypatch):
    task = TASKS["fp32"]()
    step, bias = task.train_step, next(task.model.parameters())
    task.train_step = lambda at: {
        **step(at),
        "a": float(bias.detach().sum()),
        "b": len(bias.detach().cpu().tolist()),
    }
    with monkeypatch.context() as patch:
        reads = watch_reads(task, tmp_path, patch).reads
    assert {read.split()[0] for read in reads} == {"__float__", "cpu", "tolist"}


class Fused(TinyTask):
    """With an optimizer that skips on the device, chosen by `kind`."""

    def __init__(self, kind, **options):
        super().__init__(**options)
        params = list(self.model.parameters())
        self.optimizer = {
            "fused": lambda: torch.optim.AdamW(params, fused=True),
            "adamw16": lambda: dalle_ext.AdamW16(params),
            "muon": lambda: MuonAdamW(
                [{"params": [p for p in params if p.ndim == 2], "muon": 1},
                 {"params": [p for p in params if p.ndim == 1]}],
                muon_scale=0.1, fused=True),
        }[kind]()  # fmt: skip


@pytest.mark.parametrize("kind", ["fused", "adamw16", "muon"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nonfinite_gradient_leaves_everything_as_before_its_step(tmp_path, kind, value):
    before = Fused(kind)
    train(before, config(tmp_path / "before", steps=12))
    handles = []

    def spoil(task, step):
        handles and handles.pop().remove()
        if step == 12:
            handles.append(task.model[0].weight.register_hook(lambda grad: grad * value))

    task = Fused(kind, before=spoil)
    with pytest.raises(NumericalError, match="gradient of 0.weight must be finite") as caught:
        train(task, config(tmp_path / "spoilt"))
    assert "step 12" in str(caught.value)
    assert rows(tmp_path / "spoilt") == rows(tmp_path / "before")
    for name in ("model", "optimizer"):
        states = [dict(getattr(t, name).state_dict()) for t in (task, before)]
        for state in states:  # batch norm's, which every forward pass moves, and this run's lr
            state.pop("param_groups", None)
            for key in [key for key in state if str(key).startswith("2.")]:
                del state[key]
        torch.testing.assert_close(*states, rtol=0, atol=0)
    for key, average in task.average.average.items():
        assert torch.equal(average, before.average.average[key]), key
    assert [p.name for p in checkpoints(tmp_path / "spoilt")] == ["step-00000005", "step-00000010"]


def test_a_nonfinite_number_that_does_not_come_again_is_told_with_its_step(tmp_path):
    seen = []

    def spoil(task, step):
        if step == 3 and not seen:
            handle = task.model[0].weight.register_hook(lambda g: handle.remove() or g * math.nan)
            seen.append({k: v.clone() for k, v in task.model.named_parameters()})

    task = Fused("fused", before=spoil)
    with pytest.raises(NumericalError, match="gradient norm must be finite, got nan at step 3"):
        train(task, config(tmp_path, log_every=1))
    assert all(torch.equal(p, seen[0][k]) for k, p in task.model.named_parameters())
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_a_nonfinite_loss_names_the_module_and_its_step(tmp_path):
    def spoil(task, step):
        if step == 5:
            task.model[3].weight.data.fill_(math.nan)

    with pytest.raises(NumericalError, match="tiny: loss must be finite, got nan at step 5"):
        train(Fused("fused", before=spoil), config(tmp_path))
    task = TASKS["fp32"]()
    batch = task.batch

    def spoilt(step):
        keep = torch.full((8, 16), math.nan if step == 4 else 1.0)
        return batch(step)._replace(keep=keep)

    task.batch = spoilt
    with pytest.raises(NumericalError, match=r"got nan at step 4 \(first nonfinite: "):
        train(task, options(tmp_path / "prior"))


def test_blocks_that_stay_nonfinite_stop_at_the_step_where_they_did_before(tmp_path, monkeypatch):
    """At the lowest scale for a window of updates; all of them skipped, none averaged."""
    said = []
    for late in (True, False):
        task = TASKS["fp16-scaled"]()
        task.scaler.low, task.scaler.window = task.scaler.high, 3
        task.scaler.scales[:-1] = task.scaler.low
        weights = task.model.layers[0].attention.qkv.weight
        weights.register_hook(lambda grad: grad * math.inf)
        if not late:
            monkeypatch.setattr(update, "skips_on_device", lambda optimizer: False)
        with pytest.raises(NumericalError) as caught:
            train(task, options(tmp_path / str(late), log_every=1))
        said.append(str(caught.value))
        assert task.average.copies == 0 and task.scaler.updates in (3, 3 + late)
    assert said[0] == said[1] and "3 updates in a row, the last at step 2" in said[0]
    assert rows(tmp_path / "True") == rows(tmp_path / "False")


def test_an_error_of_the_next_step_saves_the_step_before(tmp_path):
    """What hangs on the last update has happened in the checkpoint that the error leaves."""
    task, whole = TASKS["plateau"](), TASKS["plateau"]()
    batch = task.batch

    def missing(step):
        if step == 4:
            raise DataError("toy: no more pictures")
        return batch(step)

    task.batch = missing
    with pytest.raises(DataError):
        train(task, options(tmp_path / "broken"))
    assert [p.name for p in checkpoints(tmp_path / "broken")] == ["step-00000004"]
    task = TASKS["plateau"]()
    train(task, options(tmp_path / "broken"))
    train(whole, options(tmp_path / "whole"))
    assert state_hash(task) == state_hash(whole) and task.plateau.halvings > 1
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")


def test_a_numerical_error_wins_over_one_of_the_next_step(tmp_path):
    def spoil(task, step):
        if step == 2:
            task.model[3].weight.data.fill_(math.nan)
        if step == 3:
            raise DataError("tiny: no more data")

    with pytest.raises(NumericalError, match="loss must be finite, got nan at step 2"):
        train(Fused("fused", before=spoil), config(tmp_path))
    assert checkpoints(tmp_path) == []


def test_copies_are_of_the_moment_and_know_when_they_are_there():
    source = torch.arange(6).view(2, 3)
    copy = HostCopy({"a": source, "b": 1.5, "c": torch.tensor(True), "none": torch.zeros(0)})
    source.zero_()
    assert copy.ready()
    values = copy.read()
    assert list(values) == ["a", "b", "c", "none"] and values["b"] == 1.5
    assert values["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and values["c"] == 1
    assert values["none"].shape == (0,) and HostCopy({}).read() == {}


def test_which_optimizers_skip_on_the_device():
    p = [torch.nn.Parameter(torch.ones(2))]
    assert queued.skips_on_device(dalle_ext.AdamW16(p))
    assert queued.skips_on_device(torch.optim.AdamW(p, fused=True))
    assert not queued.skips_on_device(torch.optim.AdamW(p))
    assert not queued.skips_on_device(torch.optim.SGD(p, lr=1.0))
    p[0].grad = torch.full((2,), math.nan)
    optimizer = torch.optim.AdamW(p, fused=True)
    queued.step_unless(optimizer, torch.tensor(True))
    assert p[0].tolist() == [1, 1] and not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("name", ["plateau", "fp16-scaled", "dvae"])
def test_a_signal_flushes_and_the_training_goes_on_bit_for_bit(tmp_path, name):
    task, whole = TASKS[name](), TASKS[name]()
    step = task.train_step

    def interrupted(at):
        if at == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(at)

    task.train_step = interrupted
    with pytest.raises(TrainingInterrupted, match="after step 5 of 7"):
        train(task, options(tmp_path / "cut"))
    assert [row["step"] for row in rows(tmp_path / "cut")] == [2, 4, 5]
    task = TASKS[name]()
    train(task, options(tmp_path / "cut"))
    train(whole, options(tmp_path / "whole"))
    assert state_hash(task) == state_hash(whole)
    assert rows(tmp_path / "cut")[-1]["step"] == rows(tmp_path / "whole")[-1]["step"] == 7
    assert rows(tmp_path / "cut")[:2] == rows(tmp_path / "whole")[:2]
