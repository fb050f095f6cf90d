"""Files: read within limits, written atomically.

Reading never blocks and always ends: only regular files are opened, none is read beyond a limit.
Writing makes a temporary file, syncs it to the disk, renames it, and syncs the folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import numbers
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dalle.errors import DalleError, EnvironmentProblem, UsageError

MAX_TEXT_BYTES = 64 << 20  # of a JSON, YAML or text file
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{8}$")
_NOW = getattr(os, "O_NONBLOCK", 0)  # opening a pipe does not block


def check_regular(path: Path | str, *, missing_ok: bool = False) -> None:
    """Refuses what is no regular file, without opening it; links are followed.

    Raises:
        OSError: a pipe, a device, a socket or a folder, or none there.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if missing_ok:
            return
        raise
    except ValueError as problem:  # a NUL character, or letters that the locale cannot encode
        reason = "no file can have this name here"
        raise FileNotFoundError(errno.ENOENT, reason, str(path)) from problem
    _check_mode(mode, path)


def _check_mode(mode: int, path: Path | str) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        advice = "; write what it gives into a file first" if stat.S_ISFIFO(mode) else ""
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file{advice}", str(path))


def regular_opener(path: str, flags: int) -> int:
    """`open(..., opener=regular_opener)` opens regular files only, and never blocks.

    Raises:
        OSError: as `check_regular`, or it is not permitted.
    """
    check_regular(path, missing_ok=bool(flags & os.O_CREAT))
    handle = os.open(path, flags | _NOW, 0o666)
    try:
        _check_mode(os.fstat(handle).st_mode, path)
    except BaseException:
        os.close(handle)
        raise
    return handle


def same_file(handle: int, path: Path | str) -> bool:
    """Whether the path still leads to the open file: it may have been removed or moved."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


def read_bytes(path: Path | str, limit: int = MAX_TEXT_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        OSError: it is larger, not a regular file, missing or not readable.
    """
    check_regular(path)
    with open(path, "rb", opener=regular_opener) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(size + 1) if size <= limit else b""
        if size < len(data) <= limit:  # it grows, or lies in /proc, where sizes are 0
            data += file.read(limit + 1 - len(data))
    if max(size, len(data)) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit} bytes", str(path))
    return data


_watched: list[list[Path]] = []  # folders that were not there, of each `folders_of_failure_removed`


@contextmanager
def folders_of_failure_removed() -> Iterator[None]:
    """Where the work inside fails, folders that `make_folder` made and that are empty go again."""
    _watched.append([])
    try:
        yield
    except BaseException:
        for folder in sorted(_watched[-1], key=lambda path: -len(path.parts)):
            with suppress(OSError, ValueError):  # it holds something, or was never made
                folder.rmdir()
        raise
    finally:
        _watched.pop()


def make_folder(path: Path | str, owner: str) -> Path:
    """Makes the folder of a command's `out`, before the work whose results go there.

    Raises:
        EnvironmentProblem: it cannot be made or written, in one line that begins with `owner`.
    """
    path = Path(path)
    if _watched:
        _watched[-1].extend(p for p in (path, *path.parents) if not os.path.lexists(p))
    try:
        path.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(path, os.W_OK | os.X_OK) else "no permission"
    except FileExistsError:
        reason = "it is a file"
    except OSError as problem:
        reason = problem.strerror
    except ValueError:
        reason = "no folder can have this name here"
    except RecursionError:  # pathlib makes parents by calling itself
        reason = "too many folders in each other"
    if reason is not None:
        raise EnvironmentProblem(
            f"{owner}: out must be a folder that can be written, got {path}: {reason}"
        )
    return path


def read_lines(path: Path, longest: int, limit: int) -> Iterator[bytes | None]:
    """Lines of a regular file one by one, None for a line of more than `longest` bytes.

    Raises:
        OSError: it has more than `limit` bytes, is not a regular file, missing or not readable.
    """
    with open(path, "rb", opener=regular_opener) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise OSError(errno.EFBIG, f"it has more than {limit} bytes", str(path))
        while line := file.readline(longest + 1):
            if len(line) <= longest:
                yield line
                continue
            while line and not line.endswith(b"\n"):
                line = file.readline(longest + 1)
            yield None


@contextmanager
def saving(owner: str, path: Path | str) -> Iterator[None]:
    """Guards the writing of `path`.

    Raises:
        EnvironmentProblem: for an OSError inside (full disk, no permission), in one line.
    """
    try:
        yield
    except OSError as problem:
        reason = problem.strerror or problem
        if isinstance(problem, (FileExistsError, NotADirectoryError)):
            reason = "its folder is a file"
        raise EnvironmentProblem(f"{owner}: {path} must be writable, got {reason}") from problem
    except RecursionError as problem:
        reason = "too many folders in each other"
        raise EnvironmentProblem(f"{owner}: {path} must be writable, got {reason}") from problem
    except UnicodeEncodeError as problem:
        raise EnvironmentProblem(
            f"{owner}: {path} must be a name that this locale can write, got {ascii(str(path))}"
        ) from problem


