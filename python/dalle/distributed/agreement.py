"""Values that must be equal on all processes of a group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from dalle.configs import first_difference
from dalle.errors import UsageError
from dalle.version import __version__


def require_same(command: str, values: Mapping[str, Any], group: dist.ProcessGroup | None) -> None:
    """Raises UsageError on every process unless all have the same values and versions. Collective.

    Args:
        command: begins the line.
        values: this process's values by name, of JSON's kinds or tuples; sent as they are.
        group: of the processes; None for all.
    """
    local = {**values, "versions": {"dalle": __version__, "torch": torch.__version__}}
    processes = dist.get_process_group_ranks(group)
    values_by_rank: list[Any] = [None] * len(processes)
    dist.all_gather_object(values_by_rank, local, group=group)
    for process, other in zip(processes, values_by_rank, strict=True):
        difference = first_difference(values_by_rank[0], other)
        if difference is not None:
            key, first, got = difference
            raise UsageError(
                f"{command}: {key} must be the same on all processes ({first} on process "
                f"{processes[0]}), got {got} on process {process}"
            )
