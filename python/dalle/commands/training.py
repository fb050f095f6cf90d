"""What the training commands share."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from dalle.console import leads
from dalle.errors import UsageError
from dalle.files import check_targets, saving
from dalle.pretrained import CONFIG_FILE, WEIGHTS_FILE, Pretrained
from dalle.train.config import LoopConfig
from dalle.train.task import Task, averaged_model


def loop_config(config: Any, steps: int) -> LoopConfig:
    """The loop's options out of a command's, which have the same names, and `steps` updates."""
    names = {field.name for field in dataclasses.fields(LoopConfig)} - {"steps"}
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in names}
    return LoopConfig(steps=steps, **given)


def check_model_target(owner: str, folder: Path) -> None:
    """Refuses, before the training, a folder that `save_model` could not write.

    Raises:
        EnvironmentProblem: in one line that begins with `owner`.
    """
    if leads() and folder.parent.is_dir():  # if not, the loop makes it or says why not
        check_targets(owner, folder / CONFIG_FILE, folder / WEIGHTS_FILE)


def save_model(owner: str, task: Task, folder: Path) -> None:
    """Writes the trained model, with the averaged weights where there are some. Collective.

    Raises:
        EnvironmentProblem: the folder cannot be written, in one line that begins with `owner`.
    """
    with task.world.agreed(), saving(owner, folder), averaged_model(task) as model:
        if model is not None:
            assert isinstance(model, Pretrained)
            model.save_pretrained(folder)


def alone(owner: str) -> None:
    """Raises UsageError where torchrun started several processes."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise UsageError(f"{owner}: processes must be 1, got WORLD_SIZE {world}")
