"""What a picture's file holds beside its pixels, read here and kept from the decoder.

A decoder that meets a mistyped tag, a profile beyond its limits or a comment of two megabytes
refuses a picture whose pixels are sound. So of a JPEG and a PNG only what the pixels need goes to
the decoder, and the two facts that change how they look are read by themselves: the orientation
(of EXIF, else of XMP) and a PNG's transparent colour.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

JPEG, PNG, WEBP = "JPEG", "PNG", "WEBP"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
OTHERS = (  # (where, bytes, name): pictures that are not read, told apart to say so
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftyphev", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"8BPS", "PSD"),
    (0, b"%!PS", "PostScript"),
    (0, b"%PDF", "PDF"),
    (0, b"<svg", "SVG"),
    (0, b"\0\0\1\0", "ICO"),
)
ORIENTATION = 0x0112
INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}  # TIFF type -> struct code
XMP_HEAD = b"http://ns.adobe.com/xap/1.0/\0"
XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:\s*=\s*[\"']|\s*>\s*)([1-8])\b")
MAX_PIECES = 100_000  # segments or chunks of a file; a PNG of 64 MiB has about 8,000
MAX_PROFILE = 1 << 20  # bytes of a compressed EXIF profile that are looked at


class TooManyPieces(ValueError):
    """A file of so many segments or chunks that walking through them takes longer than decoding."""


class Parts(NamedTuple):
    """A picture's file taken apart.

    Attributes:
        content: what the decoder needs of it.
        orientation: 1 to 8, as EXIF counts them; 1 is upright.
        size: width and height that a JPEG's or PNG's header says; None where that was not found.
        key: the sample values of a PNG's transparent colour (one of grey, three of RGB), or ().
        depth: bits a sample of a PNG has; 8 elsewhere.
    """

    content: bytes
    orientation: int = 1
    size: tuple[int, int] | None = None
    key: tuple[int, ...] = ()
    depth: int = 8


def picture_format(content: bytes) -> str | None:
    """The name of the format that the first bytes promise; None where they promise no picture."""
    if content.startswith(b"\xff\xd8\xff"):
        return JPEG
    if content.startswith(PNG_SIGNATURE):
        return PNG
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return WEBP
    return next((name for at, magic, name in OTHERS if content.startswith(magic, at)), None)


def take_apart(content: bytes) -> Parts:
    """Takes a JPEG, PNG or WebP apart; where its structure is damaged, the rest stays as it is.

    Raises:
        TooManyPieces: the file has more than 100,000 segments or chunks.
    """
    kind = picture_format(content)
    if kind == JPEG:
        return _jpeg(content)
    return _png(content) if kind == PNG else _webp(content)


def _jpeg(content: bytes) -> Parts:
    """Drops the application segments but those that say how colours are stored (JFIF, Adobe)."""
    kept, exif, xmp = [content[:2]], [], []
    size = None
    at = begin = 2
    pieces = count()
    while at + 4 <= len(content):
        _check_pieces(next(pieces))
        marker = content[at + 1]
        if content[at] != 0xFF or marker == 0:  # no segment begins here: to the next one
            kept.append(content[begin:at])
            following = content.find(b"\xff", at + 1)
            begin = at = following if following >= 0 else len(content)
            continue
        if marker == 0xFF or 0xD0 <= marker <= 0xD9:  # padding, no body
            at += 1 if marker == 0xFF else 2
            continue
        end = at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        if marker < 0xC0 or marker == 0xDA or end < at + 4 or end > len(content):
            break  # the scan, or damage: the decoder's
        body = content[at + 4 : end]
        if marker == 0xE1 and body.startswith(b"Exif\0"):
            exif.append(body[6:])
        elif marker == 0xE1 and body.startswith(XMP_HEAD):
            xmp.append(body)
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(body) >= 5:
            size = int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big")
        whole = {0xE0: 14, 0xEE: 12}.get(marker)  # bytes without which libjpeg passes them over
        if marker == 0xFE or (0xE0 <= marker <= 0xEF and (whole is None or len(body) < whole)):
            kept.append(content[begin:at])
            begin = end
        at = end
    kept.append(content[begin:])
    # A block above 64 KiB goes on in the next segment; else the first that says it counts.
    return Parts(b"".join(kept), _orientation([b"".join(exif), *exif[1:]], xmp), size)


def _png(content: bytes) -> Parts:
    """Drops all but the critical chunks and a palette's transparency; so the first frame stays."""
    kept, exif, xmp = [PNG_SIGNATURE], [], []
    size, depth, colour, key = None, 8, -1, b""
    for kind, begin, end in _png_chunks(content):
        body = content[begin + 8 : end - 4]
        if kind == b"IHDR" and len(body) >= 10:
            size = int.from_bytes(body[:4], "big"), int.from_bytes(body[4:8], "big")
            depth, colour = body[8], body[9]
        if kind == b"tRNS" and colour in (0, 2):
            key = body
        elif kind == b"eXIf":
            exif.append(body)
        elif kind in (b"tEXt", b"zTXt"):
            exif.append(_text_profile(kind, body))
        elif kind == b"iTXt" and body.startswith(b"XML:com.adobe.xmp\0"):
            xmp.append(body)
        critical = not kind or kind[:1].isupper()
        if critical or (kind == b"tRNS" and colour == 3):
            kept.append(content[begin:end])
    samples = {0: 1, 2: 3}.get(colour, 0)
    mask = (1 << depth) - 1  # bits above the sample's own are to be passed over
    values = [int.from_bytes(key[2 * i : 2 * i + 2], "big") & mask for i in range(samples)]
    whole = tuple(values) if len(key) >= 2 * samples else ()
    return Parts(b"".join(kept), _orientation(exif, xmp), size, whole, depth)


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, begin, end) of each chunk; from the first that is damaged on, b"" for the rest."""
    at = len(PNG_SIGNATURE)
    pieces = count()
    while at < len(content):
        _check_pieces(next(pieces))
        size, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        end = at + 12 + size
        if not kind.isalpha() or len(kind) < 4 or end > len(content):
            yield b"", at, len(content)
            return
        yield kind, at, end
        if kind == b"IEND":
            return
        at = end


def _text_profile(kind: bytes, body: bytes) -> bytes:
    """The EXIF block that ImageMagick and ExifTool wrote as text before PNG had a chunk for it."""
    name, _, rest = body.partition(b"\0")
    if name not in (b"Raw profile type exif", b"Raw profile type APP1"):
        return b""
    try:
        text = rest
        if kind == b"zTXt":
            text = zlib.decompressobj().decompress(rest[1:], 2 * MAX_PROFILE)
        digits = b"".join(text[: 2 * MAX_PROFILE].split(b"\n")[3:])  # after name and length
        return bytes.fromhex(digits.decode("ascii"))
    except (zlib.error, ValueError):
        return b""


def _webp(content: bytes) -> Parts:
    found: dict[bytes, list[bytes]] = {b"EXIF": [], b"XMP ": []}
    at = 12
    pieces = count()
    while at + 8 <= len(content):
        _check_pieces(next(pieces))
        kind, size = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
        if kind in found:
            found[kind].append(content[at + 8 : at + 8 + size])
        at += 8 + size + size % 2
    return Parts(content, _orientation(found[b"EXIF"], found[b"XMP "]))


def _check_pieces(number: int) -> None:
    if number >= MAX_PIECES:
        raise TooManyPieces(f"more than {MAX_PIECES}")


def _orientation(exif: list[bytes], xmp: list[bytes]) -> int:
    """What the first block that says it says; 1 where none does."""
    for block in exif:
        value = tiff_orientation(block)
        if value is not None:
            return value
    for block in xmp:
        match = XMP_ORIENTATION.search(block)
        if match:
            return int(match[1])
    return 1


def tiff_orientation(block: bytes) -> int | None:
    """The orientation in an EXIF block's first directory, whatever else that holds.

    Args:
        block: a TIFF header and what follows, "Exif" and two bytes before it or not.

    Returns:
        1 to 8, or None where there is none: one integer, or it does not count.
    """
    if block.startswith(b"Exif\0"):
        block = block[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None or len(block) < 8:
        return None
    (start,) = struct.unpack_from(order + "I", block, 4)
    if start + 2 > len(block):
        return None
    (entries,) = struct.unpack_from(order + "H", block, start)
    for at in range(start + 2, min(start + 2 + 12 * entries, len(block) - 11), 12):
        tag, kind, number = struct.unpack_from(order + "HHI", block, at)
        if tag == ORIENTATION and number == 1 and kind in INTEGERS:
            (value,) = struct.unpack_from(order + INTEGERS[kind], block, at + 8)
            if 1 <= value <= 8:
                return int(value)
    return None
