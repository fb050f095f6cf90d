"""Functions that the training commands share."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dalle.config_files import CONFIG_NAME, value_of_run, write_resolved
from dalle.console import is_main_process
from dalle.errors import CheckpointError, OtherTrainingError, UsageError
from dalle.files import check_targets, read_object
from dalle.pretrained import CONFIG_FILE, WEIGHTS_FILE
from dalle.train.config import LoopConfig
from dalle.train.manifest import checkpoints


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


def require_recipe_of_run(owner: str, recipe: str, loop: LoopConfig, processes: int) -> None:
    """Refuses, before the work, to go on from a checkpoint of the other recipe: nearly all that
    fixes a training differs, and what was left out may be why (one process or several).

    Raises:
        OtherTrainingError: in one line that says what to type.
    """
    if loop.accept_changes or loop.resume == "none":
        return
    folder = loop.out if loop.resume == "auto" else Path(loop.resume).parent
    then = value_of_run(folder / "model", "recipe") if checkpoints(folder) else ""
    if then == recipe or then not in ("quick", "paper"):
        return
    alone = {name: value_of_run(folder / "model", name) for name in ("parts", "optimizer")}
    several = f", as on {processes} processes" if processes > 1 and recipe == "paper" else ""
    hint = f"type --recipe {then}"
    if several and (alone["parts"] not in ("", "1") or alone["optimizer"] == "muon"):
        hint = "go on with one process, or choose another out"
    raise OtherTrainingError(
        f"{owner}: recipe must be {then} as in the run of {folder}, got {recipe}{several}; {hint}",
        ["recipe"],
    )


def require_one_process(owner: str) -> None:
    """Raises UsageError where torchrun started several processes."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise UsageError(f"{owner}: processes must be 1, got WORLD_SIZE {world}")
