"""Checkpoints: a folder `step-00000500` that is complete or absent (`manifest`).

    step-00000500/
      model.safetensors  optimizer.safetensors  average.safetensors  rng.safetensors
      state.json       the task's own state; of the other files, the values that are no tensors
      manifest.json    format, step, versions, the task's description, hashes

Of several processes each writes its part, and any number of processes reads it:

      shards/          in place of the first three, and of PowerSGD's error buffers: safetensors
                       with offsets, one file for each process (`checkpoint_shards`)
      rng-00000.*      the generators of each process
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle.configs import integer
from dalle.console import say
from dalle.distributed.world import World
from dalle.errors import CheckpointError, OtherTrainingError
from dalle.files import (
    MAX_TEXT_BYTES,
    read_bytes,
    read_json,
    sync_folder,
    temporary_name,
    to_json,
    write_synced,
)
from dalle.pretrained import check_tensors, load_tensors, tensors_from_bytes, tensors_to_bytes
from dalle.train.changes import MAX_CHANGES, changes_of, short
from dalle.train.manifest import (
    SHARDS,
    checkpoint_name,
    hashes,
    publish,
    read_manifest,
    write_manifest,
)
from dalle.train.restore import checked_form, restore, rollback_on_error
from dalle.train.seeds import rng_state, set_rng_state
from dalle.train.task import Task
from dalle.train.tree import pack_tree, unpack_names, unpack_tree

STATE = "state.json"


def task_state(task: Task) -> dict[str, Any]:
    """Everything a checkpoint holds besides the model's weights."""
    return {
        "optimizer": task.optimizer.state_dict(),
        "average": None if task.average is None else task.average.state_dict(),
        "rng": rng_state(),
        "task": task.state(),
        **task.world.state_dict(),
    }


def save_checkpoint(task: Task, root: Path, step: int, *, keep: int = 3) -> Path:
    """Writes the checkpoint after `step` updates into `root` and prunes to the newest `keep`.

    Raises:
        OSError: if the disk is full, not writable or failing; older checkpoints are untouched.
        CheckpointError: if what was written does not read back; of several processes on all of
            them, if any cannot write.
    """
    step, keep = integer("checkpoint", "step", step, 0), integer("checkpoint", "keep", keep, 1)
    if task.world.size > 1:
        return _save_shards(task, root, step, keep)
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
    files = hashes(folder, folder.iterdir())
    write_manifest(folder, step, files, task.name, task.describe())


@contextlib.contextmanager
def _raise_on_all(world: World) -> Iterator[None]:
    """An error inside on one process is raised as a CheckpointError on all."""
    with world.raise_on_all():
        try:
            yield
        except OSError as problem:
            reason = problem.strerror or str(problem).strip().splitlines()[0]
            raise CheckpointError(reason) from problem


def _save_shards(task: Task, root: Path, step: int, keep: int) -> Path:
    """`save_checkpoint` of several processes, with the same promise. Collective."""
    from dalle.train import checkpoint_shards  # loads torch.distributed.checkpoint

    world, final = task.world, root / checkpoint_name(step)
    drift = world.replica_drift(task.model)
    if drift is not None:
        say(
            f"{task.name}: {drift}, at step {step}; a run that goes on from this checkpoint has "
            "equal ones again"
        )
    temporary = Path(world.first(str(temporary_name(final))))
    try:
        with _raise_on_all(world):
            if world.rank == 0:
                os.mkdir(temporary)
                os.mkdir(temporary / SHARDS)
        tensors: dict[str, Tensor] = dict(task.model.state_dict())
        state = task_state(task)
        generators = state.pop("rng")
        packed = {name: pack_tree(value, tensors, name) for name, value in state.items()}
        with _raise_on_all(world):
            checkpoint_shards.write(temporary / SHARDS, tensors, world.control)
        with _raise_on_all(world):
            _write_rng(temporary, world.rank, generators)
            if world.rank == 0:
                write_synced(temporary / STATE, to_json(packed))
                sync_folder(temporary / SHARDS)
            files = hashes(temporary, _written_by(temporary, world.rank))
        files_by_rank = world.gather(files)
        with _raise_on_all(world):
            if world.rank == 0:
                merged = {
                    name: entry
                    for rank_files in files_by_rank
                    for name, entry in rank_files.items()
                }
                write_manifest(temporary, step, merged, task.name, task.describe())
                publish(temporary, final, keep, slice(0))  # each process hashed its own
    except BaseException:
        if world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _write_rng(folder: Path, rank: int, state: dict[str, Any]) -> None:
    tensors: dict[str, Tensor] = {}
    tree = pack_tree(state, tensors, "rng")
    write_synced(folder / f"rng-{rank:05d}.json", to_json(tree))
    write_synced(folder / f"rng-{rank:05d}.safetensors", tensors_to_bytes(tensors))


