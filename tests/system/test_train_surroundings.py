"""R29: signals, errors, closed pipes, and two trainings in one folder."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys

import pytest
import torch

from dalle.console import is_main_process
from dalle.distributed.config import ClusterConfig
from dalle.distributed.world import Solo, join
from dalle.errors import DataError, EnvironmentProblem, UsageError
from dalle.train import lock as locks
from dalle.train.lock import FolderLock
from dalle.train.loop import TrainingInterrupted, train
from dalle.train.manifest import checkpoints
from dalle.train.metrics import read_metrics
from dalle.train.saver import StepWatch
from support.tiny_task import TinyTask, config, state_hash


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bits of a training that nothing disturbs."""
    task = TinyTask()
    train(task, config(tmp_path_factory.mktemp("whole")))
    return state_hash(task)


def at(step, action):
    """What `TinyTask` calls before its update `step`."""
    return lambda task, now: action() if now == step else None


def names(folder):
    return [path.name for path in checkpoints(folder)]


class Closed(io.StringIO):
    """A stream whose reader has gone."""

    def write(self, _):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_closed_terminal_saves_however_often_it_says_so(tmp_path, whole):
    def hang_up():
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        with pytest.raises(TrainingInterrupted, match="SIGHUP after step 5 of 20") as caught:
            train(TinyTask(before=at(4, hang_up)), config(tmp_path, checkpoint_every=100))
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
    assert caught.value.exit_code == 6 and names(tmp_path) == ["step-00000005"]
    task = TinyTask()
    train(task, config(tmp_path))
    assert state_hash(task) == whole


