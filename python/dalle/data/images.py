"""Decoding a picture of unknown origin, with limits, into (H, W, 3) uint8."""

from __future__ import annotations

import errno
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin, features

from dalle import files
from dalle.data.colours import to_srgb
from dalle.data.containers import (
    AVIF,
    MAX_PIECES,
    PictureFile,
    TooManyPieces,
    parse_picture,
    picture_format,
    tiff_orientation,
)
from dalle.errors import DataError

DECODERS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
}
if features.check("avif"):
    from PIL import AvifImagePlugin

    DECODERS[AVIF] = AvifImagePlugin.AvifImageFile
FORMATS = tuple(DECODERS)
MAX_PIXELS = 64_000_000
MAX_SIDE = 16_384
MAX_FILE_BYTES = 64 << 20
TRUNCATED = "image file is truncated"  # Pillow's message
TRUNCATION_ERRORS = (struct.error, IndexError, EOFError)  # causes of a SyntaxError of Pillow
TRANSPOSES = {  # EXIF orientation -> transposition that makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadPicture(DataError):
    """A picture or caption that is refused.

    Args:
        path: the file.
        reason: the short form that reports count by.
        requirement: completes "the file must ...".
        detail: added to the reason, where known.
        what: "image" or "caption".
    """

    def __init__(
        self, path: Path | str, reason: str, requirement: str, detail: str = "", what: str = "image"
    ) -> None:
        detail = " ".join(detail.split())
        description = f"{reason} ({detail})" if detail else reason
        super().__init__(f"{path}: {what} must {requirement}, got: {description}")
        self.reason = reason

    def __reduce__(self) -> Any:
        """As a worker process sends it back: by the line and the attributes."""
        return _again, (type(self), str(self), self.__dict__)


def _again(kind: type[BadPicture], line: str, attributes: dict[str, Any]) -> BadPicture:
    error = kind.__new__(kind, line)
    error.args = (line,)
    error.__dict__.update(attributes)
    return error


def read_bytes(path: Path) -> bytes:
    """The file's content.

    Raises:
        BadPicture: empty, above 64 MiB, not a plain file, or unreadable.
    """
    try:
        if not path.is_file():
            reason = "link to nothing" if path.is_symlink() else "not a file"
            raise BadPicture(path, reason, "be a plain file")
        content = files.read_bytes(path, MAX_FILE_BYTES)
    except OSError as error:
        if error.errno == errno.EFBIG:
            limit = f"be at most {MAX_FILE_BYTES} bytes"
            raise BadPicture(path, "file too large", limit) from error
        raise BadPicture(path, "not readable", "be readable", error.strerror or "") from error
    if not content:
        raise BadPicture(path, "empty file", "hold bytes")
    return content


def open_checked(content: bytes, path: Path | str) -> Image.Image:
    """Opens a picture by its content, whatever its suffix, and checks the size its header claims.

    Nothing is decoded yet.

    Raises:
        BadPicture: not JPEG, PNG or WebP, an unreadable header, no pixels, or too many.
    """
    return _open(content, path)[0]


def _open(content: bytes, path: Path | str) -> tuple[Image.Image, PictureFile]:
    kind, requirement = picture_format(content), f"be one of {', '.join(FORMATS)}"
    if kind is None:
        begin = ascii(content[:16].decode("latin-1"))
        raise BadPicture(path, "not a picture", requirement, f"it begins with {begin}")
    if kind not in DECODERS:
        raise BadPicture(path, "picture of another format", requirement, kind)
    try:
        file = parse_picture(content)
    except TooManyPieces as error:
        limit = f"have at most {MAX_PIECES} segments or chunks"
        raise BadPicture(path, "too many pieces", limit) from error
    if file.size is not None:
        _check_size(file.size, path)
    try:
        picture = DECODERS[kind](io.BytesIO(file.content))
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(path, str(error)) from error
    except Exception as error:  # decoders raise many classes on damaged bytes
        if kind == AVIF:  # or one of a kind that this build of Pillow does not decode
            raise BadPicture(path, "picture of another format", requirement, kind) from error
        if kind == "WEBP" and int.from_bytes(content[4:8], "little") + 8 > len(content):
            raise BadPicture(path, "does not decode", "decode whole", TRUNCATED) from error
        detail = TRUNCATED if isinstance(error.__cause__, TRUNCATION_ERRORS) else str(error)
        raise BadPicture(path, "unreadable header", "have a readable header", detail) from error
    _check_size(picture.size, path)
    if kind == AVIF:
        orientation = tiff_orientation(picture.info.get("exif") or b"") or 1
        profile = picture.info.get("icc_profile") or b""
        file = file._replace(orientation=orientation, profile=profile)
    return picture, file


def _check_size(size: tuple[int, int], path: Path | str) -> None:
    width, height = size
    if min(size) < 1:
        raise BadPicture(path, "no pixels", "have pixels", f"{width} x {height}")
    if width * height > MAX_PIXELS or max(size) > MAX_SIDE:
        raise _too_many_pixels(path, f"{width} x {height}")


def _too_many_pixels(path: Path | str, detail: str) -> BadPicture:
    limits = f"have at most {MAX_PIXELS} pixels and sides of {MAX_SIDE}"
    return BadPicture(path, "too many pixels", limits, detail)


def to_rgb(
    picture: Image.Image, key: tuple[int, ...] = (), depth: int = 8, profile: bytes = b""
) -> Image.Image:
    """Converts to sRGB; 16-bit grey is scaled to 8 bits, transparency put over white.

    Args:
        picture: decoded.
        key: sample values of the one transparent colour, or ().
        depth: bits a sample of `key` has.
        profile: the ICC profile of the colours, or b"" for sRGB.
    """
    transparent = _has_colour(np.asarray(picture), key, depth) if key else None
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        wide = np.asarray(picture).clip(0, 65535).astype(np.uint32)
        picture = Image.fromarray(((wide + 128) // 257).astype(np.uint8))  # to nearest
    alpha = None
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        grey = picture.mode in ("L", "LA", "La")
        rgba = picture.convert("RGBA")
        alpha, picture = rgba.getchannel("A"), rgba.convert("L" if grey else "RGB")
    picture = to_srgb(picture, profile).convert("RGB")
    if alpha is not None:
        picture.putalpha(alpha)
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        white.alpha_composite(picture)
        picture = white.convert("RGB")
    if transparent is not None and transparent.any():
        picture.paste((255, 255, 255), mask=Image.fromarray(transparent))
    return picture


def _has_colour(samples: np.ndarray, key: tuple[int, ...], depth: int) -> np.ndarray:
    """(H, W) bool, True where `samples`, as decoded, are the colour of `key` in the file."""
    colour = np.array(key)
    if depth < 8 and samples.dtype == np.uint8:  # greys of 2 and 4 bits are decoded to 0 .. 255
        colour = colour * 255 // ((1 << depth) - 1)
    elif depth == 16 and samples.dtype == np.uint8:  # colours of 16 bits lose their lower half
        colour = colour >> 8
    equal = np.asarray(samples == colour)
    return np.asarray(equal.all(-1)) if equal.ndim == 3 else equal


def decode(content: bytes, path: Path | str) -> np.ndarray:
    """Decodes the first frame, turned upright by its EXIF tag.

    Args:
        content: the whole file.
        path: named in errors.

    Returns:
        (H, W, 3) uint8.

    Raises:
        BadPicture: refused by `open_checked`, truncated or damaged.
    """
    picture, file = _open(content, path)
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise BadPicture(path, "LOAD_TRUNCATED_IMAGES is set", "be decoded whole")
    try:
        picture.seek(0)
        picture.load()
        picture = to_rgb(picture, file.key, file.depth, file.profile)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many classes on damaged bytes
        raise BadPicture(path, "does not decode", "decode whole", str(error)) from error
    if file.orientation in TRANSPOSES:
        picture = picture.transpose(TRANSPOSES[file.orientation])
    return np.array(picture)


def png_text(content: bytes, path: Path | str, key: str) -> str | None:
    """The value of a PNG's text chunk (tEXt, zTXt or iTXt), or None where it has no such chunk.

    Args:
        content: the whole file.
        path: named in errors.
        key: the chunk's keyword.

    Raises:
        BadPicture: no PNG, too many chunks, a text beyond Pillow's limit of 1 MiB, or damage.
    """
    kind = picture_format(content)
    if kind != "PNG":
        raise BadPicture(path, "not a PNG", "be a PNG", kind or "no picture")
    _open(content, path)  # its limits
    try:
        picture = PngImagePlugin.PngImageFile(io.BytesIO(content))
        text = picture.info.get(key) or picture.text.get(key)  # those behind the pixels decode them
    except MemoryError:
        raise
    except Exception as error:  # as in `decode`
        raise BadPicture(path, "unreadable text", "have readable text", str(error)) from error
    return None if text is None else str(text)


def decode_mask(content: bytes, path: Path | str) -> np.ndarray:
    """Decodes a mask: what it marks is white, or transparent where the picture has transparency.

    Args:
        content: the whole file, JPEG, PNG or WebP.
        path: named in errors.

    Returns:
        (H, W) bool, upright: True where a grey level is 128 or more, or the opacity below 128.

    Raises:
        BadPicture: as `decode`.
    """
    levels = np.array(Image.fromarray(decode(content, path)).convert("L"))
    picture, file = _open(content, path)
    if file.key or not (picture.has_transparency_data or "A" in picture.getbands()):
        return levels >= 128
    opacity = picture.convert("RGBA").getchannel("A")
    if opacity.getextrema()[0] == 255:
        return levels >= 128
    if file.orientation in TRANSPOSES:
        opacity = opacity.transpose(TRANSPOSES[file.orientation])
    return np.asarray(opacity) < 128
