"""Sheets: one file of pictures of which a page (`dalle.pages`) shows single tiles at one size.

So a row of pictures breaks where the screen ends, and each stays large enough to look at.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from dalle.pages import SIDE, command, contact, group, html_page, picture
from dalle.pictures import save_png, to_uint8

__all__ = [
    "Sheet",
    "command",
    "contact",
    "group",
    "html_page",
    "load_sheet",
    "picture",
    "save_sheet",
    "scale_for",
    "tile",
]


class Sheet(NamedTuple):
    """A file of tiles, named relative to the page."""

    name: str
    rows: int
    columns: int


def scale_for(image_size: int) -> int:
    """Screen pixels per pixel, so that a picture is `SIDE` wide or a little more."""
    return max(1, -(-SIDE // image_size))


def save_sheet(path: Path, images: torch.Tensor) -> None:
    """(M, N, 3, H, W) in [0, 1] -> a PNG of M rows of N tiles without margins."""
    scale = scale_for(images.shape[-1])
    sheet = images.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    picture = Image.fromarray(to_uint8(sheet))
    size = (picture.width * scale, picture.height * scale)
    save_png(path, picture.resize(size, Image.Resampling.NEAREST))


def load_sheet(out: Path, name: str, image_size: int) -> Sheet | None:
    """The sheet `save_sheet` wrote as out/name, or None where there is none."""
    if not (out / name).exists():
        return None
    side = image_size * scale_for(image_size)
    with Image.open(out / name) as picture:
        return Sheet(name, picture.height // side, picture.width // side)


def tile(sheet: Sheet, row: int, column: int, alt: str, below: str = "") -> str:
    """HTML of one tile; `alt` describes it for screen readers."""
    position = f"--n:{sheet.columns};--m:{sheet.rows};--x:{column};--y:{row}"
    return (
        f'<figure class=tile><i role=img aria-label="{escape(alt)}" '
        f'style="{position};background-image:url({escape(sheet.name)})"></i>'
        f"<figcaption>{escape(below)}</figcaption></figure>"
    )
