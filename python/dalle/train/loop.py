"""The training loop: one function, and the little a task has to bring.

A task owns model, optimizer and data; the loop owns resuming, metrics, pictures, checkpoints and
signals. Everything random in a step comes from `step_seed(seed, step)`, so a resumed run repeats
the uninterrupted one bit for bit:

    from dalle.train.averaging import IterateAverage
    from dalle.distributed.world import Solo
    from dalle.train.schedules import linear_warmup
    from dalle.train.config import LoopConfig
    from dalle.train.loop import train
    from dalle.train.seeds import step_seed
    from dalle.train.update import update

    class LineTask:
        name = "line"
        def __init__(self, seed: int = 0) -> None:
            self.model, self.seed = nn.Linear(1, 1), seed
            self.optimizer = torch.optim.AdamW(self.model.parameters())
            self.average, self.world = IterateAverage(self.model, 0.999), Solo()
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

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dalle.console import is_main_process, say
from dalle.data.loader import StepLoader
from dalle.errors import DataError, EnvironmentProblem, Interrupted, NumericalError
from dalle.files import make_folder
from dalle.pictures import save_png, to_uint8
from dalle.precision.queued import Values
from dalle.train.averaging import FIRST_SHARE
from dalle.train.config import LoopConfig
from dalle.train.held_out import held_out_scores
from dalle.train.late import reading_late
from dalle.train.lock import training_lock
from dalle.train.metrics import Metrics
from dalle.train.resume import resume
from dalle.train.saver import Saver, StepWatch, can_be_saved, may_be_read
from dalle.train.seeds import reproducible, start_seed
from dalle.train.signals import signals
from dalle.train.task import Task
from dalle.train.update import check_loss


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


def train(
    task: Task, config: LoopConfig, *, begun: Callable[[int], None] | None = None
) -> TrainResult:
    """Trains `task` until `config.steps` updates are done.

    Args:
        task: what is trained.
        config: how long, and what is written.
        begun: called on process 0 after the first update of this run, with the number of updates
            done; where that fails, the folder stays as it was.

    Raises:
        TrainingInterrupted: after SIGINT, SIGTERM or SIGHUP, with the step finished and its
            checkpoint written. A second SIGINT or SIGTERM ends the process at once.
        NumericalError: if loss or gradients are not finite; the last checkpoint stays, and the
            weights are those before that step. Known a step later where the optimizer can skip an
            update on the device (`train.late`).
        UsageError: if another training writes into `out`.
        CheckpointError: if the checkpoint to resume from is damaged or of another training.
        EnvironmentProblem: if `out` cannot be made, or the last checkpoint cannot be written, or
            a process of the cluster does not answer.
        Exception: whatever the task raises. A checkpoint is written first, unless the task was in
            the middle of an update; of many processes only if it is raised on all of them, as the
            DataError of one is.
    """
    world, step, stop = task.world, 0, False
    with world.raise_on_all():
        out = make_folder(config.out, "train")
    with (
        training_lock(out, task) as lock,
        reproducible(start_seed(config.seed, "global"), config.deterministic),
        signals() as received,
        world.explained(lambda: step),
    ):
        step = resume(task, config)
        saver = Saver(task, out, config.keep)
        with world.raise_on_all():
            metrics = Metrics(out, name=task.name, start=step, steps=config.steps)
        if step > config.steps:
            say(f"{task.name}: {step} updates are done already, more than steps {config.steps}")
        start, watch = step, StepWatch(task)
        world.watch(received)

        def done(at: int, values: Values, lr: float | None, ended: float) -> None:
            check_loss(task.name, values["loss"], at)
            metrics.add(values)
            if lr is not None:
                metrics.write(at + 1, lr, ended=ended)

        with reading_late(task, done) as reads:
            try:
                task.model.train()
                while step < config.steps:
                    watch.begin()
                    values = task.train_step(step)
                    step += 1
                    watch.end()
                    first = begun is not None and step == start + 1
                    stop = world.stop_requested()
                    last = stop or step >= config.steps
                    score = config.validate_every > 0 and (
                        last or step % config.validate_every == 0
                    )
                    record = last or score or step % config.log_every == 0
                    save = last or step % config.checkpoint_every == 0
                    draw = config.picture_every > 0 and step % config.picture_every == 0
                    at_once = first or score or save or draw  # needs what hangs on the update
                    lr = task.optimizer.param_groups[0]["lr"]
                    queued = reads.close(step - 1, values, lr if record and not at_once else None)
                    if at_once:
                        reads.settle()
                    if begun is not None and first:
                        with world.raise_on_all():
                            if is_main_process():
                                begun(step)
                    if record or save or draw:
                        with world.raise_on_all():
                            if lock is not None:
                                lock.renew()
                    if record and (at_once or not queued):
                        scores = held_out_scores(task, step) if score else {}
                        metrics.write(step, lr, scores)
                    if save:
                        saver.save(step, last=last)
                    if draw:
                        write_pictures(task, step, out / "pictures")
                    if stop:
                        break
            except Exception as problem:
                if may_be_read(task, problem):
                    reads.settle()
                if step > start and can_be_saved(task, problem, watch, lock):
                    saver.save_on_error(step)
                raise
            finally:
                watch.close()
                if isinstance(loader := getattr(task, "loader", None), StepLoader):
                    loader.close()
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


def write_pictures(task: Task, step: int, folder: Path) -> None:
    """Writes `task.pictures(step)` as folder/NAME-STEP.png, the model in evaluation mode."""
    was_training = task.model.training
    task.model.eval()
    try:
        with torch.no_grad():
            pictures = task.pictures(step)
        for name, picture in pictures.items():
            image = Image.fromarray(to_uint8(picture))
            save_png(folder / f"{name}-{step:08d}.png", image)
    except (EnvironmentProblem, DataError, NumericalError) as problem:
        say(f"{task.name}: pictures after step {step} not written: {problem}")
    finally:
        task.model.train(was_training)
    task.world.barrier()  # the others wait for process 0, however long it draws