def _written_by(folder: Path, rank: int) -> list[Path]:
    paths = [*folder.glob(f"rng-{rank:05d}.*"), *folder.glob(f"{SHARDS}/shard-{rank + 1:05d}-*")]
    return paths if rank else [*paths, folder / STATE]


def load_checkpoint(task: Task, path: Path, *, accept_changes: bool = False) -> int:
    """Verifies the checkpoint at `path`, puts all its state into `task`, returns its step.

    Args:
        task: of the same kind as the one that was saved.
        path: folder of the checkpoint.
        accept_changes: whether it may be of another description, as of other data or another step
            size; differences are reported. The optimizer then keeps the options of `task`.

    Raises:
        OtherTrainingError: if it is of another description (the line names what differs, and both
            values).
        CheckpointError: if it is damaged, of another form, or of another task.
            In these cases `task` is untouched.
    """
    if task.world.size > 1 or (path / SHARDS).is_dir():
        return _load_shards(task, path, accept_changes=accept_changes)
    with rollback_on_error(task):
        manifest, weights, average = _restore_all_but_weights(task, path, accept_changes)
    load_tensors(task.model, weights, f"checkpoint {path}: model.safetensors")
    if task.average is not None:
        task.average.load_state_dict(average)
    say_changes(task, manifest, path)
    return int(manifest["step"])


def can_load(task: Task, path: Path, *, accept_changes: bool = False) -> bool:
    """Whether `load_checkpoint` takes what is at `path`; `task` stays as it is.

    Of a sharded checkpoint only the manifest and the form of the state are checked.
    """
    try:
        if task.world.size > 1 or (path / SHARDS).is_dir():
            check_fits(task, read_manifest(path), path, accept_changes=accept_changes)
        else:
            with rollback_on_error(task, always=True):
                _restore_all_but_weights(task, path, accept_changes)
    except CheckpointError:
        return False
    return True


def _restore_all_but_weights(
    task: Task, path: Path, accept_changes: bool
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]:
    """Restores what `rollback_on_error` undoes; returns manifest, weights and average, checked."""
    manifest = read_manifest(path)
    with checked_form(path):
        integer("checkpoint", "step", manifest["step"], 0)
        state = check_fits(task, manifest, path, accept_changes=accept_changes)
        groups = {}
        for name in ("model", "optimizer", "average", "rng"):
            file = path / f"{name}.safetensors"
            size = manifest["files"][file.name]["bytes"]
            groups[name] = tensors_from_bytes(read_bytes(file, size), file)
    check_tensors(task.model, groups["model"], f"checkpoint {path}: model.safetensors")
    average = restore(task, state, groups["optimizer"] | groups["average"], path, accept_changes)
    with checked_form(path):
        set_rng_state(unpack_tree(state["rng"], groups["rng"]))
    return manifest, groups["model"], average


