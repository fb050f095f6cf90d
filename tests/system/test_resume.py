"""R11, R12: equal seeds give equal bits; a stopped run resumes bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from dalle.errors import CheckpointError, UsageError
from dalle.train.loop import TrainingInterrupted, train
from dalle.train.manifest import checkpoints, remove_stale
from dalle.train.metrics import read_metrics
from support.processes import child_environment
from support.tiny_task import TinyTask, config, state_hash

CHILD = """
import sys, time
from support.tiny_task import TinyTask, config, state_hash
from dalle.train.loop import train

def before(task, step):
    print("step", step, flush=True)
    time.sleep({pause})

task = TinyTask(before=before)
train(task, config(sys.argv[1], checkpoint_every=1, **{changes!r}))
print("hash", state_hash(task), flush=True)
"""


class Killed(BaseException):
    """Stands for the kill: nothing of the loop runs after it but finally blocks."""


def kill_at(cut):
    def before(task, step):
        if step == cut:
            raise Killed

    return before


def child(out, *, pause=0.0, **changes):
    threads = str(torch.get_num_threads())  # sums, and so bits, hang on the number of threads
    code = CHILD.format(pause=pause, changes=changes)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=child_environment(OMP_NUM_THREADS=threads),
    )  # fmt: skip


def wait_for_step(process, step):
    for line in process.stdout:
        if line.strip() == f"step {step}":
            return


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    task = TinyTask()
    train(task, config(tmp_path_factory.mktemp("whole"), deterministic=True))
    return task, state_hash(task)


def test_same_seed_same_bits_ten_times(tmp_path, whole):
    hashes = set()
    for i in range(10):
        task = TinyTask()
        train(task, config(tmp_path / str(i), deterministic=True, steps=50, checkpoint_every=50))
        hashes.add(state_hash(task))
    assert len(hashes) == 1 and hashes != {whole[1]}


def test_other_seed_other_bits(tmp_path, whole):
    task = TinyTask(seed=1)
    train(task, config(tmp_path))
    assert state_hash(task) != whole[1]


@pytest.mark.parametrize("cut", [7, 10, 13])
def test_resume_is_bit_exact(tmp_path, whole, cut):
    first = TinyTask(before=kill_at(cut))
    with pytest.raises(Killed):
        train(first, config(tmp_path, checkpoint_every=7))
    start = cut // 7 * 7
    second = TinyTask()
    result = train(second, config(tmp_path, checkpoint_every=7))
    assert result.step == 20
    assert state_hash(second) == whole[1]
    assert first.batches[:start] + second.batches == whole[0].batches  # the sample order too
    steps = [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == 20


@pytest.mark.slow
def test_resume_after_a_real_kill(tmp_path, whole):
    process = child(tmp_path, pause=0.02)
    wait_for_step(process, 7)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert 6 <= int(checkpoints(tmp_path)[-1].name[5:]) < 20
    task = TinyTask()
    train(task, config(tmp_path))
    assert state_hash(task) == whole[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_the_second_ends_at_once(tmp_path, whole, number):
    process = child(tmp_path, pause=0.3)
    wait_for_step(process, 2)
    process.send_signal(number)
    begin = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - begin < 30
    assert process.returncode == 1 and "TrainingInterrupted" in errors  # the CLI makes it 6
    assert checkpoints(tmp_path)[-1].name == "step-00000003"
    task = TinyTask()
    train(task, config(tmp_path))
    assert state_hash(task) == whole[1]

    process = child(tmp_path / "again", pause=20)
    wait_for_step(process, 0)
    process.send_signal(number)
    assert "once more" in process.stderr.readline()
    process.send_signal(number)
    begin = time.monotonic()
    process.communicate(timeout=30)
    assert process.returncode == -number and time.monotonic() - begin < 10


def test_interrupt_carries_the_result_and_restores_handlers(tmp_path):
    def before(task, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match="SIGTERM after step 5 of 20") as caught:
        train(TinyTask(before=before), config(tmp_path))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    result = caught.value.result
    assert (result.step, result.interrupted, caught.value.exit_code) == (5, True, 6)
    assert result.metrics["step"] == 5


def test_finished_run_returns_at_once(tmp_path, whole):
    train(TinyTask(), config(tmp_path))
    task = TinyTask(before=kill_at(0))
    result = train(task, config(tmp_path))
    assert result.step == 20 and not result.interrupted and result.metrics["step"] == 20
    assert state_hash(task) == whole[1]


def test_fewer_steps_than_are_done_are_said(tmp_path, capsys):
    train(TinyTask(), config(tmp_path))
    assert train(TinyTask(), config(tmp_path, steps=7)).step == 20
    assert "tiny: 20 updates are done already, more than steps 7" in capsys.readouterr().err


def test_more_steps_go_on(tmp_path, whole):
    train(TinyTask(), config(tmp_path, steps=9))
    task = TinyTask()
    train(task, config(tmp_path))
    assert state_hash(task) == whole[1]


def test_resume_none_refuses_to_mix_runs(tmp_path):
    train(TinyTask(), config(tmp_path, steps=5))
    with pytest.raises(UsageError, match="out must hold no checkpoints with resume none"):
        train(TinyTask(), config(tmp_path, resume="none"))


def test_resume_from_a_path_sets_later_ones_aside(tmp_path, whole):
    train(TinyTask(), config(tmp_path))
    older, newest = checkpoints(tmp_path)[-2:]
    (newest / "rng.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"rng.safetensors .* --resume {older}"):
        train(TinyTask(), config(tmp_path))
    task = TinyTask()
    train(task, config(tmp_path, resume=str(older)))
    assert state_hash(task) == whole[1]
    assert len(list(tmp_path.glob("aside-step-00000020-*"))) == 1
    assert checkpoints(tmp_path)[-1].name == "step-00000020"


def test_an_older_one_is_named_only_where_it_goes_on(tmp_path, whole):
    train(TinyTask(), config(tmp_path))
    first, second, newest = checkpoints(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        train(TinyTask(width=5), config(tmp_path))
    assert str(caught.value).endswith("got 4; --accept-changes goes on with this run's")
    for path in (newest, second):
        (path / "rng.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"--resume {first} goes on from an older one$"):
        train(TinyTask(), config(tmp_path))
    (first / "state.json").unlink()
    with pytest.raises(CheckpointError, match="rng.safetensors must have .* bytes, got 0$"):
        train(TinyTask(), config(tmp_path))
    assert checkpoints(tmp_path) == [first, second, newest]


def test_what_cannot_be_accepted_gets_no_such_hint(tmp_path):
    class Wide(TinyTask):
        def describe(self):
            return {"model": {"width": self.width}}

    train(Wide(), config(tmp_path))
    with pytest.raises(CheckpointError, match="got 4; choose another out for another model.width$"):
        train(Wide(width=5), config(tmp_path))


def test_accepted_changes_go_on(tmp_path, capsys):
    train(TinyTask(), config(tmp_path, steps=5))
    result = train(TinyTask(seed=1), config(tmp_path, accept_changes=True))
    assert result.step == 20 and "seed from 0 to 1" in capsys.readouterr().err
    assert train(TinyTask(seed=1), config(tmp_path, steps=21)).step == 21


def test_missing_path_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="manifest.json must be readable") as caught:
        train(TinyTask(), config(tmp_path, resume=str(tmp_path / "step-00000009")))
    assert "\n" not in str(caught.value)


def test_stale_folders_are_removed(tmp_path):
    (tmp_path / "step-00000009.tmp-0a1b").mkdir()
    (tmp_path / "mine.tmp-0a1b").mkdir()
    assert [p.name for p in remove_stale(tmp_path)] == ["step-00000009.tmp-0a1b"]
    assert [p.name for p in tmp_path.iterdir()] == ["mine.tmp-0a1b"]
