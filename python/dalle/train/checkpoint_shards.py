"""Sharded tensors: each process writes its part, any number of processes reads them (DCP).

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
def _dcp_errors() -> Iterator[None]:
    try:
        yield
    except dcp.CheckpointException as problem:
        raise CheckpointError(_reason(problem)) from problem


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
    with _dcp_errors():
        dcp.save(tensors, storage_writer=writer, process_group=group)


@torch.no_grad()
def empty_tensors(folder: Path, parameter_of: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """Tensors to be filled by `read`, by name; generators' states are left out.

    Args:
        folder: where `write` wrote, or any with safetensors.
        parameter_of: maps a tensor's name to the parameter whose sharding it has, or None.
    """
    tensors: dict[str, Tensor] = {}
    reader = HuggingFaceStorageReader(str(folder))
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        param, dtype, size = parameter_of(name), entry.properties.dtype, entry.size
        if param is not None and param.shape == size:
            tensors[name] = torch.zeros_like(param.detach(), dtype=dtype)
        elif param is not None and (*param.shape, 2) == tuple(size):
            # 16-bit codes, stored as pairs of bytes and sharded as their parameter is.
            half = torch.zeros_like(param.detach(), dtype=dtype)
            tensors[name] = torch.stack([half, half], -1)
        elif not name.startswith("rng."):
            tensors[name] = torch.zeros(size, dtype=dtype, device="cpu")
    return tensors


def read(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Fills the tensors, each process its part. Collective, unless `group` is None (one process).

    Raises:
        CheckpointError: on all processes, if any cannot read.
    """
    reader = HuggingFaceStorageReader(str(folder))
    with warnings.catch_warnings(), _dcp_errors():
        # A single process reads without torch.distributed on purpose.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