def _load_shards(task: Task, path: Path, *, accept_changes: bool) -> int:
    """`load_checkpoint` by any number of processes, of a checkpoint of any number.

    With as many processes as wrote it, the run goes on bit for bit. Collective.
    """
    from dalle.train import checkpoint_shards

    world, rank = task.world, task.world.rank
    with _raise_on_all(world):
        manifest = read_manifest(path, slice(rank, None, world.size))
    with _raise_on_all(world):
        state = check_fits(task, manifest, path, accept_changes=accept_changes)
        sharded = (path / SHARDS).is_dir()
        _check_no_extra_files(path, manifest)
        folder = path / SHARDS if sharded else path
        tensors = checkpoint_shards.empty_tensors(folder, _parameter_of(task))
    with _raise_on_all(world):  # before the next one, which is collective
        checkpoint_shards.read(folder, tensors, world.control)
    weights = {name: tensors[name] for name in task.model.state_dict() if name in tensors}
    with rollback_on_error(task):
        check_tensors(task.model, weights, f"checkpoint {path}: weights")
        average = restore(task, state, tensors, path, accept_changes)
        with checked_form(path):
            step = integer("checkpoint", "step", manifest["step"], 0)
            if sharded and (path / f"rng-{rank:05d}.json").exists():
                file = path / f"rng-{rank:05d}.safetensors"
                rng_tensors = tensors_from_bytes(read_bytes(file, MAX_TEXT_BYTES), file)
                tree = read_json(file.with_suffix(".json"), CheckpointError)
                set_rng_state(unpack_tree(tree, rng_tensors))
            packed = {name: state[name] for name in ("powersgd",) if name in state}
            world_state = {name: unpack_tree(value, tensors) for name, value in packed.items()}
            world.load_state_dict(world_state, f"{task.name}: {path}")
    load_tensors(task.model, weights, f"checkpoint {path}: weights")
    if task.average is not None:
        task.average.load_state_dict(average)
    say_changes(task, manifest, path)
    return step


def _check_no_extra_files(path: Path, manifest: dict[str, Any]) -> None:
    """DCP reads every file in the folder, so one that the manifest does not list is refused."""
    for file in sorted((path / SHARDS).glob("*.safetensors")):
        name = file.relative_to(path).as_posix()
        if name not in manifest["files"]:
            raise CheckpointError(f"checkpoint {path}: files must be in its manifest, got {name}")


def _parameter_of(task: Task) -> Callable[[str], Tensor | None]:
    """Maps a tensor's name to the parameter whose shape and sharding it may have."""
    parameters: dict[str, Tensor] = dict(task.model.named_parameters())
    for name, param in list(parameters.items()):
        parameters[f"average.average.{name}"] = parameters[f"powersgd.errors.{name}"] = param
    optimizer_params = [p for group in task.optimizer.param_groups for p in group["params"]]
    moments = {f"optimizer.state.{i}": p for i, p in enumerate(optimizer_params)}
    return lambda name: parameters.get(name, moments.get(name.rpartition(".")[0]))


def check_fits(
    task: Task, manifest: dict[str, Any], path: Path, *, accept_changes: bool = False
) -> dict[str, Any]:
    """The packed state of a checkpoint of this training; raises as `load_checkpoint`."""
    where = f"checkpoint {path}"
    if manifest["task"] != task.name:
        raise CheckpointError(f"{where}: task must be {task.name}, got {manifest['task']}")
    description = json.loads(to_json(task.describe()))
    changes, parts = changes_of(description, manifest["description"])
    if changes and not accept_changes:
        (key, expected, got), *more = changes
        line = f"{where}: {key} must be {short(expected)} as in this run, got {short(got)}"
        if more:
            named = [f"{k} {short(a)}, got {short(b)}" for k, a, b in more[:MAX_CHANGES]]
            line += "; " + ", ".join(named)
        if more[MAX_CHANGES:]:
            line += f", and {len(more) - MAX_CHANGES} more"
        if parts:
            line += f"; {parts}"
        raise OtherTrainingError(line, [key for key, _, _ in changes])
    state: dict[str, Any] = read_json(path / STATE, CheckpointError)
    with checked_form(path):
        averaged = state["average"] is not None
        for name in ("optimizer", "task", *["average"] * averaged):
            if not isinstance(unpack_names(state[name]), dict):
                raise ValueError(f"{name} is no dict")
    if averaged != (task.average is not None):
        raise CheckpointError(
            f"{where}: average must be there or not as in this run, got otherwise"
        )
    return state


def say_changes(task: Task, manifest: dict[str, Any], path: Path) -> None:
    """Reports the differences between this run and the checkpoint it resumes from, if any."""
    description = json.loads(to_json(task.describe()))
    changes, parts = changes_of(description, manifest["description"])
    changed = ", ".join(f"{key} from {short(b)} to {short(a)}" for key, a, b in changes)
    if changed and parts:
        changed += f"; {parts}"
    if changed:
        say(f"{task.name}: goes on from {path} with changes: {changed}")
