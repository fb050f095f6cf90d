"""A table of pictures and captions: CSV, TSV, JSON lines or parquet."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dalle.console import say
from dalle.data.folder import digest_of
from dalle.data.images import BadPicture, decode, open_checked, read_bytes
from dalle.data.pairs import LazyCaptions, LazySeveral, format_counts, hashed_fingerprint
from dalle.data.rows import ParquetRows, Row, open_rows
from dalle.data.source import Source
from dalle.data.texts import bad_caption, captions_in
from dalle.errors import DataError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
MAX_PROBLEMS = 100
URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.I)


def is_table(path: Path) -> bool:
    """Whether a path has the suffix of a table and is no folder."""
    return path.suffix.lower() in SUFFIXES and path.exists() and not path.is_dir()


class TablePairs:
    """Pairs of a table, in the order of its rows.

    A row has a file name (from the table's folder on) or the bytes of a picture, and its captions:
    a text, one a line, or a list of texts. Rows are read again when they are asked for.

    Args:
        path: the table.
        verify: "header" opens every picture and checks format and size; "none" trusts it.

    Attributes:
        captions: the first caption of each.
        several: item -> all its captions, where it has more than one.
        image_size: 0, as sizes differ.
        skipped: reason -> number of rows left out.
        problems: lines on the first of them.
        files: the table.

    Raises:
        DataError: no such table, a column is missing, or no usable row (with the reasons).
        EnvironmentProblem: the package for parquet is not installed.
    """

    image_size = 0

    def __init__(self, path: Path | str, *, verify: str = "header") -> None:
        self.path = Path(path)
        self.name, self.files = self.path.name, [self.path]
        self.rows = open_rows(self.path)
        self.skipped: Counter[str] = Counter()
        self.problems: list[str] = []
        numbers: list[int] = []
        digests: list[bytes] = []
        several: list[int] = []
        total = 0
        for number, row in enumerate(tqdm(self.rows, "rows", disable=None, leave=False)):
            if isinstance(row, str):
                self.skipped[row] += bool(row)
                continue
            where = f"{self.path}: row {number + 1}"
            try:
                texts = _texts(row, where)
                content, name = self._content(row, where)
                if verify != "none":
                    open_checked(content, name)
            except BadPicture as problem:
                self.skipped[problem.reason] += 1
                if len(self.problems) < MAX_PROBLEMS:
                    self.problems.append(str(problem))
                continue
            if len(texts) > 1:
                several.append(len(numbers))
            total += len(texts)
            numbers.append(number)
            digests.append(digest_of(content))
        self.skipped = +self.skipped
        if not numbers:
            why = format_counts(self.skipped) or "the table is empty"
            raise DataError(f"data: {self.path} must hold a usable row, got none ({why})")
        self._numbers = np.array(numbers, np.int64)
        self._digests = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)
        self._several, self._total = np.array(several, np.int64), total
        self.captions: Sequence[str] = LazyCaptions(self, self.captions_at)
        self.several: Mapping[int, Sequence[str]] = LazySeveral(self._several, self.captions_at)
        if isinstance(self.rows, ParquetRows) and self.rows.has_bytes:
            say(
                f"data: {self.name}: a picture is read with its whole row group; "
                "`dalle data pack` makes shards of it, which are read faster"
            )

    def __len__(self) -> int:
        return len(self._numbers)

    def _content(self, row: Row, where: str) -> tuple[bytes, str]:
        """The file of a row's picture, and its name for messages."""
        if isinstance(row.picture, bytes):
            if not row.picture:
                raise BadPicture(where, "empty file", "have bytes")
            return row.picture, where
        if not row.picture:
            raise BadPicture(where, "row without picture", "name a picture")
        if URL.match(row.picture):
            raise BadPicture(where, "picture is a URL", "be a file", row.picture[:80])
        path = self.path.parent / row.picture
        try:
            return read_bytes(path), str(path)
        except ValueError as problem:  # a NUL character in the name
            raise BadPicture(where, "not a file", "be a plain file") from problem

    def _row(self, i: int) -> Row:
        try:
            return self.rows.read(int(self._numbers[i]))
        except (OSError, ValueError) as problem:
            reason = str(problem).split("\n")[0]
            where = f"{self.path}: row {int(self._numbers[i]) + 1}"
            raise BadPicture(
                where, "table has changed", "be as it was", reason, what="row"
            ) from problem

    def captions_at(self, i: int) -> list[str]:
        """All captions of item i. Raises DataError where the table has changed."""
        return _texts(self._row(i), f"{self.path}: row {int(self._numbers[i]) + 1}")

    def number_of_captions(self) -> int:
        """The captions of all items together."""
        return self._total

    def digests(self) -> Iterator[bytes]:
        """The hash of each picture's file when the table was opened."""
        return (row.tobytes() for row in self._digests)

    def fingerprint(self) -> dict[str, str]:
        """Hashes of "captions" and "pictures"."""
        return hashed_fingerprint(self)

    def read_bytes(self, i: int) -> tuple[bytes, str]:
        """The file of picture i, and its name for messages. Raises DataError where it has gone."""
        return self._content(self._row(i), f"{self.path}: row {int(self._numbers[i]) + 1}")

    def load(self, i: int) -> np.ndarray:
        """Picture i, (H, W, 3) uint8.

        Raises:
            DataError: the file has gone or does not decode.
        """
        return decode(*self.read_bytes(i))


def _texts(row: Row, where: str) -> list[str]:
    if row.captions is None:
        raise bad_caption(where, "row without caption", "be given")
    texts = captions_in(row.captions)
    if not texts:
        raise bad_caption(where, "caption is empty", "hold text")
    return texts


SOURCE = Source(name="a table (.csv, .tsv, .jsonl, .parquet)", fits=is_table, opens=TablePairs)
