"""`dalle eval report`: one HTML page of all results in a folder, whatever measures wrote them."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from dalle.errors import DataError
from dalle.evaluate.results import as_path, cell, read_results
from dalle.files import check_targets
from dalle.pages import REPORT_STYLE, figure, html_page
from dalle.pictures import save_bytes

PAGE = "index.html"
STYLE = (
    REPORT_STYLE
    + """
figure > img.plot { max-width: 100%; width: auto; }
.wide { overflow-x: auto; margin: .8rem 0; } .wide caption { text-align: left; font-weight: bold;
  white-space: nowrap; }
.wide th { white-space: nowrap; }
details { margin: .5rem 0; color: #555; } summary { cursor: pointer; }
"""
)


def report(out: Path | str) -> dict[str, Any]:
    """Writes OUT/index.html from the results in OUT and in the folders in it.

    Returns:
        "page", its path, and "results", the names of what it shows.

    Raises:
        DataError: there is no result.
        EnvironmentProblem: the page cannot be written.
    """
    folder = as_path("eval report", "out", out)
    results = read_results(folder) if folder.is_dir() else []
    if not results:
        raise DataError(f"eval report: out must hold results of dalle eval, got none in {folder}")
    check_targets("eval report", folder / PAGE)
    parts = [section(folder, result) for result in results]
    save_bytes(folder / PAGE, html_page("dalle eval", parts, STYLE))
    return {"page": str(folder / PAGE), "results": [result["name"] for result in results]}


def section(folder: Path, result: dict[str, Any]) -> str:
    """HTML of one result: words, warnings, pictures, tables, and what it is of."""
    parts = [f"<h2 id={escape(result['name'], quote=True)}>{escape(str(result['title']))}</h2>"]
    if result["text"]:
        parts.append(f"<p>{escape(result['text'])}</p>")
    parts += [f"<p class=note>{escape(str(line))}</p>" for line in result["warnings"]]
    beside = PurePosixPath(result["name"]).parent
    for name in result["pictures"]:
        # A result may be somebody else's: only a plain name beside it is shown.
        if isinstance(name, str) and Path(name).name == name and (folder / beside / name).is_file():
            address = quote(str(beside / name))
            parts.append(figure(address, f"{result['title']} ({beside / name})", plot=True))
    parts += [html_table(each) for each in result["tables"] if isinstance(each, dict)]
    parts.append(_details(result))
    return "\n".join(parts)


def html_table(content: dict[str, Any]) -> str:
    """HTML of a table of `results.table`."""
    columns, rows = content.get("columns"), content.get("rows")
    if not isinstance(columns, list) or not isinstance(rows, list):
        return ""
    title = content.get("title")
    caption = f"<caption>{escape(str(title))}</caption>" if title else ""
    rows = [row for row in rows if isinstance(row, list)]
    head = "".join(
        f"<th{_number(row[i] for row in rows if i < len(row))}>{escape(cell(name))}"
        for i, name in enumerate(columns)
    )
    body = "\n".join(
        "<tr>" + "".join(f"<td{_number([value])}>{escape(cell(value))}" for value in row)
        for row in rows
    )
    return f"<div class=wide><table>{caption}<tr>{head}\n{body}</table></div>"


def _number(values: Iterable[Any]) -> str:
    """The class of a cell of numbers, or of the head of a column of them, which is set right."""
    kinds = [
        isinstance(value, (int, float, list)) and not isinstance(value, bool)
        for value in values
        if value is not None
    ]
    return " class=number" if kinds and all(kinds) else ""


def _details(result: dict[str, Any]) -> str:
    """What the numbers are of, folded: command, network, seed, sets with their hashes."""
    lines = []
    network = result.get("extractor")
    if isinstance(network, dict):
        lines.append(f"Network: {network.get('name')}, {network.get('fingerprint')}")
    for key, words in (("resize", "Pictures"), ("seed", "Seed"), ("method", "Interval")):
        if key in result:
            lines.append(f"{words}: {cell(result[key])}")
    sets = result.get("sets")
    for name, entry in sets.items() if isinstance(sets, dict) else ():
        if isinstance(entry, dict):
            lines.append(
                f"{name}: {entry.get('source')}, {entry.get('pictures')} pictures, "
                f"{entry.get('fingerprint')}"
            )
    command = result.get("command", "eval")
    lines.append(f"dalle {command}; all numbers: {result['name']}.json")
    items = "".join(f"<li>{escape(str(line))}" for line in lines)
    return f"<details><summary>What this is of</summary><ul>{items}</ul></details>"
