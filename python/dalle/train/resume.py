"""How a training begins: from nothing, or from a checkpoint in its folder."""

from __future__ import annotations

import os
from pathlib import Path

from dalle.console import say
from dalle.errors import CheckpointError, OtherTrainingError, UsageError
from dalle.files import saving, temporary_name
from dalle.train.checkpoint import can_load, load_checkpoint
from dalle.train.config import LoopConfig
from dalle.train.manifest import checkpoints, remove_stale, step_of
from dalle.train.task import Task

FIXED_KEYS = ("model.", "ranker.", "train.optimizer", "train.quantizer")
ACCEPT_HINT = "--accept-changes goes on with this run's"


def resume(task: Task, config: LoopConfig) -> int:
    """Puts the state to begin with into `task` and returns the updates already done.

    Raises:
        CheckpointError: if the checkpoint is damaged, missing or of another training; the line
            says how to go on where there is a way.
        UsageError: if `resume` is "none" and `out` holds checkpoints, which would mix two runs.
    """
    out, world = Path(config.out), task.world
    with world.raise_on_all():
        if world.rank == 0:
            remove_stale(out)
    saved = world.first(checkpoints(out))
    if config.resume == "none":
        if saved:
            raise UsageError(
                f"train: out must hold no checkpoints with resume none, got {saved[-1]}; "
                "choose another folder or remove it"
            )
        return 0
    if config.resume == "auto" and not saved:
        return 0
    path = saved[-1] if config.resume == "auto" else Path(config.resume)
    try:
        step = load_checkpoint(task, path, accept_changes=config.accept_changes)
    except OtherTrainingError as problem:
        # Tensors of another size fit no run, nor does the state of another optimizer.
        fixed = [key for key in problem.keys if key.startswith(FIXED_KEYS)]
        hint = f"choose another out for another {fixed[0]}" if fixed else ACCEPT_HINT
        raise OtherTrainingError(f"{problem}; {hint}", problem.keys) from problem
    except CheckpointError as problem:
        older = None
        if config.resume == "auto":
            accept = config.accept_changes
            fitting = (p for p in saved[-2::-1] if can_load(task, p, accept_changes=accept))
            older = next(fitting, None)
        hint = "" if older is None else f"; --resume {older} goes on from an older one"
        raise CheckpointError(f"{problem}{hint}") from problem
    if config.resume != "auto":
        with world.raise_on_all(), saving("train", out):
            if world.rank == 0:
                set_aside_later(out, step)
    say(f"{task.name}: resumed after step {step} from {path}")
    return step


def set_aside_later(out: Path, step: int) -> None:
    """Renames checkpoints after `step` to aside-..., so that they are neither lost nor resumed."""
    for path in checkpoints(out):
        if step_of(path) > step:
            nonce = temporary_name(path).name.rpartition("-")[2]
            aside = path.with_name(f"aside-{path.name}-{nonce}")
            os.rename(path, aside)
            say(f"train: set aside {path.name} as {aside.name}")
