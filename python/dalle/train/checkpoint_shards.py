"""Checkpoints of many processes: each writes its part, and any number of processes reads them.

    step-00000500/
      shards/          weights, optimizer, averages and error buffers as safetensors with offsets,
                       one file for each process (torch.distributed.checkpoint)
      rng-00000.*      the generators of each process
      state.json       the task's own state; for the shards, what is not a tensor
      manifest.json    as in `checkpoint`: hashes of all of them

Published as `checkpoint` does it: written aside, renamed last. All processes must see one folder.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dalle.distributed.cluster import Cluster
from dalle.distributed.replicas import drifted
from dalle.errors import CheckpointError
from dalle.files import (
    MAX_TEXT_BYTES,
    read_bytes,
    read_json,
    sync_folder,
    temporary_name,
    to_json,
    write_synced,
)
from dalle.pretrained import load_tensors, tensors_from_bytes, tensors_to_bytes
from dalle.train import checkpoint
from dalle.train.checkpoint import SHARDS, STATE, checkpoint_name
from dalle.train.metrics import say
from dalle.train.run import agreed
from dalle.train.tree import pack_tree, set_rng_state, unpack_tree

if TYPE_CHECKING:
    from dalle.train.loop import Task


@contextmanager
def _agreed(cluster: Cluster | None) -> Iterator[None]:
    """What fails inside on one process fails as a CheckpointError on all."""
    with agreed(cluster):
        try:
            yield
        except (OSError, dcp.CheckpointException) as found:
            raise CheckpointError(_reason(found)) from found


def _reason(problem: BaseException) -> str:
    if isinstance(problem, dcp.CheckpointException):
        process, (inner, _) = next(iter(problem.failures.items()))
        return f"{_reason(inner)} (on process {process})"
    return getattr(problem, "strerror", None) or str(problem).strip().splitlines()[0]


def save(task: Task, cluster: Cluster, root: Path, step: int, *, keep: int) -> Path:
    """`checkpoint.save_checkpoint` of many processes, with the same promise. Collective.

    Raises:
        CheckpointError: on all processes, if any cannot write; older checkpoints are untouched.
    """
    final = root / checkpoint_name(step)
    apart = drifted(task.model, cluster)
    if apart is not None:
        say(f"{task.name}: {apart}, at step {step}; a run that goes on from this checkpoint has "
            "equal ones again")  # fmt: skip
    temporary = Path(cluster.first(str(temporary_name(final))))
    try:
        with _agreed(cluster):
            if cluster.leads:
                os.mkdir(temporary)
                os.mkdir(temporary / SHARDS)
        tensors: dict[str, Tensor] = dict(task.model.state_dict())
        state = checkpoint.task_state(task)
        own = state.pop("rng")
        packed = {name: pack_tree(value, tensors, name) for name, value in state.items()}
        with _agreed(cluster):
            writer = HuggingFaceStorageWriter(str(temporary / SHARDS), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=cluster.control)
        with _agreed(cluster):
            _write_rng(temporary, cluster.rank, own)
            if cluster.leads:
                write_synced(temporary / STATE, to_json(packed))
                sync_folder(temporary / SHARDS)
            files = checkpoint.hashes(temporary, _written_by(temporary, cluster.rank))
        every = cluster.gather(files)
        with _agreed(cluster):
            if cluster.leads:
                merged = {name: entry for found in every for name, entry in found.items()}
                checkpoint.write_manifest(task, temporary, step, merged)
                checkpoint.publish(temporary, final, keep, slice(0))  # each hashed its own
    except BaseException:
        if cluster.leads:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _write_rng(folder: Path, rank: int, state: dict[str, Any]) -> None:
    tensors: dict[str, Tensor] = {}
    tree = pack_tree(state, tensors, "rng")
    write_synced(folder / f"rng-{rank:05d}.json", to_json(tree))
    write_synced(folder / f"rng-{rank:05d}.safetensors", tensors_to_bytes(tensors))


def _written_by(folder: Path, rank: int) -> list[Path]:
    own = [*folder.glob(f"rng-{rank:05d}.*"), *folder.glob(f"{SHARDS}/shard-{rank + 1:05d}-*")]
    return own if rank else [*own, folder / STATE]


def load(task: Task, cluster: Cluster | None, path: Path, *, accept_changes: bool = False) -> int:
    """`checkpoint.load_checkpoint` by any number of processes, of a checkpoint of any number.

    With as many processes as wrote it, the run goes on bit for bit. Collective.

    Raises:
        CheckpointError: on all processes, as `load_checkpoint`.
    """
    rank, world = (0, 1) if cluster is None else (cluster.rank, cluster.world)
    with _agreed(cluster):
        manifest = checkpoint.read_manifest(path, slice(rank, None, world))
    with _agreed(cluster):
        state = checkpoint.check_fits(task, manifest, path, accept_changes=accept_changes)
        sharded = (path / SHARDS).is_dir()
        _check_no_others(path, manifest)
        reader = HuggingFaceStorageReader(str(path / SHARDS if sharded else path))
        tensors = _targets(task, reader)
    with _agreed(cluster):  # what fails above on one would leave the others alone in here
        with warnings.catch_warnings():  # that one process alone is meant to be alone
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            group = None if cluster is None else cluster.control
            dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=cluster is None)
    weights = {name: tensors[name] for name in task.model.state_dict() if name in tensors}
    load_tensors(task.model, weights, f"checkpoint {path}: weights")
    checkpoint.restore(task, state, tensors, path, accept_changes)
    checkpoint.say_changes(task, manifest, path)
    if cluster is not None and cluster.psgd is not None:
        if "powersgd" in state:
            cluster.psgd.load_state_dict(unpack_tree(state["powersgd"], tensors))
        else:
            say(f"{task.name}: no error buffers in {path}: those of PowerSGD begin at zero")
    if sharded and (path / f"rng-{rank:05d}.json").exists():
        file = path / f"rng-{rank:05d}.safetensors"
        own = tensors_from_bytes(read_bytes(file, MAX_TEXT_BYTES), file)
        tree = read_json(file.with_suffix(".json"), CheckpointError)
        set_rng_state(unpack_tree(tree, own))
    return int(manifest["step"])


def _check_no_others(path: Path, manifest: dict[str, Any]) -> None:
    """The reader takes every file it finds; those that nobody vouches for are refused."""
    for file in sorted((path / SHARDS).glob("*.safetensors")):
        name = file.relative_to(path).as_posix()
        if name not in manifest["files"]:
            raise CheckpointError(f"checkpoint {path}: files must be in its manifest, got {name}")


@torch.no_grad()
def _targets(task: Task, reader: HuggingFaceStorageReader) -> dict[str, Tensor]:
    """Tensors to be filled, by name: those of a parameter's shape shared out as it is."""
    likes: dict[str, Tensor] = dict(task.model.named_parameters())
    listed = [p for group in task.optimizer.param_groups for p in group["params"]]
    places = {f"optimizer.state.{i}": p for i, p in enumerate(listed)}
    for name, param in list(likes.items()):
        places[f"average.average.{name}"] = places[f"powersgd.errors.{name}"] = param
    found: dict[str, Tensor] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        like = likes.get(name, places.get(name, places.get(name.rpartition(".")[0])))
        assert isinstance(entry, TensorStorageMetadata)
        dtype, size = entry.properties.dtype, entry.size
        if like is not None and like.shape == size:
            found[name] = torch.zeros_like(like.detach(), dtype=dtype)
        elif like is not None and (*like.shape, 2) == tuple(size):  # codes as bytes, shared out too
            half = torch.zeros_like(like.detach(), dtype=dtype)
            found[name] = torch.stack([half, half], -1)
        elif not name.startswith("rng."):
            found[name] = torch.zeros(size, dtype=dtype, device="cpu")
    return found
