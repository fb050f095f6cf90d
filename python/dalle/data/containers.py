"""Metadata of picture files, which is read here and removed before decoding.

A decoder refuses a picture with intact pixels for a mistyped tag, a profile beyond its limits or a
comment of two megabytes. So the decoder gets only those parts of a JPEG or PNG that the pixels
need. The values that change how they look are read here: the orientation (from EXIF, else from
XMP), the colour profile, and a PNG's transparent colour.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

JPEG, PNG, WEBP, AVIF = "JPEG", "PNG", "WEBP", "AVIF"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
OTHERS = (  # (offset, bytes, name) of formats that are refused by name
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (4, b"ftypavi", AVIF),
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
MAX_PROFILE = 1 << 20  # bytes read of a compressed EXIF profile
MAX_ICC = 4 << 20  # bytes of a colour profile; a larger one is not used
ICC_HEAD = b"ICC_PROFILE\0"


class TooManyPieces(ValueError):
    """A file of so many segments or chunks that walking through them takes longer than decoding."""


class PictureFile(NamedTuple):
    """The parts of a picture's file.

    Attributes:
        content: the bytes for the decoder.
        orientation: 1 to 8, as EXIF counts them; 1 is upright.
        size: width and height in the header of a JPEG or PNG; None where there is no such header.
        key: the sample values of a PNG's transparent colour (one of grey, three of RGB), or ().
        depth: bits a sample of a PNG has; 8 elsewhere.
        profile: the ICC profile of the colours, or b"".
    """

    content: bytes
    orientation: int = 1
    size: tuple[int, int] | None = None
    key: tuple[int, ...] = ()
    depth: int = 8
    profile: bytes = b""


def picture_format(content: bytes) -> str | None:
    """The name of the format by its first bytes; None where they are not a picture's."""
    if content.startswith(b"\xff\xd8\xff"):
        return JPEG
    if content.startswith(PNG_SIGNATURE):
        return PNG
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return WEBP
    return next((name for offset, magic, name in OTHERS if content.startswith(magic, offset)), None)


def parse_picture(content: bytes) -> PictureFile:
    """Parses a JPEG, PNG or WebP; from damage in its structure on, bytes are kept as they are.

    Of an AVIF the decoder reads all itself.

    Raises:
        TooManyPieces: the file has more than 100,000 segments or chunks.
    """
    kind = picture_format(content)
    if kind == JPEG:
        return _jpeg(content)
    if kind == AVIF:
        return PictureFile(content)
    return _png(content) if kind == PNG else _webp(content)


def _jpeg(content: bytes) -> PictureFile:
    """Drops all application segments except those that say how colours are stored (JFIF, Adobe)."""
    segments, exif, xmp = [content[:2]], [], []
    icc: dict[int, bytes] = {}
    size = None
    offset = begin = 2
    pieces = count()
    while offset + 4 <= len(content):
        _check_pieces(next(pieces))
        marker = content[offset + 1]
        if content[offset] != 0xFF or marker == 0:  # no segment begins here: skip to the next one
            segments.append(content[begin:offset])
            following = content.find(b"\xff", offset + 1)
            begin = offset = following if following >= 0 else len(content)
            continue
        if marker == 0xFF or 0xD0 <= marker <= 0xD9:  # padding, no body
            offset += 1 if marker == 0xFF else 2
            continue
        end = offset + 2 + int.from_bytes(content[offset + 2 : offset + 4], "big")
        if marker < 0xC0 or marker == 0xDA or end < offset + 4 or end > len(content):
            break  # the scan, or damage: left to the decoder
        body = content[offset + 4 : end]
        if marker == 0xE1 and body.startswith(b"Exif\0"):
            exif.append(body[6:])
        elif marker == 0xE1 and body.startswith(XMP_HEAD):
            xmp.append(body)
        elif marker == 0xE2 and body.startswith(ICC_HEAD) and len(body) > len(ICC_HEAD) + 2:
            icc.setdefault(body[len(ICC_HEAD)], body[len(ICC_HEAD) + 2 :])
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(body) >= 5:
            size = int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big")
        # Shorter JFIF and Adobe segments are ignored by libjpeg.
        min_bytes = {0xE0: 14, 0xEE: 12}.get(marker)
        if marker == 0xFE or (
            0xE0 <= marker <= 0xEF and (min_bytes is None or len(body) < min_bytes)
        ):
            segments.append(content[begin:offset])
            begin = end
        offset = end
    segments.append(content[begin:])
    # An EXIF block above 64 KiB continues in the next segment; else the first valid one counts.
    orientation = _orientation([b"".join(exif), *exif[1:]], xmp)
    profile = b"".join(icc[number] for number in sorted(icc))  # numbered from 1
    return PictureFile(b"".join(segments), orientation, size, profile=_profile(profile))


