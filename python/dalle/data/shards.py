"""A folder of tar shards in webdataset's layout: KEY.jpg, .png or .webp with KEY.txt or KEY.json.

img2dataset writes such folders. Each shard has an index (`dalle.data.shard_index`), so that any
pair is read in two calls of `pread` and nothing of a caption stays in memory.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dalle import files
from dalle.data import shard_index
from dalle.data.folder import digest_of
from dalle.data.images import MAX_FILE_BYTES, BadPicture, decode
from dalle.data.pairs import LazyCaptions, format_counts
from dalle.data.shard_files import CHECKED, find_shards, is_shard_folder, is_tar, open_shards
from dalle.data.shard_index import JSON_TEXT, StaleIndex, read_columns
from dalle.data.source import Source
from dalle.data.tar import BLOCK
from dalle.data.texts import MAX_JSON_BYTES, json_captions, text_captions
from dalle.errors import DataError

MAX_OPEN = 256  # shards held open at a time
NEW_INDEX = "have an index of its own (dalle data index --force)"


class _Open(NamedTuple):
    """An open shard; the file is closed when nobody holds this any more."""

    file: Any
    columns: dict[str, np.ndarray]


class ShardGone(BadPicture):
    """A picture or caption of a shard that cannot be read any more; `group` names the shard."""

    def __init__(self, path: Path, reason: str, requirement: str, detail: str = "") -> None:
        super().__init__(path, reason, requirement, detail, what="shard")
        self.group = str(path)


class ShardPairs:
    """Pairs of a folder of tar shards, in the order of the shards' paths and of their members.

    Args:
        folder: searched recursively for .tar files; or one of them.
        cache: for indexes that cannot stand beside their shards, instead of `cache_folder()`.

    Attributes:
        shards: the tars that could be read.
        captions: the first caption of each pair, read when it is asked for.
        several: item -> all its captions, where it has more than one.
        image_size: 0, as sizes differ.
        skipped: reason -> what was left out.
        problems: lines on the first of it.
        files: the tars, which no output replaces.

    Raises:
        DataError: no such folder, or no usable pair in it (the reasons are in the message).
        EnvironmentProblem: an index cannot be written anywhere.
    """

    image_size = 0
    named_by = "dalle data index"  # the command that names what was left out
    indexed = True  # hashes and captions are read when they are asked for

    def __init__(self, folder: Path | str, *, cache: Path | None = None) -> None:
        folder = Path(folder)
        if not folder.is_dir() and not is_tar(folder):
            kind = "a file" if folder.exists() else "no such folder"
            raise DataError(f"data: {folder} must be a folder, got {kind}")
        self.name = files.real_path(folder).name or str(folder)
        self.folder = folder if folder.is_dir() else folder.parent
        paths, self.skipped = find_shards(folder)
        shards, self.problems = open_shards(paths, cache=cache)
        if self.problems:
            self.skipped["shard is not readable"] += len(self.problems)
        for shard in shards:
            self.skipped.update(shard.head.skipped)
            self.skipped["shard without a pair"] += not shard.head.pairs
            self.problems += shard.head.problems[: max(0, 100 - len(self.problems))]
        self.skipped = +self.skipped
        self.shards = [shard for shard in shards if shard.head.pairs]
        self.files = paths
        ends = np.cumsum([shard.head.pairs for shard in self.shards], dtype=np.int64)
        self._starts = np.concatenate([[0], ends]).astype(np.int64)
        if not self.shards:
            why = format_counts(self.skipped)
            named = f"; {self.problems[0]}" if self.problems else ""
            raise DataError(
                f"data: {folder} must hold .tar files with pictures and captions, got no usable "
                f"pair ({why or 'the folder is empty'}){named}"
            )
        self.captions: Sequence[str] = LazyCaptions(self, self.captions_at)
        self.several: Mapping[int, Sequence[str]] = SeveralCaptions(self)
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._lock = threading.Lock()
        # Those of larger sets are checked when they are first read.
        self._checked = np.full(len(self.shards), len(paths) <= CHECKED)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _open=OrderedDict(), _lock=threading.Lock())

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _place(self, i: int) -> tuple[int, int]:
        """The shard of item i, and its place in it."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name}: item must be 0 .. {len(self) - 1}, got {i}")
        number = int(np.searchsorted(self._starts, i, "right")) - 1
        return number, i - int(self._starts[number])

    def _opened(self, number: int) -> _Open:
        """Shard `number`, open; at most `MAX_OPEN` are."""
        with self._lock:
            opened = self._open.get(number)
            if opened is not None:
                self._open.move_to_end(number)
                return opened
        shard = self.shards[number]
        try:
            file = open(shard.path, "rb", buffering=0, opener=files.regular_opener)
            check = not self._checked[number]
            columns = read_columns(shard.index_path, shard.start, shard.head, check=check)
            self._checked[number] = True
        except StaleIndex as problem:
            raise ShardGone(shard.path, "index is damaged", NEW_INDEX) from problem
        except (OSError, ValueError) as problem:
            reason = getattr(problem, "strerror", None) or str(problem)
            raise ShardGone(shard.path, "shard has gone", "be readable", reason) from problem
        opened = _Open(file, columns)
        with self._lock:
            self._open[number] = opened
            while len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
        return opened

    def _read(self, number: int, offset: int, size: int) -> bytes:
        shard, opened = self.shards[number], self._opened(number)
        head = shard.head
        if offset + size > head.tar_bytes or size > max(MAX_FILE_BYTES, MAX_JSON_BYTES):
            raise ShardGone(shard.path, "index is damaged", NEW_INDEX)
        handle = opened.file.fileno()
        try:
            status = os.fstat(handle)
            content = os.pread(handle, size, offset)
        except OSError as problem:
            reason = problem.strerror or ""
            raise ShardGone(shard.path, "shard is not readable", "be readable", reason) from problem
        if not status.st_nlink:  # though this process may hold it open
            raise ShardGone(shard.path, "shard has gone", "be readable", "it was removed")
        if not shard_index.is_as_indexed(status, head) or len(content) < size:
            raise ShardGone(shard.path, "shard has changed", "be as it was indexed")
        return content

    def _where(self, number: int, offset: int) -> str:
        """The name of the member whose content begins at `offset`, for messages."""
        header = self._read(number, offset - BLOCK, BLOCK)
        name = header[:100].partition(b"\0")[0].decode("utf-8", "replace")
        return f"{self.shards[number].path}/{name}"

    def read_bytes(self, i: int) -> tuple[bytes, str]:
        """The file of picture i, and its name for messages.

        Raises:
            DataError: its shard has gone or has changed.
        """
        number, row = self._place(i)
        columns = self._opened(number).columns
        offset, size = int(columns["picture"][row]), int(columns["picture_size"][row])
        return self._read(number, offset, size), self._where(number, offset)

    def load(self, i: int) -> np.ndarray:
        """Picture i, (H, W, 3) uint8.

        Raises:
            DataError: it does not decode, or its shard has gone or has changed.
        """
        return decode(*self.read_bytes(i))

    def captions_at(self, i: int) -> list[str]:
        """All captions of item i. Raises DataError where its shard has gone or has changed."""
        number, row = self._place(i)
        columns = self._opened(number).columns
        offset, size = int(columns["caption"][row]), int(columns["caption_size"][row])
        parse = json_captions if columns["texts"][row] & JSON_TEXT else text_captions
        return parse(self._read(number, offset, size), self.shards[number].path)

    def number_of_captions(self) -> int:
        """The captions of all items together."""
        return sum(shard.head.texts for shard in self.shards)

    def digests(self) -> Iterator[bytes]:
        """The hash of each picture's file, as of plain files; b"" of one that has gone."""
        for i in range(len(self)):
            try:
                yield digest_of(self.read_bytes(i)[0])
            except DataError:
                yield b""

    def hold_hashes(self) -> Iterator[np.ndarray]:
        """The numbers by which pictures are held out (`split.hold_out`), uint64, a shard each."""
        for number in range(len(self.shards)):
            yield self._opened(number).columns["hold"]

    def fingerprint(self) -> dict[str, str]:
        """Hashes of "captions", "pictures" and of each shard ("shards"), from the indexes."""
        values = {}
        for name in ("captions", "pictures"):
            parts = "".join(getattr(shard.head, name) for shard in self.shards)
            values[name] = f"SHA-256 {hashlib.sha256(parts.encode()).hexdigest()[:16]}"
        return values

    def parts(self) -> dict[str, str]:
        """Shard -> its number of pairs and a short hash, by which a changed set is described."""
        named = {}
        for shard in self.shards:
            both = hashlib.sha256((shard.head.captions + shard.head.pictures).encode()).hexdigest()
            named[str(shard.path.relative_to(self.folder))] = f"{shard.head.pairs} {both[:8]}"
        return named


class SeveralCaptions(Mapping[int, Sequence[str]]):
    """The items that have several captions, read when they are asked for."""

    def __init__(self, pairs: ShardPairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return sum(shard.head.several for shard in self.pairs.shards)

    def __iter__(self) -> Iterator[int]:
        first = 0
        for number, shard in enumerate(self.pairs.shards):
            if shard.head.several:
                texts = self.pairs._opened(number).columns["texts"] & (JSON_TEXT - 1)
                yield from (first + np.flatnonzero(texts > 1)).tolist()
            first += shard.head.pairs

    def __contains__(self, i: object) -> bool:
        if not isinstance(i, (int, np.integer)) or not 0 <= i < len(self.pairs):
            return False
        number, row = self.pairs._place(int(i))
        if not self.pairs.shards[number].head.several:
            return False
        return bool(self.pairs._opened(number).columns["texts"][row] & (JSON_TEXT - 1) > 1)

    def __getitem__(self, i: int) -> list[str]:
        if i not in self:
            raise KeyError(i)
        return self.pairs.captions_at(i)


SOURCE = Source(name="a folder of tar shards", fits=is_shard_folder, opens=ShardPairs)
