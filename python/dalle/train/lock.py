"""One training at a time in a folder: a lock that names who has it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dalle.console import say
from dalle.errors import EnvironmentProblem, UsageError
from dalle.files import make_folder, parse_json, regular_opener, same_file
from dalle.train.task import Task

LOCK_FILE = "training.lock"
MAX_BYTES = 4096
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class FolderLock:
    """Holds `folder`/training.lock while this process writes into the folder.

    The lock is the kernel's (flock): it ends with the process, however that ends, so that a crash
    leaves a file, but no lock. Processes that it forks, such as those that read pictures, do not
    have it, since they may outlive it by seconds. Where a file system has none, the process that
    the file names decides, if it is of this machine.

    Args:
        folder: must exist.
        owner: begins every line, e.g. "prior".

    Raises:
        UsageError: another process has it, named with its machine.
        EnvironmentProblem: the file cannot be written.
    """

    def __init__(self, folder: Path, owner: str) -> None:
        self.folder, self.path, self._owner = folder, folder / LOCK_FILE, owner
        self._reported = False
        self._folder_id: tuple[int, int] | None = None
        self._handle: int | None = self._acquire()
        _LOCKS.add(self)

    def _acquire(self) -> int:
        while True:
            try:
                handle = regular_opener(str(self.path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
            except OSError as problem:
                raise EnvironmentProblem(
                    f"{self._owner}: {self.path} must be writable, got {problem.strerror}"
                ) from problem
            try:
                holder = self._read_owner(handle)
                self._take(handle, holder)
                if same_file(handle, self.path):  # else its previous owner has just removed it
                    self._sign(handle, holder)
                    self._folder_id = _folder_id(self.folder)
                    return handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)

    def _take(self, handle: int, holder: dict[str, object]) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as problem:
            if problem.errno not in _BUSY and not _may_live(holder):
                return  # a file system without locks, and no live holder known
        who = f"process {holder.get('process', '?')} on {holder.get('host', 'another machine')}"
        raise UsageError(
            f"{self._owner}: out must be used by one training at a time, got {self.folder}, where "
            f"{who} trains; wait for it or choose another folder ({self.path} is its lock)"
        )

    def _sign(self, handle: int, holder: dict[str, object]) -> None:
        if holder:
            say(
                f"{self._owner}: process {holder.get('process', '?')} on {holder.get('host', '?')} "
                f"has left {self.folder} without an end; going on in its place"
            )
        owner = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "began": _start_time(os.getpid()),
        }
        with contextlib.suppress(OSError):  # a full disk; the lock is held all the same
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(owner).encode() + b"\n", 0)

    @staticmethod
    def _read_owner(handle: int) -> dict[str, object]:
        """The owner that the file names; empty where there is none or it cannot be read."""
        try:
            content = parse_json(os.pread(handle, MAX_BYTES, 0))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def renew(self) -> None:
        """Where the folder has been removed or moved meanwhile, makes it and the lock again.

        A failure to do so is reported once, and retried at the next call.

        Raises:
            UsageError: another training has begun in its place.
        """
        if self.held:
            return
        if self._folder_id is not None and self._folder_id == _folder_id(self.folder):
            say(f"{self._owner}: {self.path} was removed while training; it is made again")
        elif not self._reported:
            say(
                f"{self._owner}: {self.folder} was removed or moved while training; what was in "
                "it is no longer there, the next checkpoint is written into a new one"
            )
        self._reported = True
        self._close()
        try:
            self._handle = self._remake()
        except EnvironmentProblem:
            return  # the next checkpoint reports it, or raises it if it is the last
        self._reported = False

    def _remake(self) -> int:
        make_folder(self.folder, self._owner)
        return self._acquire()

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
        self._handle = None

    @property
    def held(self) -> bool:
        """Whether the folder is there and this process's."""
        return self._handle is not None and same_file(self._handle, self.path)

    def release(self) -> None:
        """Removes the file and gives the lock back."""
        if self.held:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._close()


_LOCKS: weakref.WeakSet[FolderLock] = weakref.WeakSet()  # of this process


def _close_in_child() -> None:
    for lock in list(_LOCKS):
        lock._close()  # a copy, so that the lock stays with the process that took it


os.register_at_fork(after_in_child=_close_in_child)


def _folder_id(folder: Path) -> tuple[int, int] | None:
    """Device and inode, which differ between folders of one name; None without a folder."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _start_time(process: int) -> int | None:
    """When a process of this machine began, in ticks since the machine did; None without /proc."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _may_live(owner: dict[str, object]) -> bool:
    """Whether the process that a lock's file names may still be running."""
    process = owner.get("process")
    if not isinstance(process, int) or process < 1:
        return False
    if owner.get("host") != socket.gethostname():
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):  # the latter: no process has such a number
        return False
    except OSError:
        return True
    return owner.get("began") in (None, _start_time(process))  # process numbers are reused


@contextmanager
def locked_folder(folder: Path, owner: str) -> Iterator[FolderLock]:
    """Inside, the folder is this process's; raises as `FolderLock`."""
    lock = FolderLock(folder, owner)
    try:
        yield lock
    finally:
        lock.release()


@contextmanager
def training_lock(out: Path, task: Task) -> Iterator[FolderLock | None]:
    """Inside, no other training writes into `out`; process 0 has the lock. Collective."""
    lock = None
    with task.world.raise_on_all():
        if task.world.rank == 0:
            lock = FolderLock(out, task.name)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()
