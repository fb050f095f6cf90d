"""The rows of a table, read one by one when they are asked for: CSV, TSV, JSON lines, parquet."""

from __future__ import annotations

import base64
import binascii
import csv
import errno
import io
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from dalle import files
from dalle.data.source import require_packages
from dalle.errors import DataError

MAX_ROW = 96 << 20  # bytes: a picture of 64 MiB in base64
MAX_FIELD = 131_072  # characters of a value in a CSV without pictures
MAX_GROUPS = 4  # row groups of a parquet file that are kept decoded
FILES = (
    *("file_name", "filename", "filepath", "file_path", "image_path", "image_file", "file"),
    *("path", "image", "img", "picture"),
)
BYTES = ("bytes", "image_bytes", "image", "jpg", "jpeg", "png", "webp", "picture")
CAPTIONS = ("caption", "captions", "text", "texts", "title", "description", "prompt")


class Row(NamedTuple):
    """A row: the picture's file name or its bytes, and the value that holds its captions."""

    picture: str | bytes | None
    captions: Any


class Rows(Protocol):
    """The rows of a table."""

    def __iter__(self) -> Iterator[Row | str]:
        """All rows in order; the reason in place of one that is damaged."""

    def read(self, number: int) -> Row:
        """One row by its number among all. Raises OSError or ValueError where it has changed."""


def open_rows(path: Path) -> Rows:
    """The rows of a table, by its suffix.

    Raises:
        DataError: no readable table, or a column is missing.
        EnvironmentProblem: the package for parquet is not installed.
    """
    try:
        files.check_regular(path)
        if path.suffix.lower() == ".parquet":
            require_packages(f"data: {path.name}", ("pyarrow",), "data")
            return ParquetRows(path)
        if path.suffix.lower() == ".jsonl":
            return JsonRows(path)
        return CsvRows(path, "\t" if path.suffix.lower() == ".tsv" else ",")
    except OSError as problem:
        reason = problem.strerror or str(problem).split("\n")[0]
        raise DataError(f"data: {path} must be a readable table, got: {reason}") from problem


def _column(path: Path, columns: Sequence[str], known: Sequence[str]) -> str | None:
    """The column whose name is the first of the known ones, in any case of letters."""
    folded = {column.strip().lower(): column for column in reversed(columns)}
    return next((folded[name] for name in known if name in folded), None)


def missing_column(
    path: Path, kind: str, known: Sequence[str], columns: Sequence[str]
) -> DataError:
    """The error of a table without a column for pictures or captions."""
    got = ", ".join(columns[:20]) + (", ..." if len(columns) > 20 else "")
    return DataError(
        f"data: {path} must have a column of {kind} ({', '.join(known)}), got {got or 'none'}"
    )


def _from_base64(value: Any) -> bytes | None:
    """The bytes of a picture; None where the value is no base64."""
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError, TypeError):
        return None


