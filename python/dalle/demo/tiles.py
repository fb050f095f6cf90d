"""HTML pages of pictures, and sheets: one file of which a page shows single tiles at one size.

So a row of pictures breaks where the screen ends, and each stays large enough to look at.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import torch
from PIL import Image

from dalle.pictures import save_png, to_uint8

SIDE = 160  # pixels of a tile, at least

STYLE = f"""
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 88rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff; overflow-wrap: break-word; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.2rem; margin-top: 2.2rem; }}
figure {{ margin: 1rem 0; }} figcaption {{ color: #555; font-size: .9rem; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }}
.command {{ background: #f3f3f3; padding: .5rem .8rem; white-space: pre-wrap;
  overflow-wrap: anywhere; user-select: all; }}
.note {{ background: #fff6dd; padding: .5rem 1rem; }}
:root {{ --s: {SIDE}px; }}
.tiles {{ display: flex; flex-wrap: wrap; gap: .4rem; }}
.tile i {{ display: block; width: var(--s); height: var(--s); image-rendering: pixelated;
  background-size: calc(var(--n) * var(--s)) calc(var(--m) * var(--s));
  background-position: calc(-1 * var(--x) * var(--s)) calc(-1 * var(--y) * var(--s));
  outline: 1px solid #ddd; }}
.tile img {{ display: block; width: var(--s); image-rendering: pixelated;
  outline: 1px solid #ddd; }}
.tile {{ margin: 0; width: var(--s); }}
.tile figcaption {{ font-size: .8rem; text-align: center; }}
.group {{ margin: 0; }}
.group > figcaption {{ overflow-wrap: anywhere;
  max-width: calc(var(--w, 2) * (var(--s) + .4rem)); }}
.contact {{ display: grid; gap: 1rem .5rem; margin: 1rem 0;
  grid-template-columns:
    repeat(auto-fill, minmax(min(100%, var(--w) * (var(--s) + .4rem)), 1fr)); }}
"""


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


def picture(name: str, alt: str, below: str = "") -> str:
    """HTML of a picture file as a tile; its name is relative to the page."""
    return (
        f'<figure class=tile><img src="{escape(quote(name))}" alt="{escape(alt)}">'
        f"<figcaption>{escape(below)}</figcaption></figure>"
    )


def group(tiles: list[str], caption: str) -> str:
    """HTML of some tiles with their caption, which stands above more than two of them.

    On a narrow screen many tiles are a page long, and the caption is to be read first.
    """
    words, row = f"<figcaption>{escape(caption)}</figcaption>", "".join(tiles)
    inner = f"<div class=tiles>{row}</div>"
    return f"<figure class=group>{inner + words if len(tiles) <= 2 else words + inner}</figure>"


def contact(groups: list[str], width: int) -> str:
    """HTML of groups of `width` tiles, as many beside each other as the screen has room for."""
    return f'<div class=contact style="--w:{width}">\n' + "\n".join(groups) + "\n</div>"


def command(words: str) -> str:
    """HTML of a command line to copy, which one click selects."""
    return f"<pre class=command>{escape(words)}</pre>"


def html_page(title: str, parts: list[str], style: str = "") -> bytes:
    """A whole page of HTML parts under its title; it takes nothing from the network."""
    body = "\n".join(part for part in (f"<h1>{escape(title)}</h1>", *parts) if part)
    text = (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )
    return text.encode("utf-8", "backslashreplace")
