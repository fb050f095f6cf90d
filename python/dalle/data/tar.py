"""The plain files in a tar, found without unpacking anything.

Nothing is written and no name is followed: a link, a device, a name that leads out of the folder
and the like are reported by a reason, and the walk goes on behind them. POSIX (pax) and GNU
headers for long names and large files are understood.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
MAX_LONG = 1 << 20  # bytes read of a header that holds a long name or pax records
ZEROS = bytes(BLOCK)

DAMAGED = "damaged header in the tar"
BEYOND = "member beyond the end of its tar"
SPARSE = "sparse file in the tar"
LINK = "link in the tar"
DEVICE = "device or pipe in the tar"
OTHER = "other kind of member in the tar"
ABSOLUTE = "absolute name in the tar"
OUTSIDE = "name with .. in the tar"

_NO_PAYLOAD = {b"1": LINK, b"2": LINK, b"3": DEVICE, b"4": DEVICE, b"6": DEVICE, b"5": ""}
_REGULAR = (b"0", b"\0", b"7")
_SILENT = (b"g", b"K", b"V")  # defaults of pax, names of links, labels: they carry no file


class Member(NamedTuple):
    """A plain file in a tar: its name, where its content begins, and how many bytes it has."""

    name: str
    offset: int
    size: int


def members(file: BinaryIO, length: int) -> Iterator[Member | str]:
    """The plain files of a tar, in order.

    The caller may read `file` between two of them. Behind a damaged header the walk goes on at the
    next block that is a header; two blocks of zeros end it.

    Args:
        file: open for reading, seekable.
        length: bytes of the file that belong to the tar.

    Yields:
        Each plain file, or the reason why something was left out.
    """
    position, zeros, lost = 0, 0, False
    name, size, reason = "", -1, ""  # of the next member, by a header before it
    while position + BLOCK <= length:
        file.seek(position)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            break
        if header == ZEROS:
            zeros += 1
            position += BLOCK
            if zeros == 2 and not lost:
                return
            continue
        zeros = 0
        if not _is_header(header, lost):
            if not lost:
                yield DAMAGED
            lost, name, size, reason = True, "", -1, ""
            position += BLOCK
            continue
        lost = False
        kind = header[156:157]
        stored = _number(header[124:136])
        payload = position + BLOCK
        if kind in _NO_PAYLOAD:
            if _NO_PAYLOAD[kind]:
                yield _NO_PAYLOAD[kind]
            name, size, reason = "", -1, ""
            position = payload
            continue
        special = kind in (b"x", b"X", b"L") or kind in _SILENT
        used = stored if special or size < 0 else size
        if kind == b"S":
            payload = _after_sparse_headers(file, header, payload, length)
            reason = SPARSE
        if used < 0 or payload + used > length:
            yield BEYOND if used >= 0 else DAMAGED
            lost, name, size, reason = True, "", -1, ""
            position += BLOCK
            continue
        position = payload + -(-used // BLOCK) * BLOCK
        if special:
            if kind in (b"x", b"X", b"L"):
                if used > MAX_LONG:
                    reason = DAMAGED
                    continue
                file.seek(payload)
                content = file.read(used)
                if kind == b"L":
                    name = _text(content)
                else:
                    name, size, reason = _pax(content, name, size, reason)
            continue
        name = name or _name(header)
        if not reason and kind not in _REGULAR:
            reason = OTHER
        if reason or not name.endswith("/"):  # the old form of a folder
            yield reason or _refused(name) or Member(name, payload, used)
        name, size, reason = "", -1, ""
    if position < length and not lost and zeros < 2:
        yield BEYOND  # less than a header is left


def _is_header(header: bytes, lost: bool) -> bool:
    """Whether the checksum fits, and, where the walk is lost, the magic."""
    if lost and header[257:262] != b"ustar":
        return False
    field = header[148:156]
    checksum = _number(field)
    # The lower half of Adler-32 is 1 + the sum of the bytes, modulo 65521, at the speed of C.
    total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(field) + 256
    if (total - checksum) % 65521 == 0:
        return True
    # Some old programs summed the bytes as signed numbers.
    high = sum(byte > 127 for byte in header) - sum(byte > 127 for byte in field)
    return (total - 256 * high - checksum) % 65521 == 0 and checksum > 0


def _number(field: bytes) -> int:
    """A number in octal digits, or in base 256 for large ones; -1 where it is none."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    if not digits.isdigit():
        return -1 if digits or field.strip(b"\0 ") else 0
    try:
        return int(digits, 8)
    except ValueError:
        return -1


def _text(content: bytes) -> str:
    return content.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name = _text(header[:100])
    if header[257:263] == b"ustar\0":  # GNU's has "ustar  " and other things in this place
        prefix = _text(header[345:500])
        return f"{prefix}/{name}" if prefix else name
    return name


def _refused(name: str) -> str:
    """Why a member of this name is left out; "" where it is not."""
    if name.startswith("/") or not name:
        return ABSOLUTE if name else DAMAGED
    return OUTSIDE if ".." in name and ".." in name.split("/") else ""


def _pax(content: bytes, name: str, size: int, reason: str) -> tuple[str, int, str]:
    """Name, size and reason to leave out the next member, by the records of its pax header."""
    while content and content[:1] != b"\0":
        digits, _, rest = content.partition(b" ")
        if not digits.isdigit() or len(digits) > 8:
            return name, size, DAMAGED
        length = int(digits)
        record = rest[: length - len(digits) - 1]
        if length <= len(digits) + 1 or len(content) < length or not record.endswith(b"\n"):
            return name, size, DAMAGED
        key, equals, value = record[:-1].partition(b"=")
        if not equals:
            return name, size, DAMAGED
        if key == b"path":
            name = _text(value)
        elif key == b"size":
            size = int(value) if value.isdigit() and len(value) < 20 else -1
            if size < 0:
                return name, size, DAMAGED
        elif key.startswith(b"GNU.sparse."):
            reason = SPARSE
        content = content[length:]
    return name, size, reason


def _after_sparse_headers(file: BinaryIO, header: bytes, payload: int, length: int) -> int:
    """Where the content of GNU's sparse file begins: behind the further blocks of its map."""
    more = header[482:483] not in (b"\0", b"")
    while more and payload + BLOCK <= length:
        file.seek(payload)
        more = file.read(BLOCK)[504:505] not in (b"\0", b"")
        payload += BLOCK
    return payload
