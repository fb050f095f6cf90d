"""Masks of an edit: which tokens of a picture are kept, from pixels, boxes or rows.

A mask is True where the picture is kept. Shape letters: h x w tokens, H = W side in pixels; a token
covers H / h x W / w pixels.
"""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle.errors import UsageError

GIVEN_ROWS = 15 / 32  # of the paper's image-to-image: the top 15 of 32 rows are given
WHOLE = re.compile(r"\s*[-+]?[0-9]{1,9}\s*")


def default_rows(rows: int) -> int:
    """How many of `rows` rows of tokens an edit keeps where nothing is said: 15 of 32."""
    return min(max(1, round(rows * GIVEN_ROWS)), rows - 1)


def top_rows(grid: tuple[int, int], rows: int) -> Tensor:
    """(h, w) bool: the top `rows` rows are kept.

    Raises:
        UsageError: not 1 to h - 1.
    """
    if not 0 < rows < grid[0]:
        raise UsageError(f"edit: keep_rows must be 1 to {grid[0] - 1}, got {rows}")
    keep = torch.zeros(grid, dtype=torch.bool, device="cpu")
    keep[:rows] = True
    return keep


def parse_box(text: str) -> tuple[int, ...]:
    """The numbers of "x0,y0,x1,y1", or of "x0,y0", which reaches the bottom right corner.

    Raises:
        UsageError: it is something else.
    """
    parts = text.split(",")
    if len(parts) not in (2, 4) or not all(WHOLE.fullmatch(part) for part in parts):
        raise UsageError(f"edit: box must be x0,y0,x1,y1 or x0,y0, got {text!r:.100}")
    return tuple(int(part) for part in parts)


def outside_boxes(boxes: Sequence[Sequence[int]], width: int, height: int) -> Tensor:
    """(height, width) bool: what lies outside all `boxes` is kept.

    Args:
        boxes: x0, y0, x1, y1 of each, x1 and y1 excluded; or x0, y0, down to the corner.
        width, height: in pixels, or in tokens.

    Raises:
        UsageError: a box is empty, or reaches outside.
    """
    keep = torch.ones(height, width, dtype=torch.bool, device="cpu")
    for box in boxes:
        x0, y0, x1, y1 = (*box, width, height) if len(box) == 2 else box
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise UsageError(
                f"edit: box must have 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}, got "
                f"{','.join(map(str, box))}"
            )
        keep[y0:y1, x0:x1] = False
    return keep


def whole_tokens(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """(H, W) bool -> (h, w) bool: a token is kept only if all its pixels are."""
    rows, columns = grid
    return pixels.reshape(rows, pixels.shape[0] // rows, columns, -1).all(3).all(1)


def pixels_of(tokens: Tensor, factor: int) -> Tensor:
    """(h, w) -> (h * factor, w * factor): each pixel as its token."""
    return tokens.repeat_interleave(factor, 0).repeat_interleave(factor, 1)


def resized(mask: np.ndarray, side: int) -> Tensor:
    """A square mask of any size -> (side, side) bool: each pixel takes the nearest one."""
    nearest = [
        ((2 * np.arange(side, dtype=np.int64) + 1) * n // (2 * side)).clip(0, n - 1)
        for n in mask.shape
    ]
    return torch.from_numpy(np.ascontiguousarray(mask[np.ix_(*nearest)]))


def kept_tokens(keep: Any, grid: tuple[int, int], side: int) -> tuple[Tensor, Tensor]:
    """A mask of tokens (h, w) or pixels (H, W) as both, checked.

    Args:
        keep: bool tensor or array, True where the picture is kept.
        grid: h and w.
        side: H = W.

    Returns:
        (h, w) and (H, W) bool on the CPU. The pixels are as given, also in a token that is not kept
        whole.

    Raises:
        UsageError: another type or shape, no token is kept, or none is left to draw.
    """
    if not isinstance(keep, Tensor | np.ndarray):
        raise UsageError(f"edit: keep must be a tensor of bool, got {type(keep).__name__}")
    mask = (
        torch.as_tensor(keep, dtype=torch.bool, device="cpu").detach()
        if keep.dtype in (torch.bool, np.bool_)
        else None
    )
    if mask is None:
        raise UsageError(f"edit: keep must be a tensor of bool, got {keep.dtype}")
    if tuple(mask.shape) not in (grid, (side, side)):
        raise UsageError(
            f"edit: keep must be a mask of {grid[0]} x {grid[1]} tokens or {side} x {side} pixels, "
            f"got {' x '.join(map(str, mask.shape)) or 'one value'}"
        )
    if tuple(mask.shape) == grid:
        tokens, pixels = mask.clone(), pixels_of(mask, side // grid[0])
    else:
        tokens, pixels = whole_tokens(mask, grid), mask.clone()
    if bool(tokens.all()):
        raise UsageError("edit: keep must leave a token to draw, got a mask that keeps all")
    if not bool(tokens.any()):
        raise UsageError(
            "edit: keep must keep a whole token, got a mask that keeps none; "
            "dalle sample draws whole pictures"
        )
    return tokens, pixels


def packed(pixels: Tensor) -> str:
    """(H, W) bool as text: its bits, deflated, in base64."""
    bits = np.packbits(pixels.cpu().numpy())
    return base64.b64encode(zlib.compress(bits.tobytes(), 9)).decode("ascii")


def unpacked(text: str, side: int) -> Tensor:
    """The mask (side, side) of `packed`.

    Raises:
        UsageError: the text is something else, or of another size.
    """
    size = (side * side + 7) // 8
    try:
        data = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)
    except (ValueError, zlib.error) as problem:  # binascii.Error is a ValueError
        raise UsageError("edit: keep must be a mask in base64, got other text") from problem
    if len(data) != size:
        raise UsageError(f"edit: keep must be a mask of {side} x {side} pixels, got another size")
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=side * side)
    return torch.from_numpy(bits.astype(bool)).view(side, side)
