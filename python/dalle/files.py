"""Files that are there whole or not at all: write aside, fsync, rename, fsync the folder."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dalle.errors import DalleError, EnvironmentProblem


def make_folder(path: Path | str, owner: str) -> Path:
    """Makes the folder of a command's `out`, before the work whose results go there.

    Raises:
        EnvironmentProblem: it cannot be made or written, in one line that begins with `owner`.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(path, os.W_OK | os.X_OK) else "no permission"
    except FileExistsError:
        reason = "it is a file"
    except OSError as problem:
        reason = problem.strerror
    if reason is not None:
        raise EnvironmentProblem(
            f"{owner}: out must be a folder that can be written, got {path}: {reason}"
        )
    return path


@contextmanager
def saving(owner: str, path: Path | str) -> Iterator[None]:
    """Around the writing of `path`.

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
    """A free name beside `path`: NAME.tmp-NONCE."""
    return path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")


def write_atomic(path: Path, data: bytes) -> None:
    """Puts `data` at `path`: a crash leaves the old file or the new one, never a part.

    Raises:
        OSError: as `write_synced`; the temporary file is removed.
    """
    temporary = temporary_name(path)
    try:
        write_synced(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(value: Any) -> bytes:
    """`value` as indented UTF-8 JSON with a final newline."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def read_json(path: Path, error: type[DalleError]) -> Any:
    """The JSON value in `path`.

    Raises:
        DalleError: (of class `error`) in one line where the file is missing or no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as problem:
        raise error(f"{path}: must be a readable file, got: {problem.strerror}") from problem
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: must be JSON, got: {str(problem).splitlines()[0]}") from problem