def check_targets(owner: str, *paths: Path) -> None:
    """Refuses, before the work, paths to which its results cannot be written.

    Raises:
        EnvironmentProblem: the path is something else than a file, or its folder is a file; in one
            line that begins with `owner`.
    """
    for path in paths:
        with saving(owner, path):
            check_regular(path, missing_ok=True)


def real_path(path: Path | str) -> Path:
    """Absolute, with the targets of links. A link that leads to itself stays as it is, and is
    refused where it is opened: `Path.resolve` raises a RuntimeError there."""
    return Path(os.path.realpath(path))


def check_not_input(owner: str, target: Path, inputs: Iterable[Path]) -> None:
    """Refuses, before the work, a result that would overwrite one of its input files.

    Raises:
        UsageError: in one line that begins with `owner`.
    """
    if not os.path.exists(target):
        return
    for path in inputs:
        with suppress(OSError):
            if os.path.samefile(target, path):
                raise UsageError(f"{owner}: {target} must be none of the pictures that are read")


def write_synced(path: Path, data: bytes) -> None:
    """Writes `data` to `path` and returns when the disk has it.

    Raises:
        OSError: if the disk is full, the folder is not writable, or the device fails.
    """
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` (new files, renames) durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_name(path: Path) -> Path:
    """A free name in the folder of `path`: NAME.tmp-NONCE."""
    return path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")


def remove_temporary(folder: Path) -> None:
    """Removes files of `temporary_name` that a killed process left in a folder, which nobody has
    written to for a minute.

    Raises:
        OSError: one cannot be removed.
    """
    before = time.time() - 60
    for path in folder.iterdir():
        if _TEMPORARY.search(path.name):
            with suppress(FileNotFoundError):  # its process gave it its name just now
                status = path.stat()
                if stat.S_ISREG(status.st_mode) and status.st_mtime < before:
                    path.unlink()


def write_atomic(path: Path, data: bytes) -> None:
    """Puts `data` at `path`: a crash leaves the old file or the new one, never a part.

    Raises:
        OSError: as `write_synced`, or something that is no regular file has the name; the temporary
            file is removed.
    """
    check_regular(path, missing_ok=True)  # a rename would replace /dev/null
    temporary = temporary_name(path)
    try:
        write_synced(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which is renamed to `path` (new, or an empty folder) once complete.

    Raises:
        OSError: it cannot be made, or `path` holds something; what was written is removed.
    """
    temporary = temporary_name(path)
    try:
        temporary.mkdir()
        yield temporary
        sync_folder(temporary)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a regular file's bytes."""
    with open(path, "rb", opener=regular_opener) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: Any) -> str:
    """Hex SHA-256 of what `to_json` writes, for a file that guards itself."""
    return hashlib.sha256(to_json(value)).hexdigest()


def to_json(value: Any) -> bytes:
    """`value` as indented UTF-8 JSON with a final newline; numbers of numpy as Python's.

    Lone surrogates (bytes of an argument or a file name that are not UTF-8) become JSON's escapes.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False, default=plain_number) + "\n"
    return text.encode("utf-8", "backslashreplace")


def plain_number(value: Any) -> int | float:
    """An integer or a number of any kind as Python's; TypeError for all else (for `json`)."""
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"JSON has no {type(value).__name__}")


def read_json(path: Path, error: type[DalleError], limit: int = MAX_TEXT_BYTES) -> Any:
    """The JSON value in `path`.

    Raises:
        DalleError: (of class `error`) in one line where the file is missing, too large, or no JSON.
    """
    try:
        return parse_json(read_bytes(path, limit))
    except OSError as problem:
        raise error(f"{path}: must be a readable file, got: {problem.strerror}") from problem
    except ValueError as problem:
        raise error(f"{path}: must be JSON, got: {str(problem).splitlines()[0]}") from problem


def parse_json(data: bytes) -> Any:
    """The JSON value in `data`.

    Raises:
        ValueError: it is no JSON, not UTF-8, or nested too deeply; the text says which.
    """
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as problem:
        raise ValueError(f"byte {problem.start} is not UTF-8") from problem
    except RecursionError as problem:
        raise ValueError("it is nested too deeply") from problem


def read_object(path: Path, error: type[DalleError]) -> dict[str, Any]:
    """The JSON object in `path`. Raises as `read_json`, also where it is another JSON value."""
    value = read_json(path, error)
    if not isinstance(value, dict):
        raise error(f"{path}: must be a JSON object, got {json_kind(value)}")
    return value


def json_kind(value: Any) -> str:
    """The name of a value's type in JSON."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    return names.get(type(value), "null" if value is None else "a number")
