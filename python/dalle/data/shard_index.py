"""The index of a tar shard: where each pair's picture and caption are, in a small binary file.

Layout, all numbers little-endian: 16 bytes `MAGIC`, the length of the head (4 bytes), its BLAKE2b
(16 bytes), the head as JSON, zeros up to a multiple of 64 bytes, then one array for each of
`COLUMNS`, 33 bytes a pair in all. The head binds the index to its tar: size, time of the last
change, and the hash of its first and last header. A tar is read once, whole, to make its index.
"""

from __future__ import annotations

import gc
import hashlib
import os
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dalle import files
from dalle.data import images
from dalle.data.containers import picture_format
from dalle.data.folder import OTHER_SUFFIXES, SUFFIXES, digest_of
from dalle.data.images import DECODERS, BadPicture
from dalle.data.pairs import caption_bytes
from dalle.data.tar import BLOCK, Member, members
from dalle.data.texts import (
    MAX_CAPTION_BYTES,
    MAX_JSON_BYTES,
    json_captions,
    text_captions,
    too_long,
)
from dalle.errors import DataError

MAGIC = b"dalle-tar-index\n"
FORMAT = 1
SUFFIX = ".index"  # of the index beside 00000.tar: 00000.tar.index
COLUMNS: tuple[tuple[str, str], ...] = (
    ("hold", "<u8"),  # hash by which pictures are held out, the same as that of a plain file
    ("picture", "<u8"),  # offset of the content in the tar
    ("caption", "<u8"),
    ("picture_size", "<u4"),
    ("caption_size", "<u4"),
    ("texts", "u1"),  # captions of the pair, up to 127; + 128 where they are in JSON
)
PAIR_BYTES = sum(np.dtype(kind).itemsize for _, kind in COLUMNS)
JSON_TEXT = 128
LIMITS = {".txt": MAX_CAPTION_BYTES, ".json": MAX_JSON_BYTES}
MAX_HEAD = 1 << 20
MAX_PROBLEMS = 20
_PREFIX = len(MAGIC) + 4 + 16


class StaleIndex(DataError):
    """An index that does not belong to its tar, or is damaged; it is made anew."""


@dataclass(frozen=True)
class Head:
    """What an index says about its tar.

    Attributes:
        tar_bytes, tar_mtime_ns: size and time of the last change.
        first, last: offsets of the first and the last header.
        headers: BLAKE2b of these two headers.
        pairs: how many.
        several: pairs of several captions.
        texts: captions in all.
        captions, pictures: BLAKE2b of all captions and of all pictures' hashes, in order.
        columns: CRC-32 of the columns.
        skipped: reason -> what was left out.
        problems: lines on the first of them.
    """

    tar_bytes: int
    tar_mtime_ns: int
    first: int
    last: int
    headers: str
    pairs: int
    several: int
    texts: int
    captions: str
    pictures: str
    columns: int
    skipped: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def hold_hash(picture: bytes) -> int:
    """The number below 2^64 by which a picture of this hash is held out or not."""
    return int.from_bytes(hashlib.blake2b(picture, digest_size=8).digest(), "big")


@dataclass(slots=True)
class _Pair:
    """What a tar has of one key so far."""

    pictures: list[tuple[Member, bytes] | BadPicture] = field(default_factory=list)
    texts: dict[str, tuple[Member, list[str]] | BadPicture] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)


