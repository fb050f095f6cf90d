"""What a measure leaves: NAME.json, NAME.md and NAME.png in one folder, of one form.

Every result is a dict of JSON values. `title`, `text`, `tables`, `pictures` and `warnings` are
what the HTML report shows (`dalle.evaluate.page`), whatever measure wrote them.
"""

from __future__ import annotations

import io
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dalle import pictures
from dalle.data.augment import center_crop, to_tensor
from dalle.data.pairs import evenly_spaced, load_or_skip
from dalle.errors import CheckpointError, EnvironmentProblem, UsageError
from dalle.evaluate.sets import Source
from dalle.files import check_targets, make_folder, read_object, to_json
from dalle.pictures import save_bytes
from dalle.version import __version__

FORMAT = "dalle-eval"  # value of "format" in every NAME.json
FEW = 10_000  # pictures under which a distance is warned about
SHOWN = 8  # pictures of a set on a sheet
GREY = "0.65"  # of the paper's curves


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> dict[str, Any]:
    """A table for NAME.md and the report; cells are text or numbers."""
    return {"title": title, "columns": list(columns), "rows": [list(row) for row in rows]}


def with_numbers(
    columns: Mapping[str, Sequence[float | None]],
) -> dict[str, Sequence[float | None]]:
    """The columns in which at least one cell is a number, neither None nor NaN."""
    return {
        head: cells
        for head, cells in columns.items()
        if not all(cell is None or math.isnan(cell) for cell in cells)
    }


def cell(value: Any) -> str:
    """A number with four digits, a pair of them as an interval, all else as text."""
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return " to ".join(cell(each) for each in value)
    return str(value)


def versions() -> dict[str, str]:
    """Of what computed a result."""
    return {"dalle": __version__, "torch": torch.__version__, "python": platform.python_version()}


def as_path(owner: str, name: str, value: object) -> Path:
    """A path that a caller gave.

    Raises:
        UsageError: no text and no path, or an empty text, which would be the current folder.
    """
    if not isinstance(value, (str, Path)) or value == "":
        got = "an empty one" if value == "" else type(value).__name__
        raise UsageError(f"{owner}: {name} must be a path, got {got}")
    return Path(value)


def prepare(owner: str, name: str, out: Path | None, pictures_too: bool = True) -> None:
    """Makes the folder of a result before the work, and refuses one that cannot take it.

    Raises:
        EnvironmentProblem: it cannot be written.
    """
    if out is None:
        return
    make_folder(out, owner)
    suffixes = (".json", ".md", ".png") if pictures_too else (".json", ".md")
    check_targets(owner, *(out / f"{name}{suffix}" for suffix in suffixes))


def finish(
    name: str, result: dict[str, Any], out: Path | None, picture: bytes | None = None
) -> dict[str, Any]:
    """Adds the form's keys to a result and writes it, where there is a folder.

    Args:
        name: of the files.
        result: with "title" and what else there is.
        out: the folder, or None.
        picture: a PNG.

    Returns:
        The result as it was written.
    """
    shown = [f"{name}.png"] if picture is not None and out is not None else []
    defaults = {"text": "", "tables": [], "warnings": [], "pictures": shown}
    result = {"format": FORMAT, "name": name, **defaults, **result, "versions": versions()}
    if out is None:
        return result
    if picture is not None:
        save_bytes(out / f"{name}.png", picture)
    save_bytes(out / f"{name}.md", markdown(result).encode())
    save_bytes(out / f"{name}.json", to_json(result))
    return result


def markdown(result: dict[str, Any]) -> str:
    """A result as a page of Markdown."""
    parts = [f"# {result['title']}", result["text"]]
    parts += [f"Warning: {line}" for line in result["warnings"]]
    for each in result["tables"]:
        lines = [f"| {' | '.join(map(_escaped, row))} |" for row in each["rows"]]
        head = f"| {' | '.join(map(_escaped, each['columns']))} |"
        rule = "|" + "---|" * len(each["columns"])
        title = [f"**{each['title']}**", ""] if each["title"] else []
        parts.append("\n".join([*title, head, rule, *lines]))
    parts += [f"![{result['title']}]({name})" for name in result["pictures"]]
    return "\n\n".join(part for part in parts if part) + "\n"


def _escaped(value: Any) -> str:
    return cell(value).replace("|", "\\|").replace("\n", " ")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Every result in a folder and in the folders in it, by name; other JSON is left alone."""
    found = []
    for path in [*sorted(folder.glob("*.json")), *sorted(folder.glob("*/*.json"))]:
        try:
            value = read_object(path, CheckpointError)
        except CheckpointError:
            continue
        wanted = {"title": str, "text": str, "tables": list, "warnings": list, "pictures": list}
        if value.get("format") == FORMAT and all(
            isinstance(value.get(key), kind) for key, kind in wanted.items()
        ):
            found.append({**value, "name": path.relative_to(folder).with_suffix("").as_posix()})
    return found


def few_warnings(metric: str, counts: dict[str, int], *, biased: bool = True) -> list[str]:
    """A line for each set under 10,000 pictures; an unbiased measure is only less sure of them."""
    what = "biased" if biased else "uncertain"
    verb = "are" if " and " in metric else "is"
    return [
        f"{metric} of {count:,} {name} pictures {verb} {what}; published values are of {FEW:,} or "
        "more"
        for name, count in counts.items()
        if count < FEW
    ]


def sheet(sources: dict[str, Source], side: int = 96) -> bytes:
    """A PNG with a row of pictures of each set, named below."""
    tiles, labels = [], []
    for name, source in sources.items():
        items = evenly_spaced(len(source.pairs), 4 * SHOWN)
        crops, _ = load_or_skip(
            source.pairs, items, lambda image, _: center_crop(image, side), limit=SHOWN
        )
        rows = to_tensor(crops)
        blank = rows.new_ones(SHOWN - len(rows), 3, side, side)
        tiles.append(torch.cat([rows, blank]))
        labels += [name] * len(rows) + [""] * len(blank)
    return png(pictures.grid(torch.cat(tiles), columns=SHOWN, labels=labels))


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def pyplot(owner: str) -> Any:
    """matplotlib's pyplot, drawing into memory.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as missing:
        raise EnvironmentProblem(
            f"{owner}: matplotlib must be installed for the plot, got none; "
            "type: pip install 'dalle-ext[eval]'"
        ) from missing
    return plt


def figure_png(owner: str, figure: Any) -> bytes:
    """The bytes of a figure as PNG; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    pyplot(owner).close(figure)
    return buffer.getvalue()