def _png(content: bytes) -> PictureFile:
    """Keeps the critical chunks and a palette's transparency, hence the first frame alone."""
    chunks, exif, xmp = [PNG_SIGNATURE], [], []
    size, depth, colour, key, profile = None, 8, -1, b"", b""
    for kind, begin, end in _png_chunks(content):
        body = content[begin + 8 : end - 4]
        if kind == b"IHDR" and len(body) >= 10:
            size = int.from_bytes(body[:4], "big"), int.from_bytes(body[4:8], "big")
            depth, colour = body[8], body[9]
        if kind == b"tRNS" and colour in (0, 2):
            key = body
        elif kind == b"eXIf":
            exif.append(body)
        elif kind == b"iCCP":
            profile = profile or _compressed_profile(body)
        elif kind in (b"tEXt", b"zTXt"):
            exif.append(_text_profile(kind, body))
        elif kind == b"iTXt" and body.startswith(b"XML:com.adobe.xmp\0"):
            xmp.append(body)
        critical = not kind or kind[:1].isupper()
        if critical or (kind == b"tRNS" and colour == 3):
            chunks.append(content[begin:end])
    samples = {0: 1, 2: 3}.get(colour, 0)
    mask = (1 << depth) - 1  # bits above the sample's depth are ignored
    values = [int.from_bytes(key[2 * i : 2 * i + 2], "big") & mask for i in range(samples)]
    transparent = tuple(values) if len(key) >= 2 * samples else ()
    orientation = _orientation(exif, xmp)
    return PictureFile(b"".join(chunks), orientation, size, transparent, depth, profile)


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, begin, end) of each chunk; from the first that is damaged on, b"" for the rest."""
    offset = len(PNG_SIGNATURE)
    pieces = count()
    while offset < len(content):
        _check_pieces(next(pieces))
        size, kind = (
            int.from_bytes(content[offset : offset + 4], "big"),
            content[offset + 4 : offset + 8],
        )
        end = offset + 12 + size
        if not kind.isalpha() or len(kind) < 4 or end > len(content):
            yield b"", offset, len(content)
            return
        yield kind, offset, end
        if kind == b"IEND":
            return
        offset = end


def _profile(content: bytes) -> bytes:
    """An ICC profile, or b"" for what is none: its own length and signature must fit."""
    length = int.from_bytes(content[:4], "big")
    fits = 128 <= length <= min(len(content), MAX_ICC) and content[36:40] == b"acsp"
    return content[:length] if fits else b""


def _compressed_profile(body: bytes) -> bytes:
    """The ICC profile in a PNG's chunk."""
    _, _, rest = body.partition(b"\0")
    try:
        return _profile(zlib.decompressobj().decompress(rest[1:], MAX_ICC))
    except zlib.error:
        return b""


def _text_profile(kind: bytes, body: bytes) -> bytes:
    """The EXIF block that ImageMagick and ExifTool wrote as text before PNG had a chunk for it."""
    name, _, value = body.partition(b"\0")
    if name not in (b"Raw profile type exif", b"Raw profile type APP1"):
        return b""
    try:
        text = value
        if kind == b"zTXt":
            text = zlib.decompressobj().decompress(value[1:], 2 * MAX_PROFILE)
        digits = b"".join(text[: 2 * MAX_PROFILE].split(b"\n")[3:])  # after name and length
        return bytes.fromhex(digits.decode("ascii"))
    except (zlib.error, ValueError):
        return b""


def _webp(content: bytes) -> PictureFile:
    blocks: dict[bytes, list[bytes]] = {b"EXIF": [], b"XMP ": [], b"ICCP": []}
    offset = 12
    pieces = count()
    while offset + 8 <= len(content):
        _check_pieces(next(pieces))
        kind, size = (
            content[offset : offset + 4],
            int.from_bytes(content[offset + 4 : offset + 8], "little"),
        )
        if kind in blocks:
            blocks[kind].append(content[offset + 8 : offset + 8 + size])
        offset += 8 + size + size % 2
    profile = _profile(blocks[b"ICCP"][0]) if blocks[b"ICCP"] else b""
    return PictureFile(content, _orientation(blocks[b"EXIF"], blocks[b"XMP "]), profile=profile)


def _check_pieces(number: int) -> None:
    if number >= MAX_PIECES:
        raise TooManyPieces(f"more than {MAX_PIECES}")


def _orientation(exif: list[bytes], xmp: list[bytes]) -> int:
    """The orientation of the first block that has one; 1 where none has."""
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
    """The orientation in an EXIF block's first directory; other entries are ignored.

    Args:
        block: from the TIFF header on, with or without "Exif" and two bytes before it.

    Returns:
        1 to 8, or None where the directory has no such entry of one integer.
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
    for offset in range(start + 2, min(start + 2 + 12 * entries, len(block) - 11), 12):
        tag, kind, number = struct.unpack_from(order + "HHI", block, offset)
        if tag == ORIENTATION and number == 1 and kind in INTEGERS:
            (value,) = struct.unpack_from(order + INTEGERS[kind], block, offset + 8)
            if 1 <= value <= 8:
                return int(value)
    return None
