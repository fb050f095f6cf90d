"""The records of a pass over a set, appended to a file as they are made.

So a pass that was stopped goes on. The file begins with a key, a hash of all that the records
depend on; blocks of records follow, each with its length and checksum. What was cut off by a stop
is made again.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from dalle.console import is_main_process, say
from dalle.data.pairs import Pairs, describe_pairs, input_files
from dalle.files import json_sha256, regular_opener, saving, write_atomic

BLOCK = 256  # items whose records are written at once
HEAD = struct.Struct("<II")  # bytes of a block and their CRC-32
FILE_NAME = ".progress"  # in the folder of the result; of further passes with a word behind it
VERSION = 1  # of what a key stands for
KEPT_SO_FAR = "what was looked at is kept, and the same command goes on"


def in_blocks(
    owner: str,
    folder: Path,
    depends_on: dict[str, Any],
    total: int,
    dtype: np.dtype[Any],
    compute: Callable[[range], np.ndarray],
    unit: str,
) -> np.ndarray:
    """A record for each item, some from an earlier run; `finish` removes the file.

    Args:
        owner: begins an error's line and the progress line.
        folder: an existing one, of the result.
        depends_on: all that the records depend on, as JSON values.
        total: items.
        dtype: of a record.
        compute: the records of a range of at most `BLOCK` items; of that range alone.
        unit: of the progress line.

    Returns:
        (total,) of `dtype`.

    Raises:
        EnvironmentProblem: the file cannot be written.
    """

    def made(items: range) -> bytes:
        return compute(items).astype(dtype).tobytes()

    def fits(items: range, data: bytes) -> bool:
        return len(data) == len(items) * dtype.itemsize

    records = np.zeros(total, dtype)
    depends_on = {**depends_on, "records": str(dtype)}
    for items, data in _blocks(owner, folder / FILE_NAME, depends_on, total, made, fits, unit):
        records[items.start : items.stop] = np.frombuffer(data, dtype)
    return records


def rows_in_blocks(
    owner: str,
    folder: Path | None,
    depends_on: dict[str, Any],
    total: int,
    compute: Callable[[range], list[Any]],
    unit: str,
    *,
    name: str = "",
    block: int = 0,
) -> Iterator[Any]:
    """As `in_blocks`, but gives rows of any JSON values, one after the other, and keeps none.

    Args:
        folder: without one, nothing is kept.
        compute: the rows of a range; of that range, and of the rows before it, which the caller
            has taken by then.
        name: of the pass, where there are several.
        block: items whose rows are written at once, in place of `BLOCK`.
    """

    def made(items: range) -> bytes:
        return zlib.compress(json.dumps(compute(items)).encode(), 1)

    def fits(items: range, data: bytes) -> bool:
        with suppress(zlib.error, ValueError):
            rows = json.loads(zlib.decompress(data))
            return isinstance(rows, list) and len(rows) == len(items)
        return False

    path = None if folder is None else _file_of(folder, name)
    depends_on = {**depends_on, "records": "JSON"}
    for _, data in _blocks(owner, path, depends_on, total, made, fits, unit, block):
        yield from json.loads(zlib.decompress(data))


def of_data(pairs: Pairs) -> dict[str, Any]:
    """What records depend on of a set: what is in it, and the state of its files, of which one that
    is damaged may be mended."""
    return {"data": describe_pairs(pairs), "files": state_of(input_files(pairs))}


def state_of(paths: Iterable[Path | None]) -> str:
    """A hash of names, sizes and times of files; None stands for one that is not there."""
    states: list[Any] = []
    for path in paths:
        states.append([str(path), None, None])
        with suppress(OSError):  # it has gone
            status = os.stat(path or "")
            states[-1][1:] = [status.st_size, status.st_mtime_ns]
    return json_sha256(states)


def _blocks(
    owner: str,
    path: Path | None,
    depends_on: dict[str, Any],
    total: int,
    made: Callable[[range], bytes],
    fits: Callable[[range, bytes], bool],
    unit: str,
    block: int = 0,
) -> Iterator[tuple[range, bytes]]:
    """The blocks of a pass: those of its file as far as they are whole, then those it adds."""
    size = block or BLOCK
    blocks = [range(begin, min(begin + size, total)) for begin in range(0, total, size)]
    hidden = not is_main_process()
    if path is None:
        with tqdm(total=total, desc=owner, unit=unit, disable=hidden) as bar:
            for items in blocks:
                yield items, made(items)
                bar.update(len(items))
        return
    key = json_sha256({**depends_on, "block": size, "version": VERSION}).encode()
    with saving(owner, path):
        if not _is_of(path, key):
            write_atomic(path, key)
        file: BinaryIO = open(path, "r+b", opener=regular_opener)
    with file:
        with saving(owner, path):
            file.seek(len(key))
        whole = 0  # blocks
        while whole < len(blocks):
            data = _read(file, owner, path, blocks[whole], fits)
            if data is None:
                break
            yield blocks[whole], data
            whole += 1
        done = min(whole * size, total)
        if done:
            say(f"{owner}: {done:,} of {total:,} are there from a run that was stopped")
        with saving(owner, path):
            file.truncate()
        with tqdm(total=total, initial=done, desc=owner, unit=unit, disable=hidden) as bar:
            for items in blocks[whole:]:
                data = made(items)
                with saving(owner, path):
                    file.write(HEAD.pack(len(data), zlib.crc32(data)) + data)
                    file.flush()
                yield items, data
                bar.update(len(items))


def _read(
    file: BinaryIO, owner: str, path: Path, items: range, fits: Callable[[range, bytes], bool]
) -> bytes | None:
    """The next block; None where it is not whole, and the file then stands before it."""
    with saving(owner, path):
        start = file.tell()
        head = file.read(HEAD.size)
        if len(head) == HEAD.size:
            size, checksum = HEAD.unpack(head)
            data = file.read(size)
            if (len(data), zlib.crc32(data)) == (size, checksum) and fits(items, data):
                return data
        file.seek(start)
    return None


def finish(folder: Path, *names: str) -> None:
    """Removes the file, and those of passes with names, once the result is written."""
    for name in ("", *names):
        _file_of(folder, name).unlink(missing_ok=True)


def _file_of(folder: Path, name: str) -> Path:
    return folder / (f"{FILE_NAME}-{name}" if name else FILE_NAME)


def _is_of(path: Path, key: bytes) -> bool:
    """Whether a file of records is there and has this key."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb", opener=regular_opener) as file:
        return file.read(len(key)) == key
