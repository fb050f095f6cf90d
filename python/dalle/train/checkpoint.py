"""Checkpoints: a folder `step-00000500` that is there whole or not at all.

Written as `step-N.tmp-NONCE`: each file is written and fsynced, `manifest.json` (with the SHA-256
and size of every other file) comes last, then the folder is fsynced, read back and verified,
renamed to `step-N`, and the parent fsynced. The latest checkpoint is computed, never pointed to:
the highest number. Old ones are pruned only after the new one is there.

    step-00000500/
      model.safetensors  optimizer.safetensors  average.safetensors  rng.safetensors
      state.json       the task's own state; for the other files, what is not a tensor
      manifest.json    format, step, versions, the task's description, hashes

A checkpoint of many processes (`checkpoint_shards`) has `shards/` in place of the first three.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dalle import __version__
from dalle.configs import whole
from dalle.errors import CheckpointError, DalleError, OtherTrainingError
from dalle.files import (
    check_regular,
    parse_json,
    read_bytes,
    read_json,
    sha256,
    sync_folder,
    temporary_name,
    to_json,
    write_synced,
)
from dalle.memory import is_refusal
from dalle.pretrained import load_tensors, tensors_from_bytes, tensors_to_bytes
from dalle.train.metrics import say
from dalle.train.tree import pack_tree, rng_state, set_rng_state, unpack_tree

if TYPE_CHECKING:
    from dalle.train.loop import Task

FORMAT = 1
SHARDS = "shards"
MANIFEST = "manifest.json"
STATE = "state.json"
ALL = slice(None)
_NAME = re.compile(r"step-(\d{8,})")
_STALE = re.compile(r"step-\d{8,}\.tmp-[0-9a-f]+")


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` updates."""
    return f"step-{step:08d}"


def checkpoints(root: Path) -> list[Path]:
    """Folders in `root` with a checkpoint's name, oldest first; not verified."""
    return sorted((p for p in root.glob("step-*") if _NAME.fullmatch(p.name)), key=step_of)


def step_of(path: Path) -> int:
    """The number of updates in a checkpoint's folder name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"checkpoint: folder must be named step-N, got {path}")
    return int(match[1])


def remove_stale(root: Path) -> list[Path]:
    """Removes what an interrupted save left in `root`, and returns it."""
    stale = [p for p in root.glob("step-*.tmp-*") if _STALE.fullmatch(p.name)]
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
    return stale


def task_state(task: Task) -> dict[str, Any]:
    """Everything a checkpoint holds besides the model's weights."""
    state = {
        "optimizer": task.optimizer.state_dict(),
        "average": None if task.average is None else task.average.state_dict(),
        "rng": rng_state(),
        "task": task.state(),
    }
    if task.cluster is not None and task.cluster.psgd is not None:
        state["powersgd"] = task.cluster.psgd.state_dict()
    return state


def save_checkpoint(task: Task, root: Path, step: int, *, keep: int = 3) -> Path:
    """Writes the checkpoint after `step` updates into `root` and prunes to the newest `keep`.

    Raises:
        OSError: if the disk is full, not writable or failing; older checkpoints are untouched.
        CheckpointError: if what was written does not read back.
    """
    step, keep = whole("checkpoint", "step", step, 0), whole("checkpoint", "keep", keep, 1)
    if task.cluster is not None:
        from dalle.train import checkpoint_shards

        return checkpoint_shards.save(task, task.cluster, root, step, keep=keep)
    final = root / checkpoint_name(step)
    temporary = temporary_name(final)
    try:
        os.mkdir(temporary)
        _write_files(task, temporary, step)
        publish(temporary, final, keep)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def publish(temporary: Path, final: Path, keep: int, part: slice = ALL) -> None:
    """Verifies `part` of a written checkpoint's files, gives it its name, prunes to `keep`."""
    sync_folder(temporary)
    read_manifest(temporary, part)
    os.rename(temporary, final)
    root = final.parent
    sync_folder(root)
    with contextlib.suppress(OSError):  # the new one is safe; the next save prunes again
        for old in checkpoints(root)[:-keep]:
            doomed = temporary_name(old)  # renamed first: no half-removed folder has the name
            os.rename(old, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
    remove_stale(root)


def _write_files(task: Task, folder: Path, step: int) -> None:
    groups: dict[str, dict[str, torch.Tensor]] = {"model": task.model.state_dict()}
    state: dict[str, Any] = {}
    for name, value in task_state(task).items():
        groups[name] = {}
        state[name] = pack_tree(value, groups[name], name)
    if groups.pop("task"):
        raise TypeError(f"{task.name}: state() must hold JSON values only, got tensors")
    for name, tensors in groups.items():
        write_synced(folder / f"{name}.safetensors", tensors_to_bytes(tensors))
    write_synced(folder / STATE, to_json(state))
    write_manifest(task, folder, step, hashes(folder, folder.iterdir()))


def hashes(folder: Path, paths: Iterable[Path]) -> dict[str, Any]:
    """What the manifest says of files in `folder`."""
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(paths)
    }


