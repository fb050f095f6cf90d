"""Process groups that need no process 0: the one file that knows how torch makes groups.

`torch.distributed.new_group` names a group by how many there are in a process, so processes that
made different numbers of groups hang. And it uses process 0's store, which may be gone where
process 0 is not in the group and has finished. Names are those of torch 2.11 to 2.13.
"""

from __future__ import annotations

import os
import secrets
import socket
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def duplicate_group(parent: dist.ProcessGroup | None, owner: object) -> dist.ProcessGroup:
    """A new group of the processes of another, with its backends and time-out. Collective.

    Args:
        parent: None for all processes.
        owner: the group is destroyed with this object, unless it is NCCL's, where that may block.
    """
    parent = parent or c10d._get_default_group()
    ranks, timeout = dist.get_process_group_ranks(parent), _timeout(parent)
    hosts: list[Any] = [None] * len(ranks)
    dist.all_gather_object(hosts, _network(), group=parent)
    backend, store = _backend(parent), c10d._world.pg_map[c10d._get_default_group()][1]
    is_leader, port = dist.get_rank() == ranks[0], 0
    same_host = 0 not in ranks and len(set(hosts)) == 1
    if same_host and is_leader:
        store = dist.TCPStore("127.0.0.1", 0, None, True, timeout, wait_for_workers=False)
        port = store.port
    message: list[Any] = [secrets.token_hex(8), port]
    dist.broadcast_object_list(message, src=ranks[0], group=parent)
    token, port = message
    if same_host and not is_leader:
        store = dist.TCPStore("127.0.0.1", port, None, False, timeout)
    with _unsplit():
        group, _ = c10d._new_process_group_helper(
            len(ranks),
            ranks.index(dist.get_rank()),
            ranks,
            backend,
            store,
            f"powersgd-{token}",  # type: ignore[arg-type]  # a GroupName, new in torch
            timeout=timeout,
            group_desc="PowerSGD",
        )
    assert isinstance(group, dist.ProcessGroup)
    c10d._world.pg_group_ranks[group] = {rank: i for i, rank in enumerate(ranks)}
    if "nccl" not in backend:
        weakref.finalize(owner, _destroy, group).atexit = False
    return group


@contextmanager
def _unsplit() -> Iterator[None]:
    """A group made inside does not come from `ncclCommSplit`, which waits for all processes.

    It would where the default group was made with `device_id`.
    """
    default = c10d._get_default_group()
    bound = default.bound_device_id
    if bound is None:
        yield
        return
    default.bound_device_id = None
    try:
        yield
    finally:
        default.bound_device_id = bound


def _backend(group: dist.ProcessGroup) -> dist.Backend:
    """The group's backend; by device where there are several."""
    config = dist.get_backend_config(group)
    names = {part.rpartition(":")[2] for part in config.split(",")}
    return dist.Backend(names.pop() if len(names) == 1 else config)


def _destroy(group: dist.ProcessGroup) -> None:
    with suppress(Exception):  # all groups may be gone already
        if group in c10d._world.pg_map:
            dist.destroy_process_group(group)


def _network() -> tuple[str, ...]:
    """Equal on processes that reach each other at 127.0.0.1."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip(), str(os.stat("/proc/self/ns/net").st_ino)
    except OSError:
        return (f"{socket.gethostname()} {os.getpid()}",)  # unknown: equal to no other


def _timeout(group: dist.ProcessGroup) -> timedelta:
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if options is not None:
            timeout: timedelta = options._timeout
            return timeout
    return c10d._get_default_timeout(dist.Backend(dist.get_backend(group)))
