"""Decoding a picture of unknown origin, with limits, into (H, W, 3) uint8."""

from __future__ import annotations

import errno
import io
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

from dalle import files
from dalle.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 64_000_000
MAX_SIDE = 16_384
MAX_FILE_BYTES = 64 << 20


class BadPicture(DataError):
    """A picture that is refused.

    Attributes:
        reason: the short form that reports count by.
    """

    def __init__(self, path: Path | str, reason: str, requirement: str) -> None:
        super().__init__(f"{path}: image must {requirement}, got: {reason}")
        self.reason = reason


def read_bytes(path: Path) -> bytes:
    """The file's content.

    Raises:
        BadPicture: empty, above 64 MiB, not a plain file, or unreadable.
    """
    try:
        if not path.is_file():
            raise BadPicture(path, "not a file", "be a plain file")
        content = files.read_bytes(path, MAX_FILE_BYTES)
    except OSError as error:
        if error.errno == errno.EFBIG:
            limit = f"be at most {MAX_FILE_BYTES} bytes"
            raise BadPicture(path, "file too large", limit) from error
        raise BadPicture(path, "not readable", "be readable") from error
    if not content:
        raise BadPicture(path, "empty file", "hold bytes")
    return content


def open_checked(content: bytes, path: Path | str) -> Image.Image:
    """Opens a picture by its content, whatever its suffix, and checks the size its header claims.

    Nothing is decoded yet.

    Raises:
        BadPicture: not JPEG, PNG or WebP, or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning; the limits are below
            picture = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadPicture(path, "too many pixels", f"have at most {MAX_PIXELS} pixels") from error
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, OverflowError) as error:
        raise BadPicture(path, "not a picture", f"be one of {', '.join(FORMATS)}") from error
    width, height = picture.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise BadPicture(
            path, "too many pixels", f"have at most {MAX_PIXELS} pixels and sides of {MAX_SIDE}"
        )
    return picture


def to_rgb(picture: Image.Image) -> Image.Image:
    """RGB by rule: 16-bit grey scaled to 8, transparency over white, all else converted."""
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        wide = np.asarray(picture, dtype=np.float64)
        picture = Image.fromarray(np.rint(wide.clip(0, 65535) / 257).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        white.alpha_composite(rgba)
        picture = white
    return picture.convert("RGB")


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
    picture = open_checked(content, path)
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise BadPicture(path, "LOAD_TRUNCATED_IMAGES is set", "be decoded whole")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture.seek(0)
            picture.load()
            upright = _upright(picture)
            return np.array(to_rgb(upright))
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many classes on damaged bytes
        raise BadPicture(path, "does not decode", "decode whole") from error


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # a damaged EXIF block spoils the orientation, not the pixels
        return picture
