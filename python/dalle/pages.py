"""HTML pages of pictures, in one style; a page takes nothing from the network."""

from __future__ import annotations

from html import escape
from urllib.parse import quote

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
# Of reports with diagrams and tables of numbers, beside the style of every page.
REPORT_STYLE = """
figure > img { image-rendering: pixelated; max-width: 100%; border: 1px solid #ddd; }
figure > img.plot { image-rendering: auto; border: 0; width: 100%; max-width: 32rem; }
.plots { display: grid; gap: 0 2rem; align-items: start;
         grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.facts { display: grid; gap: 1rem 2rem; align-items: start;
         grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.facts caption { text-align: left; font-weight: bold; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
.verdict code { white-space: nowrap; }
td code { color: #777; font-size: .85em; }
"""


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


def figure(name: str, caption: str, *, plot: bool = False) -> str:
    """HTML of a picture file with words below; `plot` is for diagrams, which may be scaled.

    Args:
        name: of the file, relative to the page.
        caption: also what screen readers say.
        plot: whether it is a diagram rather than pixels.
    """
    kind = " class=plot" if plot else ""
    words = escape(caption)
    return (
        f'<figure><img{kind} src="{escape(name)}" alt="{words}"><figcaption>{words}</figcaption>'
        "</figure>"
    )


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
