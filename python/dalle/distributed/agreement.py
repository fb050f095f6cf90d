"""What all processes of a group must have alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from dalle.configs import first_difference
from dalle.errors import UsageError
from dalle.version import __version__


def require_same(command: str, own: Mapping[str, Any], group: dist.ProcessGroup | None) -> None:
    """Raises UsageError on every process unless all have the same values and versions. Collective.

    Args:
        command: begins the line.
        own: this process's values by name, of JSON's kinds or tuples; sent as they are.
        group: which processes; None for all.
    """
    mine = {**own, "versions": {"dalle": __version__, "torch": torch.__version__}}
    processes = dist.get_process_group_ranks(group)
    every: list[Any] = [None] * len(processes)
    dist.all_gather_object(every, mine, group=group)
    for process, other in zip(processes, every, strict=True):
        found = first_difference(every[0], other)
        if found is not None:
            key, first, got = found
            raise UsageError(
                f"{command}: {key} must be the same on all processes ({first} on process "
                f"{processes[0]}), got {got} on process {process}"
            )
