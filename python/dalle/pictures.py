"""Pictures for people: grids with labels, saved whole or not at all.

Shape letters: N pictures, H rows, W columns. Colours are in [0, 1] coming in and
8 bit going out.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from dalle.configs import integer
from dalle.errors import UsageError
from dalle.files import saving, write_atomic

MARGIN = 4  # pixels between cells
MAX_SHEET = 1 << 27  # pixels; in memory a sheet takes four bytes each
MAX_LINES = 4  # of a label
METADATA_KEY = "dalle"  # keyword of the text chunk that says how a picture was made
LABEL_SIZE = 11  # pixels, height of the label's type
BACKGROUND = (255, 255, 255)
INK = (40, 40, 40)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """(…, 3, H, W) colours in [0, 1] -> (…, H, W, 3) uint8; values outside are clamped."""
    if images.dim() < 3 or images.shape[-3] != 3:
        raise UsageError(f"pictures: images must be (…, 3, H, W), got {tuple(images.shape)}")
    levels = (images.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.movedim(-3, -1).contiguous().numpy()


def default_scale(size: int) -> int:
    """Screen pixels for a pixel of a picture of `size` pixels: 96 in all at most, one at least."""
    return max(1, 96 // size)


def grid(
    images: torch.Tensor,
    *,
    columns: int,
    scale: int = 1,
    labels: Sequence[str] | None = None,
) -> Image.Image:
    """Lays pictures out row by row, each with its label below.

    Args:
        images: (N, 3, H, W), colours in [0, 1].
        columns: pictures a row.
        scale: whole number of screen pixels a picture's pixel takes (nearest neighbour).
        labels: N lines of text; wrapped to the cell, four lines at most.

    Raises:
        UsageError: a shape, a count or the number of labels does not fit.
    """
    if images.dim() != 4:
        raise UsageError(f"grid: images must be (N, 3, H, W), got {tuple(images.shape)}")
    columns, scale = integer("grid", "columns", columns), integer("grid", "scale", scale)
    if columns < 1 or scale < 1:
        raise UsageError(f"grid: columns and scale must be at least 1, got {columns} and {scale}")
    if labels is not None and len(labels) != len(images):
        raise UsageError(f"grid: labels must be {len(images)} lines, got {len(labels)}")
    cells = to_uint8(images)
    height, width = images.shape[-2] * scale, images.shape[-1] * scale
    font = ImageFont.load_default(LABEL_SIZE)
    wrapped = [_wrap(label, width, font) for label in labels or []]
    line_height = LABEL_SIZE + 2
    rows = -(-len(cells) // columns)
    row_lines = [
        max((len(lines) for lines in wrapped[r * columns : (r + 1) * columns]), default=0)
        for r in range(rows)
    ]
    tops = [MARGIN]
    for lines in row_lines:
        tops.append(tops[-1] + height + lines * line_height + MARGIN)
    used_columns = min(columns, max(len(cells), 1))
    sheet = Image.new("RGB", (MARGIN + used_columns * (width + MARGIN), tops[-1]), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for i, cell in enumerate(cells):
        row, col = divmod(i, columns)
        left, top = MARGIN + col * (width + MARGIN), tops[row]
        sheet.paste(
            Image.fromarray(cell).resize((width, height), Image.Resampling.NEAREST), (left, top)
        )
        for n, line in enumerate(wrapped[i] if wrapped else []):
            draw.text((left, top + height + n * line_height), line, INK, font=font)
    return sheet


def check_sheet(owner: str, count: int, side: int, scale: int) -> None:
    """Refuses a sheet of `count` pictures that no viewer would open, before they are drawn.

    Raises:
        UsageError: its pictures have more than 2^27 pixels in all, or `scale` is below 1.
    """
    if scale < 1:
        raise UsageError(f"{owner}: scale must be at least 1, got {scale}")
    pixels = count * (side * scale) ** 2
    if pixels > MAX_SHEET:
        raise UsageError(
            f"{owner}: the sheet must have at most {MAX_SHEET} pixels, got {count} pictures of "
            f"{side * scale} x {side * scale}; take fewer, or a smaller scale"
        )


def beside(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Interleaves M sets (N, 3, H, W): picture i of each is row i of `grid(columns=M)`.

    Equivalent to: torch.stack(rows, 1).flatten(0, 1)
    """
    shapes = {tuple(row.shape) for row in rows}
    if len(shapes) != 1:
        raise UsageError(f"beside: every set must have one shape, got {sorted(shapes)}")
    return torch.stack([row.detach().float().cpu() for row in rows], 1).flatten(0, 1)


def rows_of(*rows: torch.Tensor) -> torch.Tensor:
    """Sets of pictures, each (N, 3, H, W) in [0, 1], as rows of one picture (3, M * H, N * W)."""
    flat: torch.Tensor = beside(rows).unflatten(0, (-1, len(rows)))  # (N, M, 3, H, W)
    return flat.permute(2, 1, 3, 0, 4).flatten(3, 4).flatten(1, 2).clamp(0, 1)


def save_png(
    path: Path | str,
    image: Image.Image,
    metadata: Mapping[str, Any] | None = None,
    *,
    owner: str = "save",
) -> Path:
    """Writes a PNG whole or not at all: a temporary file in the same folder, then a rename.

    Args:
        path: the file.
        image: the picture.
        owner: begins an error's line.
        metadata: JSON values for a tEXt chunk `dalle` (ASCII: other letters as escapes).

    Raises:
        EnvironmentProblem: the folder cannot be written, or the disk is full. An older file of that
            name is left as it was.
    """
    buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
    if metadata is not None:
        info.add_text(METADATA_KEY, json.dumps(metadata, allow_nan=False))
    image.save(buffer, "PNG", pnginfo=info)
    return save_bytes(path, buffer.getvalue(), owner=owner)


def save_bytes(path: Path | str, content: bytes, *, owner: str = "save") -> Path:
    """The same promise for any small file (HTML, JSON)."""
    path = Path(path)
    with saving(owner, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    return path


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], lines[MAX_LINES - 1] + "…"]
    return lines
