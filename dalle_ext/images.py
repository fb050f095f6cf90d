"""Host-side image operations, on numpy arrays."""

from __future__ import annotations

import numpy as np

from dalle_ext import _native
from dalle_ext._checks import integer


def area_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes with the AREA method and aligned corners, as listings 1 and 2 of the paper do.

    Output pixel y averages the input interval [y s, (y + 1) s), s = (in - 1) / (out - 1), and the
    same along x; the result is rounded to nearest and clipped to 0 .. 255.

    Args:
        image: (H, W, C) uint8, nonempty.
        height: rows of the result, at least 1.
        width: columns of the result, at least 1.

    Returns:
        (height, width, C) uint8.

    Raises:
        TypeError: image is not uint8.
        ValueError: image has not three axes or is empty, or a size is below 1.
    """
    if image.dtype != np.uint8:
        raise TypeError(f"area_resize: image must be uint8, got {image.dtype}")
    rows = integer("area_resize", "height", height)
    columns = integer("area_resize", "width", width)
    host = _native.host("area_resize")
    resized: np.ndarray = host.area_resize(np.ascontiguousarray(image), rows, columns)
    return resized
