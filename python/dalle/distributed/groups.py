"""Process groups of one's own: the one file that knows how torch makes them.

`torch.distributed.new_group` names a group by how many there are in a process, so processes that
made other numbers of groups wait for ever, and it meets at process 0's store, which may be gone
where process 0 is not of the group and has done its work. Names are those of torch 2.11 to 2.13.
"""

from __future__ import annotations

import os
import secrets
import socket
import weakref
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def own_group(parent: dist.ProcessGroup | None, owner: object) -> dist.ProcessGroup:
    """A new group of the processes of another, with its backends and its patience. Collective.

    Args:
        parent: None for all processes.
        owner: with whose end the group ends, but for NCCL's, whose end may have to wait.
    """
    parent = parent or c10d._get_default_group()
    ranks, timeout = dist.get_process_group_ranks(parent), _timeout(parent)
    places: list[Any] = [None] * len(ranks)
    dist.all_gather_object(places, _network(), group=parent)
    backend, store = _backend(parent), c10d._world.pg_map[c10d._get_default_group()][1]
    leads, port = dist.get_rank() == ranks[0], 0
    near = 0 not in ranks and len(set(places)) == 1
    if near and leads:
        store = dist.TCPStore("127.0.0.1", 0, None, True, timeout, wait_for_workers=False)
        port = store.port
    said: list[Any] = [secrets.token_hex(8), port]
    dist.broadcast_object_list(said, src=ranks[0], group=parent)
    token, port = said
    if near and not leads:
        store = dist.TCPStore("127.0.0.1", port, None, False, timeout)
    found, _ = c10d._new_process_group_helper(
        len(ranks),
        ranks.index(dist.get_rank()),
        ranks,
        backend,
        store,
        f"own-{token}",  # type: ignore[arg-type]  # a GroupName, which older torch does not have
        timeout=timeout,
        group_desc="PowerSGD",
    )
    assert isinstance(found, dist.ProcessGroup)
    c10d._world.pg_group_ranks[found] = {rank: i for i, rank in enumerate(ranks)}
    if "nccl" not in backend:
        weakref.finalize(owner, _leave, found).atexit = False
    return found


def _backend(group: dist.ProcessGroup) -> dist.Backend:
    """By device where there are several."""
    config = dist.get_backend_config(group)
    names = {part.rpartition(":")[2] for part in config.split(",")}
    return dist.Backend(names.pop() if len(names) == 1 else config)


def _leave(group: dist.ProcessGroup) -> None:
    with suppress(Exception):  # all groups may be gone already
        if group in c10d._world.pg_map:
            dist.destroy_process_group(group)


def _network() -> tuple[str, ...]:
    """What processes have in common that reach each other at 127.0.0.1."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip(), str(os.stat("/proc/self/ns/net").st_ino)
    except OSError:
        return (f"{socket.gethostname()} {os.getpid()}",)  # nothing: not known to be near


def _timeout(group: dist.ProcessGroup) -> timedelta:
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if options is not None:
            return options._timeout  # type: ignore[no-any-return]
    return c10d._get_default_timeout(dist.Backend(dist.get_backend(group)))
