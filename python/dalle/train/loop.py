"""The training loop: one function, and the little a task has to bring.

A task owns model, optimizer and data; the loop owns resuming, metrics, pictures, checkpoints and
signals. Everything random in a step comes from `step_seed(seed, step)`, so a resumed run repeats
the uninterrupted one bit for bit:

    class LineTask:
        name = "line"
        def __init__(self, seed: int = 0) -> None:
            self.model, self.seed = nn.Linear(1, 1), seed
            self.optimizer = torch.optim.AdamW(self.model.parameters())
            self.average, self.cluster = IterateAverage(self.model, 0.999), None
        def describe(self) -> dict[str, Any]:
            return {"features": 1, "seed": self.seed}
        def train_step(self, step: int) -> dict[str, float | Tensor]:
            rng = torch.Generator().manual_seed(step_seed(self.seed, step))
            x = torch.randn(8, 1, generator=rng)
            loss = (self.model(x) - 3 * x).square().mean()
            norm = update(self, loss, step, lr=linear_warmup(step, 1e-3, 10), clip_norm=4.0)
            return {"loss": loss.detach(), "grad_norm": norm, "images": 8}
        def pictures(self, step: int) -> dict[str, Tensor]: return {}
        def state(self) -> dict[str, Any]: return {}
        def load_state(self, state: dict[str, Any]) -> None: pass

    result = train(LineTask(), LoopConfig(out=Path("out/line"), steps=100))
"""

from __future__ import annotations

import operator
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dalle.averaging import IterateAverage
from dalle.configs import check_numbers, require, seed_number, whole
from dalle.errors import Interrupted
from dalle.files import make_folder
from dalle.train.metrics import Metrics, say
from dalle.train.run import (
    Saver,
    StepWatch,
    agreed,
    alone_in,
    answering,
    can_be_saved,
    resume,
    settings,
    signals,
    write_pictures,
)
from dalle.train.update import check_loss

if TYPE_CHECKING:
    from dalle.distributed.cluster import Cluster

FIRST_SHARE = 0.1  # of the first weights in the averaged ones, above which it is said


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long to train, what to write, and how to begin.

    Args:
        out: folder for checkpoints, metrics and pictures; made if missing.
        steps: updates in all, those of a resumed run included.
        log_every: updates between records of metrics.jsonl.
        checkpoint_every: updates between checkpoints; one is also written at the end.
        keep: newest checkpoints kept.
        picture_every: updates between pictures; 0 draws none.
        resume: "auto" (the newest checkpoint in `out`, if any), "none" (a fresh start, refused if
            `out` holds checkpoints) or the path of a checkpoint.
        accept_changes: whether the checkpoint may be of other options, data or models, as far as
            its tensors fit; what differs is said.
        seed: for everything random.
        deterministic: same bits on every run, at the price of slower kernels on a GPU.
    """

    out: Path
    steps: int
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 3
    picture_every: int = 500
    resume: str = "auto"
    accept_changes: bool = False
    seed: int = 0
    deterministic: bool = False

    def __post_init__(self) -> None:
        check_numbers("train", self)
        least = {"steps": 0, "log_every": 1, "checkpoint_every": 1, "keep": 1, "picture_every": 0}
        for name, low in least.items():
            require("train", self, f"{low} or more", partial(operator.le, low), name)
        require("train", self, "0 .. 2^63 - 1", lambda x: 0 <= x < 2**63, "seed")


class Task(Protocol):
    """What is trained; plain attributes will do for the properties."""

    @property
    def name(self) -> str:
        """Shown in front of every line, e.g. "dvae"; a checkpoint of another is refused."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    @property
    def average(self) -> IterateAverage | None:
        """The averaged weights, or None."""

    @property
    def cluster(self) -> Cluster | None:
        """The processes that train together, each its own task; None where there is but one."""

    def describe(self) -> dict[str, Any]:
        """JSON values that fix the training; a checkpoint with others is refused."""

    def train_step(self, step: int) -> Mapping[str, float | Tensor]:
        """One update (see `train.update`) on a batch that is a pure function of `step` (from 0).

        Returns scalars by name: "loss" always, "images" where images are counted; on many
        processes the same on all.
        """

    def pictures(self, step: int) -> dict[str, Tensor]:
        """Name -> (3, H, W) in [0, 1]; written as out/pictures/NAME-STEP.png.

        Called on all processes; all but process 0 return none.
        """

    def state(self) -> dict[str, Any]:
        """JSON values needed to go on besides model, optimizer, average and global generators."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes `state()` back."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended: updates done, seconds of this run, last record of the metrics."""

    step: int
    seconds: float
    interrupted: bool
    metrics: dict[str, Any] = field(default_factory=dict)


