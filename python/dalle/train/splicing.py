"""Broken pictures for the ranker: a rectangle of one picture's cells put into another.

Shape letters: B pictures, h x w cells.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dalle.configs import integer


def splice(cells: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Puts a rectangle of another item's cells at a random place of each item.

    Args:
        cells: (B, h, w, ...) codes or patches; item i takes from item i - 1.
        rng: places and sizes; sides are a quarter to a half of the grid's.

    Returns:
        A new tensor of the same shape.
    """
    out = cells.clone()
    size, height, width = cells.shape[:3]
    low = [max(1, side // 4) for side in (height, width)]
    high = [max(1, side // 2) for side in (height, width)]
    for i in range(size):
        h, w = (
            int(torch.randint(a, b + 1, (1,), generator=rng, dtype=torch.int64, device="cpu"))
            for a, b in zip(low, high, strict=True)
        )
        top, left, from_top, from_left = (
            int(
                torch.randint(side - part + 1, (1,), generator=rng, dtype=torch.int64, device="cpu")
            )
            for side, part in ((height, h), (width, w), (height, h), (width, w))
        )
        piece = cells[i - 1, from_top : from_top + h, from_left : from_left + w]
        out[i, top : top + h, left : left + w] = piece
    return out


def patches(images: torch.Tensor, grid: int) -> torch.Tensor:
    """(B, 3, H, W) -> (B, grid, grid, 3 * p * p)."""
    patch = images.shape[-1] // integer("patches", "grid", grid, 1)
    cells = F.unfold(images, patch, stride=patch)
    grid_cells: torch.Tensor = cells.transpose(1, 2).unflatten(1, (grid, grid))
    return grid_cells


def pixels(cells: torch.Tensor) -> torch.Tensor:
    """The inverse of `patches`."""
    grid = cells.shape[1]
    patch = round((cells.shape[-1] // 3) ** 0.5)
    flat = cells.flatten(1, 2).transpose(1, 2)
    return F.fold(flat, grid * patch, patch, stride=patch)
