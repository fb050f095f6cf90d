"""The captions in a file's content: text with one a line, or JSON with a field for them."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalle import files
from dalle.captions import caption_lines
from dalle.data.images import BadPicture

MAX_CAPTION_BYTES = 64 << 10
MAX_JSON_BYTES = 1 << 20  # other fields, such as EXIF, come along
FIELDS = ("caption", "captions", "text")  # of a JSON object; the first that is there counts


def bad_caption(path: Path | str, reason: str, requirement: str, detail: str = "") -> BadPicture:
    """The error of a caption that is left out."""
    return BadPicture(path, reason, requirement, detail, what="caption")


def read_captions(path: Path) -> list[str]:
    """The captions of a file, one a line, clean; at least one.

    Raises:
        BadPicture: above 64 KiB, not UTF-8, empty, or unreadable.
    """
    try:
        if not path.is_file():
            dangling = path.is_symlink()
            reason = "caption is a link to nothing" if dangling else "caption is not a file"
            raise bad_caption(path, reason, "be a plain file")
        content = files.read_bytes(path, MAX_CAPTION_BYTES)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise too_long(path, MAX_CAPTION_BYTES) from error
        reason = error.strerror or ""
        raise bad_caption(path, "caption is not readable", "be readable", reason) from error
    return text_captions(content, path)


def too_long(path: Path | str, limit: int) -> BadPicture:
    """The error of a caption file of more than `limit` bytes."""
    return bad_caption(path, "caption too long", f"have at most {limit} bytes")


def text_captions(content: bytes, path: Path | str) -> list[str]:
    """The captions in a text, one a line, clean; at least one.

    Args:
        content: the whole file.
        path: named in errors.

    Raises:
        BadPicture: not UTF-8, or no text.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        detail = f"byte {error.start}"
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            detail = "it begins as UTF-16 does"
        reason = "caption is not UTF-8"
        raise bad_caption(path, reason, "be text in UTF-8", detail) from error
    captions = caption_lines(text)
    if not captions:
        raise bad_caption(path, "caption is empty", "hold text")
    return captions


def json_captions(content: bytes, path: Path | str) -> list[str]:
    """The captions in the first of `FIELDS` that a JSON object has: a text, or a list of texts.

    Raises:
        BadPicture: no JSON object, no such field, or no text in it.
    """
    try:
        value = files.parse_json(content)
    except ValueError as error:
        reason = "caption file is no JSON"
        raise bad_caption(path, reason, "be JSON", str(error).split("\n")[0]) from error
    found: Any = None
    if isinstance(value, dict):
        found = next((value[field] for field in FIELDS if value.get(field) is not None), None)
    if found is None:
        requirement = f"be JSON with the field {FIELDS[0]}"
        raise bad_caption(path, "no caption in the JSON", requirement)
    captions = captions_in(found)
    if not captions:
        raise bad_caption(path, "caption is empty", "hold text")
    return captions


def captions_in(value: Any) -> list[str]:
    """The captions in a text (one a line) or in a list of texts, clean; none in other values."""
    texts: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value]
    return [line for text in texts if isinstance(text, str) for line in caption_lines(text)]