class TrainingInterrupted(Interrupted):
    """A signal stopped `train` after its checkpoint was written; `result` says how far it got."""

    def __init__(self, message: str, result: TrainResult) -> None:
        super().__init__(message)
        self.result = result


def step_seed(seed: int, step: int, stream: int = 0, *place: int) -> int:
    """A 63-bit seed for step `step`; others for other `stream`s, and places in a batch.

    Raises:
        UsageError: a negative number, or a seed above 63 bits.
    """
    given = [("stream", stream), ("step", step), *(("place", number) for number in place)]
    key = [whole("step_seed", name, number, 0) for name, number in given]
    sequence = np.random.SeedSequence(seed_number("step_seed", seed), spawn_key=key)
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def start_seed(seed: int, name: str) -> int:
    """A 63-bit seed for what is drawn once, under a name of its own: first weights, a codebook.

    No two seeds share it, nor do two names. (Torch's generator on the CPU reads 32 bits of a seed,
    so 0 and 2^32 are the same to it; of this they get different ones.)
    """
    return step_seed(seed, 0, 2**32 - 1, zlib.crc32(name.encode()))


def train(task: Task, config: LoopConfig) -> TrainResult:
    """Trains `task` until `config.steps` updates are done.

    Raises:
        TrainingInterrupted: after SIGINT, SIGTERM or SIGHUP, with the step finished and its
            checkpoint written. A second SIGINT or SIGTERM ends the process at once.
        NumericalError: if loss or gradients are not finite; the last checkpoint stays.
        UsageError: if another training writes into `out`.
        CheckpointError: if the checkpoint to resume from is damaged or of another training.
        EnvironmentProblem: if `out` cannot be made, or the last checkpoint cannot be written, or
            a process of the cluster does not answer.
        Exception: whatever the task raises. A checkpoint is written first, unless the task was in
            the middle of an update; of many processes only for what all raise (`agreed`), such as
            the DataError of one of them.
    """
    cluster, step, stop = task.cluster, 0, False
    with agreed(cluster):
        out = make_folder(config.out, "train")
    with (
        alone_in(out, task) as lock,
        settings(start_seed(config.seed, "global"), config.deterministic),
        signals() as received,
        answering(cluster, lambda: step),
    ):
        step = resume(task, config)
        saver = Saver(task, out, config.keep)
        with agreed(cluster):
            metrics = Metrics(out, name=task.name, start=step, steps=config.steps)
        if step > config.steps:
            say(f"{task.name}: {step} updates are done already, more than steps {config.steps}")
        start, watch = step, StepWatch(task)
        try:
            task.model.train()
            while step < config.steps:
                watch.begin()
                values = task.train_step(step)
                check_loss(task.name, values["loss"], step)
                step += 1
                watch.end()
                metrics.add(values)
                stop = bool(received) if cluster is None else cluster.any(bool(received))
                last = stop or step >= config.steps
                record = last or step % config.log_every == 0
                save = last or step % config.checkpoint_every == 0
                draw = config.picture_every > 0 and step % config.picture_every == 0
                if record or save or draw:
                    with agreed(cluster):
                        if lock is not None:
                            lock.renew()
                if record:
                    metrics.write(step, task.optimizer.param_groups[0]["lr"])
                if save:
                    saver.save(step, last=last)
                if draw:
                    write_pictures(task, step, out / "pictures")
                if stop:
                    break
        except Exception as problem:
            if step > start and can_be_saved(task, problem, watch, lock):
                saver.rescue(step)
            raise
        finally:
            watch.close()
            metrics.close()
        interrupted = step < config.steps and stop
        result = TrainResult(
            step=step, seconds=metrics.seconds, interrupted=interrupted, metrics=metrics.last
        )
    average = None if interrupted or step == start else task.average
    share = 0.0 if average is None else average.first_share
    if share > FIRST_SHARE:
        say(
            f"{task.name}: {share:.0%} of the averaged weights are still those of the start: train "
            "longer, or average with a warm-up (average_warmup) or a smaller average_decay"
        )
    if interrupted:
        raise TrainingInterrupted(
            f"{task.name}: stopped by {received[0] if received else 'another process'} after step "
            f"{step} of {config.steps}, checkpoint written; the same command goes on",
            result,
        )
    return result