def write_manifest(task: Task, folder: Path, step: int, files: dict[str, Any]) -> None:
    """Completes a checkpoint's folder."""
    manifest = {
        "format": FORMAT,
        "step": step,
        "task": task.name,
        "description": task.describe(),
        "versions": {
            "dalle": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "files": files,
    }
    write_synced(folder / MANIFEST, to_json({**manifest, "sha256": _digest(manifest)}))


def _digest(manifest: dict[str, Any]) -> str:
    """SHA-256 over the manifest's other keys: it guards the files, this guards it."""
    return hashlib.sha256(to_json(manifest)).hexdigest()


def read_manifest(path: Path, part: slice = ALL) -> dict[str, Any]:
    """The manifest of a checkpoint whose every byte was verified, or that of `part` of its files.

    Raises:
        CheckpointError: in one line naming the file that is missing, truncated or altered.
    """
    where = f"checkpoint {path}"
    try:
        written = read_bytes(path / MANIFEST)
        manifest = parse_json(written)
        digest = manifest.pop("sha256")
        if digest != _digest(manifest) or written != to_json({**manifest, "sha256": digest}):
            raise CheckpointError(f"{where}: {MANIFEST} must match its SHA-256, got other bytes")
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{where}: format must be {FORMAT}, got {manifest['format']}")
        for name, expected in list(manifest["files"].items())[part]:
            file = path / name
            check_regular(file)
            if file.stat().st_size != expected["bytes"]:
                raise CheckpointError(
                    f"{where}: {name} must have {expected['bytes']} bytes, "
                    f"got {file.stat().st_size}"
                )
            if sha256(file) != expected["sha256"]:
                raise CheckpointError(f"{where}: {name} must match its SHA-256, got other bytes")
    except OSError as problem:
        name = Path(problem.filename or MANIFEST).name
        raise CheckpointError(f"{where}: {name} must be readable, got: {problem.strerror}") from (
            problem
        )
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise CheckpointError(f"{where}: {MANIFEST} must be one that dalle wrote") from problem
    return manifest


@contextlib.contextmanager
def as_written(path: Path) -> Iterator[None]:
    """Inside, state that has another form than `task_state` gives is a CheckpointError."""
    try:
        yield
    except (
        LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError,
    ) as problem:  # fmt: skip
        if isinstance(problem, DalleError) or is_refusal(problem):
            raise
        raise CheckpointError(
            f"checkpoint {path}: its state must have the form that dalle writes, got another"
        ) from problem


def load_checkpoint(task: Task, path: Path, *, accept_changes: bool = False) -> int:
    """Verifies the checkpoint at `path`, puts all its state into `task`, returns its step.

    Args:
        task: of the same kind as the one that was saved.
        path: folder of the checkpoint.
        accept_changes: whether it may be of another description, as of other data or another step
            size; what differs is said. The optimizer then keeps the options that `task` gave it.

    Raises:
        OtherTrainingError: if it is of another description (the line names what differs, and both
            values).
        CheckpointError: if it is damaged, or of another task. In these cases `task` is untouched.
    """
    if task.cluster is not None or (path / SHARDS).is_dir():
        from dalle.train import checkpoint_shards

        return checkpoint_shards.load(task, task.cluster, path, accept_changes=accept_changes)
    manifest = read_manifest(path)
    with as_written(path):
        state = check_fits(task, manifest, path, accept_changes=accept_changes)
        groups = {}
        for name in ("model", "optimizer", "average", "rng"):
            file = path / f"{name}.safetensors"
            size = manifest["files"][file.name]["bytes"]
            groups[name] = tensors_from_bytes(read_bytes(file, size), file)
    load_tensors(task.model, groups["model"], f"checkpoint {path}: model.safetensors")
    restore(task, state, groups["optimizer"] | groups["average"], path, accept_changes)
    say_changes(task, manifest, path)
    with as_written(path):
        set_rng_state(unpack_tree(state["rng"], groups["rng"]))
        return int(manifest["step"])


def check_fits(
    task: Task, manifest: dict[str, Any], path: Path, *, accept_changes: bool = False
) -> dict[str, Any]:
    """The packed state of a checkpoint of this training; raises as `load_checkpoint`."""
    where = f"checkpoint {path}"
    if manifest["task"] != task.name:
        raise CheckpointError(f"{where}: task must be {task.name}, got {manifest['task']}")
    mine = json.loads(to_json(task.describe()))
    found = list(differences(mine, manifest["description"]))
    if found and not accept_changes:
        (key, own, theirs), *more = found
        line = f"{where}: {key} must be {_short(own)} as in this run, got {_short(theirs)}"
        if more:
            line += "; " + ", ".join(f"{k} {_short(a)}, got {_short(b)}" for k, a, b in more)
        raise OtherTrainingError(line, [key for key, _, _ in found])
    state: dict[str, Any] = read_json(path / STATE, CheckpointError)
    with as_written(path):
        averaged = state["average"] is not None
    if averaged != (task.average is not None):
        raise CheckpointError(
            f"{where}: average must be there or not as in this run, got otherwise"
        )
    return state


def say_changes(task: Task, manifest: dict[str, Any], path: Path) -> None:
    """What differs between this run and the checkpoint that it goes on from, if anything."""
    found = differences(json.loads(to_json(task.describe())), manifest["description"])
    changed = ", ".join(f"{key} from {_short(b)} to {_short(a)}" for key, a, b in found)
    if changed:
        say(f"{task.name}: goes on from {path} with changes: {changed}")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def restore(
    task: Task,
    state: dict[str, Any],
    tensors: dict[str, Any],
    path: Path,
    accept_changes: bool = False,
) -> None:
    """Puts the packed state into `task`, all but the model's weights and the generators."""
    where = f"checkpoint {path}"
    groups = task.optimizer.param_groups
    own = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    with as_written(path):
        packed = unpack_tree(state["optimizer"], tensors)
        try:
            task.optimizer.load_state_dict(packed)
        except (KeyError, ValueError) as problem:
            reason = str(problem).splitlines()[0]
            raise CheckpointError(
                f"{where}: optimizer must fit this run's, got: {reason}"
            ) from problem
    if accept_changes:  # the state is the checkpoint's, the options are this run's
        for group, options in zip(task.optimizer.param_groups, own, strict=True):
            group.update(options)
    with as_written(path):
        if task.average is not None:
            task.average.load_state_dict(unpack_tree(state["average"], tensors))
        task.load_state(unpack_tree(state["task"], {}))


def differences(mine: Any, theirs: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The places (dotted key, my value, their value) where two JSON values differ."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for name in [*mine, *(k for k in theirs if k not in mine)]:
            inner = f"{key}.{name}" if key else name
            yield from differences(mine.get(name), theirs.get(name), inner)
    elif mine != theirs:
        yield key or "description", mine, theirs


def first_difference(mine: Any, theirs: Any) -> tuple[str, Any, Any] | None:
    """The first of `differences`, or None."""
    return next(differences(mine, theirs), None)
