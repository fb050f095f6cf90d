"""The records of a pass over a set, appended to a file as they are made.

So a pass that was stopped goes on. The file begins with a key, a hash of all that the records
depend on; blocks of records follow, each with its length and checksum. What was cut off by a stop
is made again.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from dalle.console import is_main_process, say
from dalle.files import json_sha256, regular_opener, saving, write_atomic

BLOCK = 256  # items whose records are written at once
HEAD = struct.Struct("<II")  # bytes of a block and their CRC-32
FILE_NAME = ".progress"  # in the folder of the result
VERSION = 1  # of what a key stands for


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
    path = folder / FILE_NAME
    key = json_sha256({**depends_on, "records": str(dtype), "version": VERSION}).encode()
    records = np.zeros(total, dtype)
    with saving(owner, path):
        if not _is_of(path, key):
            write_atomic(path, key)
        file: BinaryIO = open(path, "r+b", opener=regular_opener)
    with file:
        with saving(owner, path):
            file.seek(len(key))
            done = _read(file, records)
            file.truncate()
        if done:
            say(f"{owner}: {done:,} of {total:,} are there from a run that was stopped")
        hidden = not is_main_process()
        with tqdm(total=total, initial=done, desc=owner, unit=unit, disable=hidden) as bar:
            for begin in range(done, total, BLOCK):
                items = range(begin, min(begin + BLOCK, total))
                records[begin : items.stop] = made = compute(items)
                data = made.astype(dtype).tobytes()
                with saving(owner, path):
                    file.write(HEAD.pack(len(data), zlib.crc32(data)) + data)
                    file.flush()
                bar.update(len(items))
    return records


def finish(folder: Path) -> None:
    """Removes the file, once the result is written."""
    (folder / FILE_NAME).unlink(missing_ok=True)


def _is_of(path: Path, key: bytes) -> bool:
    """Whether a file of records is there and has this key."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb", opener=regular_opener) as file:
        return file.read(len(key)) == key


def _read(file: BinaryIO, records: np.ndarray) -> int:
    """Fills in the records of all blocks up to the first that is not whole; how many these are.
    The file then stands behind them."""
    done, size = 0, records.dtype.itemsize
    while done < len(records):
        start, wanted = file.tell(), min(BLOCK, len(records) - done) * size
        head = file.read(HEAD.size)
        data = file.read(wanted) if len(head) == HEAD.size else b""
        if len(data) < wanted or HEAD.unpack(head) != (wanted, zlib.crc32(data)):
            file.seek(start)
            break
        records[done : done + wanted // size] = np.frombuffer(data, records.dtype)
        done += wanted // size
    return done
