"""The page: each figure with its pictures, numbers beside the paper's, command and differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dalle.evaluate.page import STYLE, html_table
from dalle.evaluate.results import cell
from dalle.pages import command, figure, html_page
from dalle.reproduce.context import Context
from dalle.reproduce.figure import Figure

LOOK = (
    STYLE
    + """
nav a { display: inline-block; margin-right: 1rem; }
.sheets { display: grid; gap: 0 2rem; align-items: end; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)); }
.sheet { display: grid; gap: .3rem; margin: .2rem 0 1rem; max-width: 60rem; }
.sheet i { display: block; width: 100%; aspect-ratio: 1; image-rendering: pixelated; }
.sheet span { font-size: .8rem; text-align: center; color: #555; }
"""
)


def page(context: Context, figures: Sequence[Figure]) -> bytes:
    """The whole page of the figures there are."""
    seconds = sum(each.seconds for each in figures)
    about = (
        f"Every figure and table of the paper (arXiv 2102.12092) made on this machine with "
        f"{context.model}, a pipeline of the set {context.set.name} with pictures of "
        f"{context.side} pixels. Ours stand beside the paper's numbers; each says what differs, "
        f"and which command makes it alone. {len(figures)} figures took {seconds:.0f} s."
    )
    credit = f"<p>{escape(context.set.credit)}</p>" if context.set.credit else ""
    links = " ".join(f"<a href=#{each.key}>{escape(name(each.key))}</a>" for each in figures)
    parts = [f"<p>{escape(about)}</p>", credit, f"<nav>{links}</nav>"]
    return html_page("The paper, redrawn", [*parts, *map(section, figures)], LOOK)


def name(key: str) -> str:
    """ "figure_1" as "Figure 1", "losses" as "Losses"."""
    return key.replace("_", " ").capitalize()


def section(each: Figure) -> str:
    """HTML of one figure."""
    head = f"{name(each.key)}: {each.title} (section {each.section})"
    parts = [f"<h2 id={each.key}>{escape(head)}</h2>"]
    if each.text:
        parts.append(f"<p>{escape(each.text)}</p>")
    if each.missing:
        parts.append(f"<p class=note>{escape(each.missing)}</p>")
    in_sheets = {str(sheet["file"]) for sheet in each.sheets}
    parts += [sheet_rows(sheet) for sheet in each.sheets]
    parts += [
        figure(file, f"{each.title} ({file})", plot=True)
        for file in each.pictures
        if file not in in_sheets
    ]
    parts += [html_table(dict(table)) for table in each.tables]
    if not each.tables:
        parts += [_numbers("ours", each.ours), _numbers("paper", each.paper)]
    if each.differs:
        parts.append(f"<p><b>What differs:</b> {escape(each.differs)}</p>")
    parts.append(command(each.command) if each.command else "")
    return "\n".join(part for part in parts if part)


def sheet_rows(sheet: Mapping[str, Any]) -> str:
    """HTML of the rows of a sheet, each picture at the size of the column."""
    rows, columns = sheet["rows"], int(sheet["columns"])
    wide = f"{100 * columns}% {100 * len(rows)}%"
    parts = []
    for y, row in enumerate(rows):
        cells = []
        for x, label in enumerate(row["labels"]):
            across = 100 * x / max(1, columns - 1)
            down = 100 * y / max(1, len(rows) - 1)
            style = (
                f"background:url('{escape(str(sheet['file']))}') {across:.4g}% {down:.4g}% / {wide}"
            )
            picture = f'<i style="{style}" role=img aria-label="{escape(str(label))}"></i>'
            cells.append(f"<div>{picture}<span>{escape(str(label))}</span></div>")
        grid = f'style="grid-template-columns:repeat({columns},minmax(2rem,7rem))"'
        caption = f"<div>{escape(str(row['caption']))}</div>" if row["caption"] else ""
        parts.append(f"<div>{caption}<div class=sheet {grid}>{''.join(cells)}</div></div>")
    least = f'style="--least:{7 * columns}rem"'
    return f"<div class=sheets {least}>" + "\n".join(parts) + "</div>"


def _numbers(title: str, values: Mapping[str, Any]) -> str:
    """A table of plain values."""
    rows = [[key.replace("_", " "), cell(value)] for key, value in values.items()]
    return html_table({"columns": ["", title], "rows": rows}) if rows else ""
