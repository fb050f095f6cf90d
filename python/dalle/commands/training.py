"""Functions that the training commands share."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dalle.config_files import CONFIG_NAME, write_resolved
from dalle.console import is_main_process
from dalle.errors import CheckpointError, UsageError
from dalle.files import check_targets, read_object
from dalle.pretrained import CONFIG_FILE, WEIGHTS_FILE


def check_model_target(owner: str, folder: Path, kind: type) -> None:
    """Refuses, before the training, a folder that could not be written, or should not.

    Raises:
        EnvironmentProblem: in one line that begins with `owner`.
        UsageError: the training's folder holds a model, or `folder` one of another `kind`.
    """
    check_not_taken(owner, folder.parent)
    check_not_taken(owner, folder, kind)
    if is_main_process() and folder.parent.is_dir():  # if not, the loop makes it or says why not
        check_targets(owner, folder / CONFIG_FILE, folder / WEIGHTS_FILE)


def check_not_taken(owner: str, folder: Path, kind: type | None = None) -> None:
    """Refuses, before the work, a folder with a config.json that is not of a model of `kind`.

    Raises:
        UsageError: in one line that begins with `owner`.
    """
    if not is_main_process() or not os.path.isfile(folder / CONFIG_FILE):
        return
    class_name = None
    with suppress(CheckpointError):
        class_name = read_object(folder / CONFIG_FILE, CheckpointError).get("class")
    if kind is None or class_name != kind.__name__:
        content = f"a {class_name}" if isinstance(class_name, str) else f"another {CONFIG_FILE}"
        raise UsageError(f"{owner}: out must be a folder of its own, got {folder} with {content}")


def keep_options(owner: str, config: Any, out: Path) -> Callable[[int], None]:
    """What a training does when it begins: writes the options of the run to OUT/config.yaml.

    Given back with `--config`, they repeat the run. Options that a training refuses to go on with
    do not replace those it began with.
    """
    return lambda _: write_resolved(config, out / CONFIG_NAME, owner=owner)


def require_one_process(owner: str) -> None:
    """Raises UsageError where torchrun started several processes."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise UsageError(f"{owner}: processes must be 1, got WORLD_SIZE {world}")
