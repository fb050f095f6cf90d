"""Captions as text: one rule for those of training and those that pictures are drawn for."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

LINE_ENDS = re.compile(r"\r\n|\n|\r")  # U+2028, form feeds and the like are white space in a line
UNSEEN = ("Cc", "Cf", "Zl", "Zp", "Zs")  # categories of invisible characters
_SPACES = {code: " " for code in [*range(0x20), *range(0x7F, 0xA0), 0x200B]}
_MARKS = {0xFEFF: None, 0x2060: None}  # byte order mark, word joiner: no width, no meaning here
_PLAIN = _SPACES | _MARKS


def clean(caption: str, *, keep_bytes: bool = False) -> str:
    """A caption in the one form that tokenizers see, also of a prompt.

    Unicode's composed form (NFC); white space of any kind, control characters and zero width spaces
    are one space between words and none at the ends; byte order marks and word joiners are dropped;
    lone surrogates (bytes that are not UTF-8) become U+FFFD. Invisible captions are "".
    Letters keep their case, and what is clean stays as it is.

    Args:
        caption: any string.
        keep_bytes: whether lone surrogates stay, for a record of what was typed.
    """
    if caption.isascii() and caption.isprintable():
        return " ".join(caption.split())
    units = caption.encode("utf-16-le", "surrogatepass")
    decoded = units.decode("utf-16-le", "surrogatepass" if keep_bytes else "replace")
    text = " ".join(unicodedata.normalize("NFC", decoded.translate(_PLAIN)).split())
    return text if any(unicodedata.category(char) not in UNSEEN for char in text) else ""


def marks(captions: Iterable[str]) -> str:
    """The punctuation and symbols (Unicode's P and S) that occur in captions, sorted."""
    return "".join(sorted(char for char in set("".join(captions)) if _is_mark(char)))


def without_marks(caption: str, known: str) -> str:
    """A clean caption with a space for each punctuation mark and symbol that is not in `known`.

    A caption of nothing else stays as it is.
    """
    kept = (" " if _is_mark(char) and char not in known else char for char in caption)
    return clean("".join(kept)) or caption


def _is_mark(char: str) -> bool:
    return unicodedata.category(char)[0] in "PS"


def caption_lines(text: str) -> list[str]:
    """The captions of a file, one a line, each clean; lines without text are left out."""
    if text.isascii() and text.isprintable():  # one line
        return [clean(text)] if text.strip() else []
    return [caption for caption in map(clean, LINE_ENDS.split(text)) if caption]