@contextmanager
def _no_collector() -> Iterator[None]:
    """Python's collector walks through all pairs again and again, a fifth of the time, and they
    have no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_collector()
def build(path: Path) -> tuple[Head, dict[str, np.ndarray]]:
    """Reads a tar once and returns what its index holds.

    A pair is a picture and a caption of the same name without its suffix; of `KEY.txt` and
    `KEY.json` the text counts. Pairs are in the order in which their keys come first.

    Raises:
        OSError: it cannot be read, or is no plain file.
        DataError: it is compressed.
    """
    skipped: Counter[str] = Counter()
    problems: list[str] = []
    pairs: dict[str, _Pair] = {}
    first, last, shard = 0, 0, path.name

    def skip(problem: BadPicture) -> None:
        skipped[problem.reason] += 1
        if len(problems) < MAX_PROBLEMS:
            problems.append(str(problem))

    with open(path, "rb", buffering=1 << 20, opener=files.regular_opener) as file:
        status = os.fstat(file.fileno())
        if (start := file.read(6))[:2] == b"\x1f\x8b" or start in (b"\xfd7zXZ\0", b"BZh91A"):
            raise DataError(f"{path}: tar must not be compressed as a whole, got a compressed one")
        for entry in members(file, status.st_size):
            if isinstance(entry, str):
                skipped[entry] += 1
                continue
            last = entry.offset - BLOCK
            first = first or last
            if reason := _add(pairs, entry, file, shard):
                skipped[reason] += 1
        headers = _headers(file.fileno(), first, last)
    rows: list[tuple[int, ...]] = []
    captions, pictures = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    several = total = 0
    for key, pair in pairs.items():
        try:
            (member, content_hash), further = _picture_of(pair, shard, key)
            text_member, texts, kind = _text_of(pair)
        except BadPicture as problem:
            skip(problem)
            continue
        for other in further:
            if isinstance(other, BadPicture):
                skip(other)
            else:
                skipped["second picture of a caption"] += 1
        several += len(texts) > 1
        total += len(texts)
        captions.update(caption_bytes(texts))
        pictures.update(content_hash)
        rows.append(
            (
                hold_hash(content_hash),
                member.offset,
                text_member.offset,
                member.size,
                text_member.size,
                min(len(texts), JSON_TEXT - 1) + kind,
            )
        )
    columns = {
        name: np.array([row[i] for row in rows], np.dtype(dtype))
        for i, (name, dtype) in enumerate(COLUMNS)
    }
    head = Head(
        status.st_size,
        status.st_mtime_ns,
        first,
        last,
        headers,
        len(rows),
        several,
        total,
        captions.hexdigest(),
        pictures.hexdigest(),
        zlib.crc32(_column_bytes(columns)),
        dict(sorted(skipped.items())),
        problems,
    )
    return head, columns


def _add(pairs: dict[str, _Pair], member: Member, file: BinaryIO, shard: str) -> str:
    """Puts a member into its pair; returns the reason where it belongs to none."""
    name = member.name
    while name.startswith("./"):
        name = name[2:]
    base = name.rfind("/") + 1
    dot = name.rfind(".", base)
    if name.startswith(".", base):
        return "hidden file"
    stem, suffix = (name[:dot], name[dot:].lower()) if dot > base else (name, "")
    is_picture = suffix in SUFFIXES
    if suffix in OTHER_SUFFIXES:
        return "picture of another format"
    if not is_picture and suffix not in (".txt", ".json"):
        return "neither picture nor caption"
    key = stem if stem.isascii() else unicodedata.normalize("NFC", stem)
    pair = pairs.get(key)
    if pair is None:
        pair = pairs[key] = _Pair()
    if suffix in pair.names:
        return "duplicate key"
    pair.names.add(suffix)
    where = f"{shard}/{name}"
    limit = images.MAX_FILE_BYTES if is_picture else LIMITS[suffix]
    content = b""
    if member.size <= limit:
        file.seek(member.offset)
        content = file.read(member.size)
    try:
        if is_picture:
            check_picture(content, member.size, where)
            pair.pictures.append((member, digest_of(content)))
        elif member.size > limit:
            raise too_long(where, limit)
        else:
            parse = json_captions if suffix == ".json" else text_captions
            pair.texts[suffix] = member, parse(content, where)
    except BadPicture as problem:
        if is_picture:
            pair.pictures.append(problem)
        else:
            pair.texts[suffix] = problem
    return ""


def check_picture(content: bytes, size: int, where: str) -> None:
    """Refuses what is no picture by its first bytes.

    Raises:
        BadPicture: empty, above 64 MiB, no picture, or of another format.
    """
    if not size:
        raise BadPicture(where, "empty file", "have bytes")
    if size > images.MAX_FILE_BYTES:
        limit = f"have at most {images.MAX_FILE_BYTES} bytes"
        raise BadPicture(where, "file too large", limit, f"{size} bytes")
    kind = picture_format(content[:64])
    if kind not in DECODERS:
        reason = "picture of another format" if kind else "not a picture"
        detail = kind or f"it begins with {ascii(content[:16].decode('latin-1'))}"
        raise BadPicture(where, reason, f"be one of {', '.join(DECODERS)}", detail)


def _picture_of(
    pair: _Pair, shard: str, key: str
) -> tuple[tuple[Member, bytes], Sequence[tuple[Member, bytes] | BadPicture]]:
    """The first picture of a pair that can be used, and the others."""
    if not pair.pictures:
        raise BadPicture(f"{shard}/{key}", "caption without picture", "have a picture")
    if not pair.texts:
        raise BadPicture(f"{shard}/{key}", "picture without caption", "have a caption")
    for i, found in enumerate(pair.pictures):
        if not isinstance(found, BadPicture):
            return found, (*pair.pictures[:i], *pair.pictures[i + 1 :])
    refused = pair.pictures[0]
    assert isinstance(refused, BadPicture)
    raise refused


def _text_of(pair: _Pair) -> tuple[Member, list[str], int]:
    """The captions of a pair, their member, and `JSON_TEXT` or 0."""
    found = pair.texts.get(".txt", pair.texts.get(".json"))
    assert found is not None
    if isinstance(found, BadPicture):
        raise found
    return *found, 0 if ".txt" in pair.texts else JSON_TEXT


def _headers(handle: int, first: int, last: int) -> str:
    content = os.pread(handle, BLOCK, first) + os.pread(handle, BLOCK, last)
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def is_as_indexed(status: os.stat_result, head: Head) -> bool:
    """Whether a tar has the size and the time that its index knows."""
    return (status.st_size, status.st_mtime_ns) == (head.tar_bytes, head.tar_mtime_ns)


def check_fresh(handle: int, head: Head, path: Path) -> None:
    """Refuses an open tar that is not the one of the index.

    Raises:
        StaleIndex: in one line.
    """
    same = is_as_indexed(os.fstat(handle), head)
    if not same or _headers(handle, head.first, head.last) != head.headers:
        raise StaleIndex(f"{path}: tar must be as it was indexed, got one that has changed since")


def write(path: Path, head: Head, columns: dict[str, np.ndarray]) -> None:
    """Writes an index, atomically. Raises OSError where it cannot be written."""
    text = files.to_json({"format": FORMAT, **asdict(head)})
    check = hashlib.blake2b(text, digest_size=16).digest()
    prefix = MAGIC + len(text).to_bytes(4, "little") + check + text
    prefix += bytes(-len(prefix) % 64)
    files.write_atomic(path, prefix + _column_bytes(columns))


def _column_bytes(columns: dict[str, np.ndarray]) -> bytes:
    return b"".join(columns[name].tobytes() for name, _ in COLUMNS)


def read_head(path: Path) -> tuple[Head, int]:
    """The head of an index, and the offset of its columns.

    Raises:
        OSError: no such file, or it cannot be read.
        StaleIndex: it is no index of this version, or it is damaged.
    """

    def refused(why: str) -> StaleIndex:
        return StaleIndex(f"{path}: index must be whole and of format {FORMAT}, got {why}")

    with open(path, "rb", opener=files.regular_opener) as file:
        prefix = file.read(_PREFIX)
        if len(prefix) < _PREFIX or not prefix.startswith(MAGIC):
            raise refused("another file")
        length = int.from_bytes(prefix[len(MAGIC) : len(MAGIC) + 4], "little")
        text = file.read(length) if length <= MAX_HEAD else b""
        size = os.fstat(file.fileno()).st_size
    if hashlib.blake2b(text, digest_size=16).digest() != prefix[-16:]:
        raise refused("a damaged head")
    values: dict[str, Any] = files.parse_json(text)
    if values.pop("format", None) != FORMAT:
        raise refused("another format")
    head = Head(**values)
    for name, kind in Head.__annotations__.items():
        value = getattr(head, name)
        if not isinstance(value, {"int": int, "str": str}.get(kind, (dict, list))):
            raise refused(f"{name} {value!r}")
    start = _PREFIX + length + -(_PREFIX + length) % 64
    if size != start + PAIR_BYTES * head.pairs:
        raise refused(f"{size} bytes")
    return head, start


def read_columns(path: Path, start: int, head: Head, *, check: bool) -> dict[str, np.ndarray]:
    """The columns of an index, memory-mapped.

    Args:
        path: of the index.
        start: where they begin.
        head: of the index.
        check: whether their CRC is computed, for which all of them are read.

    Raises:
        OSError: it has gone.
        ValueError: it is shorter.
        StaleIndex: the CRC differs.
    """
    columns: dict[str, np.ndarray] = {}
    pairs = head.pairs
    if not pairs:  # an empty file cannot be mapped
        return {name: np.empty(0, np.dtype(kind)) for name, kind in COLUMNS}
    whole = np.memmap(path, np.uint8, "r", start, (PAIR_BYTES * pairs,))
    if check and zlib.crc32(whole.data) != head.columns:
        raise StaleIndex(f"{path}: index must be as it was written, got damaged columns")
    offset = 0
    for name, kind in COLUMNS:
        size = np.dtype(kind).itemsize * pairs
        columns[name] = whole[offset : offset + size].view(kind)
        offset += size
    return columns