class _Lines:
    """Rows of a text file that are found again by their offsets, 8 bytes a row in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ends = np.zeros(1, np.int64)  # offset behind each row; the first row begins at [0]
        self._file: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    def chunk(self, number: int) -> bytes:
        """The bytes of a row."""
        if self._file is None:
            self._file = open(self.path, "rb", buffering=0, opener=files.regular_opener)
        begin, end = int(self.ends[number]), int(self.ends[number + 1])
        content = os.pread(self._file.fileno(), end - begin, begin)
        if len(content) < end - begin:
            raise ValueError("the table has become shorter")
        return content


class CsvRows(_Lines):
    """Rows of a CSV or TSV with a line of names; a quoted value may hold line ends.

    A picture is a file name, or where no column has these, bytes in base64.
    """

    def __init__(self, path: Path, delimiter: str) -> None:
        super().__init__(path)
        self.delimiter = delimiter
        with open(path, "rb", opener=files.regular_opener) as file:
            first = file.readline(MAX_ROW)
        try:
            names: list[str] = next(self._reader([first.decode("utf-8-sig")]), [])
        except UnicodeDecodeError as problem:
            got = f"byte {problem.start} is not UTF-8"
            raise DataError(f"data: {path} must be a table in UTF-8, got: {got}") from problem
        except csv.Error as problem:
            got = str(problem).split("\n")[0]
            raise DataError(f"data: {path} must be a table in UTF-8, got: {got}") from problem
        self.start = len(first)
        picture, caption = _column(path, names, FILES), _column(path, names, CAPTIONS)
        self.has_bytes = picture is None  # beside file names, "bytes" may be their sizes
        picture = picture or _column(path, names, BYTES)
        for kind, column, known in (
            ("pictures", picture, (*FILES, "bytes")),
            ("captions", caption, CAPTIONS),
        ):
            if column is None:
                raise missing_column(path, kind, known, names)
        self.picture, self.caption = names.index(str(picture)), names.index(str(caption))

    def _reader(self, lines: Any, *, strict: bool = False) -> Any:
        # A quote that is never closed takes all that follows, up to this limit.
        csv.field_size_limit(MAX_ROW if getattr(self, "has_bytes", False) else MAX_FIELD)
        return csv.reader(lines, delimiter=self.delimiter, strict=strict)

    def _is_open(self, begin: int, end: int) -> bool:
        """Whether the last row of the table ends in a quote that is not closed."""
        with open(self.path, "rb", opener=files.regular_opener) as file:
            file.seek(begin)
            text = file.read(end - begin).decode("utf-8", "surrogateescape")
        try:
            next(self._reader(io.StringIO(text, newline=""), strict=True), [])
        except csv.Error as problem:
            return "end of data" in str(problem)
        return False

    def __iter__(self) -> Iterator[Row | str]:
        ends, read, lines_read = [self.start], [self.start], [0]
        with open(self.path, "rb", opener=files.regular_opener) as file:
            file.seek(self.start)
            size, before = os.fstat(file.fileno()).st_size, 0

            def lines() -> Iterator[str]:
                while line := file.readline(MAX_ROW):
                    read[0] += len(line)
                    lines_read[0] += 1
                    yield line.decode("utf-8", "surrogateescape")

            reader = self._reader(lines())
            while True:
                found: Row | str
                try:
                    found = self._row(next(reader))
                except StopIteration:
                    break
                except csv.Error:
                    found = "row is damaged"
                several, before = lines_read[0] > before + 1, lines_read[0]
                if several and read[0] >= size and self._is_open(ends[-1], read[0]):
                    found = "quote is never closed"
                ends.append(read[0])
                yield found
        self.ends = np.array(ends, np.int64)

    def _row(self, values: list[str]) -> Row | str:
        if not values:
            return ""  # an empty line
        if len(values) <= max(self.picture, self.caption):
            return "row is too short"
        caption = values[self.caption]
        if any(0xDC80 <= ord(char) <= 0xDCFF for char in caption):
            return "caption is not UTF-8"
        picture = values[self.picture]
        if not self.has_bytes:
            return Row(picture, caption)
        content = _from_base64(picture)
        return "bytes are no base64" if content is None else Row(content, caption)

    def read(self, number: int) -> Row:
        text = self.chunk(number).decode("utf-8", "surrogateescape")
        row = self._row(next(self._reader(io.StringIO(text, newline="")), []))
        if isinstance(row, str):
            raise ValueError(row or "the row is empty")
        return row


class JsonRows(_Lines):
    """Rows of JSON objects, one a line; a picture is a file name, or bytes in base64."""

    def _row(self, line: bytes) -> Row | str:
        try:
            value = files.parse_json(line)
        except ValueError:
            return "row is no JSON"
        if not isinstance(value, dict):
            return "row is no JSON object"
        columns = [name for name in value if isinstance(value[name], (str, list, dict))]
        caption = _column(self.path, columns, CAPTIONS)
        captions = None if caption is None else value[caption]
        name = _column(self.path, columns, FILES)
        raw = _column(self.path, columns, BYTES)
        if raw is not None and raw.strip().lower() not in FILES:
            content = _from_base64(value[raw])
            return "bytes are no base64" if content is None else Row(content, captions)
        return Row(value[name] if name and isinstance(value[name], str) else None, captions)

    def __iter__(self) -> Iterator[Row | str]:
        ends, position, last = [0], 0, b""
        seen: set[str] = set()
        usable = False
        with open(self.path, "rb", opener=files.regular_opener) as file:
            while line := file.readline(MAX_ROW):
                position += len(line)
                ends.append(position)
                row = self._row(line) if line.strip() else ""
                usable = usable or (isinstance(row, Row) and None not in row)
                if not usable and isinstance(row, Row) and len(seen) < 20:
                    last = line
                    seen |= set(files.parse_json(last))
                yield row
        self.ends = np.array(ends, np.int64)
        for kind, known in (("pictures", (*FILES, "bytes")), ("captions", CAPTIONS)):
            if seen and not usable and _column(self.path, sorted(seen), known) is None:
                raise missing_column(self.path, kind, known, sorted(seen))

    def read(self, number: int) -> Row:
        row = self._row(self.chunk(number))
        if isinstance(row, str):
            raise ValueError(row)
        return row


class ParquetRows:
    """Rows of a parquet file, of which a few row groups are kept decoded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()
        schema, names = self.file.schema_arrow, self.file.schema_arrow.names
        import pyarrow.types as types

        def is_bytes(name: str) -> bool:
            kind = schema.field(name).type
            binary = types.is_binary(kind) or types.is_large_binary(kind)
            return bool(types.is_struct(kind) or binary)

        texts = [name for name in names if not is_bytes(name)]
        raw = [name for name in names if is_bytes(name)]
        picture = _column(path, raw, (*BYTES, *FILES)) or _column(path, texts, FILES)
        caption = _column(path, texts, CAPTIONS)
        for kind, column, known in (
            ("pictures", picture, (*FILES, "bytes")),
            ("captions", caption, CAPTIONS),
        ):
            if column is None:
                raise missing_column(path, kind, known, names)
        self.columns: list[str] = [str(picture), str(caption)]
        self.has_bytes = picture in raw
        counts = [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

    def _open(self) -> None:
        import pyarrow
        import pyarrow.parquet as parquet

        try:
            self.file = parquet.ParquetFile(self.path, memory_map=True)
        except (pyarrow.ArrowException, ValueError) as problem:
            raise OSError(errno.EINVAL, f"no parquet: {str(problem).splitlines()[0]}") from problem
        self.groups: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("file", "groups")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _group(self, number: int) -> Any:
        if number not in self.groups:
            import pyarrow

            try:
                self.groups[number] = self.file.read_row_group(number, self.columns)
            except pyarrow.ArrowException as problem:
                raise ValueError(str(problem).splitlines()[0]) from problem
            while len(self.groups) > MAX_GROUPS:
                self.groups.popitem(last=False)
        return self.groups[number]

    def __iter__(self) -> Iterator[Row | str]:
        for number in range(len(self.starts) - 1):
            size = int(self.starts[number + 1] - self.starts[number])
            try:
                group = self._group(number)
            except (OSError, ValueError):
                yield from ["row group is damaged"] * size
                continue
            yield from (self._row(group, place) for place in range(size))

    def _row(self, group: Any, place: int) -> Row:
        picture, captions = (group.column(name)[place].as_py() for name in self.columns)
        if isinstance(picture, dict):  # as in the data sets of Hugging Face
            picture = picture.get("bytes") or picture.get("path")
        return Row(picture if isinstance(picture, (str, bytes)) else None, captions)

    def read(self, number: int) -> Row:
        group = int(np.searchsorted(self.starts, number, "right")) - 1
        return self._row(self._group(group), number - int(self.starts[group]))
