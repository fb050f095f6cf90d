"""Tensors of which each process writes its part, and any number of processes reads (DCP).

One safetensors file for each process, with the offsets of its parts. All must see one folder.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dalle.errors import CheckpointError


@contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except dcp.CheckpointException as found:
        raise CheckpointError(_reason(found)) from found


def _reason(problem: BaseException) -> str:
    if isinstance(problem, dcp.CheckpointException):
        process, (inner, _) = next(iter(problem.failures.items()))
        return f"{_reason(inner)} (on process {process})"
    return getattr(problem, "strerror", None) or str(problem).strip().splitlines()[0]


def write(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Writes the tensors of all processes of the group. Collective.

    Raises:
        CheckpointError: on all processes, if any cannot write.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _in_words():
        dcp.save(tensors, storage_writer=writer, process_group=group)


@torch.no_grad()
def empty_tensors(folder: Path, parameter_of: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """Tensors to be filled by `read`, by name; generators' states are left out.

    Args:
        folder: where `write` wrote, or any with safetensors.
        parameter_of: by name the parameter that a tensor of its shape is shared out like.
    """
    found: dict[str, Tensor] = {}
    reader = HuggingFaceStorageReader(str(folder))
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        like, dtype, size = parameter_of(name), entry.properties.dtype, entry.size
        if like is not None and like.shape == size:
            found[name] = torch.zeros_like(like.detach(), dtype=dtype)
        elif like is not None and (*like.shape, 2) == tuple(size):  # codes as bytes, shared out too
            half = torch.zeros_like(like.detach(), dtype=dtype)
            found[name] = torch.stack([half, half], -1)
        elif not name.startswith("rng."):
            found[name] = torch.zeros(size, dtype=dtype, device="cpu")
    return found


def read(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Fills the tensors, each process its part. Collective, but of one process (group None).

    Raises:
        CheckpointError: on all processes, if any cannot read.
    """
    reader = HuggingFaceStorageReader(str(folder))
    with warnings.catch_warnings(), _in_words():  # that one process alone is meant to be alone
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