def test_under_nohup_it_goes_on(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        hang_up = at(4, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert train(TinyTask(before=hang_up), config(tmp_path)).step == 20
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("error", [DataError("gone"), BrokenPipeError("x"), RuntimeError("bug")])
def test_an_error_in_a_step_saves_first(tmp_path, whole, capsys, error):
    def fail():
        torch.rand(3)  # the generator has moved when it happens
        raise error

    with pytest.raises(type(error)) as caught:
        train(TinyTask(before=at(7, fail)), config(tmp_path, checkpoint_every=5))
    assert caught.value is error and names(tmp_path) == ["step-00000005", "step-00000007"]
    line = "tiny: an error ends the training: checkpoint after step 7 written; the same command"
    assert line in capsys.readouterr().err
    task = TinyTask()
    train(task, config(tmp_path))
    assert state_hash(task) == whole


def test_an_error_in_the_middle_of_an_update_is_not_saved(tmp_path, capsys):
    def fail():
        task.average.update = lambda step: 1 / 0

    task = TinyTask(before=at(7, fail))
    with pytest.raises(ZeroDivisionError):
        train(task, config(tmp_path, checkpoint_every=5))
    assert names(tmp_path) == ["step-00000005"] and "an error ends" not in capsys.readouterr().err


def test_buffers_that_a_step_has_moved_are_noticed():
    task = TinyTask()
    watch = StepWatch(task)
    watch.begin()
    state = torch.get_rng_state()
    torch.rand(1)
    assert watch.undo() and torch.equal(torch.get_rng_state(), state)
    task.model(torch.randn(4, 3))  # running means
    assert not watch.undo()
    watch.close()


def test_an_error_right_after_a_save_or_at_once_saves_nothing(tmp_path, monkeypatch):
    def fail():
        raise DataError("gone")

    with pytest.raises(DataError):
        train(TinyTask(before=at(0, fail)), config(tmp_path))
    assert names(tmp_path) == []
    with pytest.raises(DataError):
        train(TinyTask(before=at(5, fail)), config(tmp_path))
    assert names(tmp_path) == ["step-00000005"]


def test_a_rescue_that_fails_hides_nothing(tmp_path, monkeypatch, capsys):
    def fail():
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
        raise DataError("gone")

    with pytest.raises(DataError, match="gone"):
        train(TinyTask(before=at(7, fail)), config(tmp_path))
    assert "checkpoint after step 7 not saved: full" in capsys.readouterr().err


def test_a_reader_that_leaves_ends_nothing(tmp_path, whole, monkeypatch):
    """As in `dalle prior train ... 2>&1 | head`."""
    task = TinyTask(before=at(3, lambda: monkeypatch.setattr(sys, "stderr", Closed())))
    result = train(task, config(tmp_path))
    assert result.step == 20 and state_hash(task) == whole
    assert names(tmp_path)[-1] == "step-00000020"
    for stream in (None, io.StringIO()):
        if stream is not None:
            stream.close()
        monkeypatch.setattr(sys, "stderr", stream)
        assert train(TinyTask(), config(tmp_path, steps=22)).step == 22


def test_a_second_training_in_the_folder_is_refused_by_name(tmp_path, whole):
    said = []

    def second():
        with torch.random.fork_rng(), pytest.raises(UsageError) as caught:
            train(TinyTask(), config(tmp_path))
        said.append(str(caught.value))

    task = TinyTask(before=at(7, second))
    train(task, config(tmp_path))
    line = f"tiny: out must be used by one training at a time, got {tmp_path}, where process "
    assert said[0].startswith(f"{line}{os.getpid()} on {socket.gethostname()} trains")
    assert state_hash(task) == whole and not (tmp_path / locks.LOCK_FILE).exists()


def test_the_lock_of_a_crash_is_no_lock(tmp_path, capsys):
    gone = {"process": 2**22 + 1, "host": socket.gethostname(), "began": 1}
    (tmp_path / locks.LOCK_FILE).write_text(json.dumps(gone))
    assert train(TinyTask(), config(tmp_path)).step == 20
    line = f"tiny: process {2**22 + 1} on {socket.gethostname()} has left {tmp_path} without an end"
    assert line in capsys.readouterr().err
    for content in (b"", b"\0\xff[", b"[1]", b'{"process": "x"}'):
        (tmp_path / locks.LOCK_FILE).write_bytes(content)
        FolderLock(tmp_path, "x").release()


def test_a_process_that_reads_pictures_does_not_keep_the_lock_of_one_that_was_killed(tmp_path):
    lock = FolderLock(tmp_path, "x")
    go_on, began = multiprocessing.Event(), multiprocessing.Event()
    reader = multiprocessing.get_context("fork").Process(
        target=lambda: (began.set(), go_on.wait(30))
    )
    reader.start()
    try:
        assert began.wait(30) and lock.held
        with pytest.raises(UsageError, match="one training at a time"):
            FolderLock(tmp_path, "y")
        os.close(lock._handle)  # as the kernel does for a process that is killed
        lock._handle = None
        FolderLock(tmp_path, "y").release()
    finally:
        go_on.set()
        reader.join()


@pytest.mark.parametrize(
    ("named", "free"),
    [
        ({}, True),
        ({"process": os.getpid()}, False),
        ({"process": os.getpid(), "began": 1}, True),  # the number was given again
        ({"process": 2**22 + 1}, True),
        ({"process": 1, "host": "elsewhere"}, False),
    ],
)
def test_without_locks_of_the_kernel_the_named_process_decides(tmp_path, monkeypatch, named, free):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    if named:
        named = {"host": socket.gethostname(), **named}
        (tmp_path / locks.LOCK_FILE).write_text(json.dumps(named))
    if free:
        with pytest.raises(UsageError, match=f"process {os.getpid()} on"):
            FolderLock(tmp_path, "x") and FolderLock(tmp_path, "y")
    else:
        with pytest.raises(UsageError, match=f"where process {named['process']} on"):
            FolderLock(tmp_path, "x")


def test_a_folder_that_is_removed_is_noticed_at_the_next_record(tmp_path, capsys, whole):
    out, said = tmp_path / "out", {}

    def before(task, step):
        if step == 6:
            shutil.rmtree(out)
        said[step] = capsys.readouterr().err

    task = TinyTask(before=before)
    assert train(task, config(out)).step == 20 and state_hash(task) == whole
    line = f"tiny: {out} was removed or moved while training; "
    assert line not in said[7] and line in said[8]
    assert sum(text.count(line) for text in said.values()) == 1
    assert [record["step"] for record in read_metrics(out / "metrics.jsonl")][0] == 8
    assert names(out) == ["step-00000010", "step-00000015", "step-00000020"]


def test_a_lock_that_is_removed_is_made_again(tmp_path, capsys):
    (path := tmp_path / locks.LOCK_FILE).touch()
    train(TinyTask(before=at(6, path.unlink)), config(tmp_path))
    said = capsys.readouterr().err
    assert said.count(f"tiny: {path} was removed while training; it is made again") == 1
    assert "or moved" not in said and names(tmp_path)[-1] == "step-00000020"


def test_a_folder_that_cannot_be_made_again_is_told_once(tmp_path, capsys):
    out = tmp_path / "deep" / "out"

    def remove():
        shutil.rmtree(tmp_path / "deep")
        (tmp_path / "deep").write_text("in the way")

    with pytest.raises(EnvironmentProblem, match="checkpoint after step 20 not saved"):
        train(TinyTask(before=at(6, remove)), config(out))
    assert capsys.readouterr().err.count("was removed or moved") == 1


def test_a_folder_that_another_training_took_over_is_left_alone(tmp_path):
    out, other = tmp_path / "out", []

    def take_over():
        shutil.rmtree(out)
        out.mkdir()
        other.append(FolderLock(out, "other"))

    with pytest.raises(UsageError, match="out must be used by one training at a time"):
        train(TinyTask(before=at(6, take_over)), config(out))
    assert [path.name for path in out.iterdir()] == [locks.LOCK_FILE]
    other[0].release()


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"RANK": "1"}, "RANK must come with the WORLD_SIZE .* got RANK 1 and WORLD_SIZE none"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "got RANK 1 and WORLD_SIZE 1; unset RANK"),
        ({"RANK": "x"}, "RANK must be a number, as torchrun sets it, got 'x'"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE must be a number"),
        ({"WORLD_SIZE": "2"}, "RANK must be set where WORLD_SIZE is"),
        ({"RANK": "0"}, None),
    ],
)
def test_variables_that_are_not_torchruns_are_refused(monkeypatch, variables, line):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if variables.get("WORLD_SIZE", "1") == "1":
        assert is_main_process()  # a training that Python starts is not silent either
    if line is None:
        with join(ClusterConfig(), torch.device("cpu")) as cluster:
            assert isinstance(cluster, Solo)
        return
    with pytest.raises(UsageError, match=line), join(ClusterConfig(), torch.device("cpu")):
        pass
