"""area_resize against a slow float64 definition."""

from __future__ import annotations

import numpy as np
import pytest

import dalle_ext


def area_matrix(in_size: int, out_size: int) -> np.ndarray:
    """(out, in) weights: the share of each input pixel in [y s, (y + 1) s), border repeated."""
    scale = (in_size - 1) / (out_size - 1) if out_size > 1 else in_size / out_size
    weights = np.zeros((out_size, in_size))
    if scale == 0:
        weights[:, 0] = 1
        return weights
    for y in range(out_size):
        for pixel in range(int(y * scale), int((y + 1) * scale) + 2):
            cover = min(pixel + 1, (y + 1) * scale) - max(pixel, y * scale)
            if cover > 0:
                weights[y, min(pixel, in_size - 1)] += cover
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (17, 40), (72, 72), (300, 288)])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (16, 9), (64, 64), (301, 77)])
def test_area_resize_matches_definition(shape, size):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    rows, cols = area_matrix(shape[0], size[0]), area_matrix(shape[1], size[1])
    exact = np.einsum("yi,xj,ijc->yxc", rows, cols, image.astype(np.float64), optimize=True)
    got = dalle_ext.area_resize(image, *size).astype(np.float64)
    assert np.abs(got - exact).max() <= 0.5 + 1e-3  # nearest, up to float32 weights


def test_area_resize_keeps_a_constant_image():
    image = np.full((37, 53, 3), 201, np.uint8)
    assert (dalle_ext.area_resize(image, 20, 64) == 201).all()


def test_area_resize_takes_any_view():
    image = np.arange(40 * 40 * 3, dtype=np.int64).astype(np.uint8).reshape(40, 40, 3)
    view = image[::2, ::-1]
    expected = dalle_ext.area_resize(view.copy(), 8, 8)
    assert (dalle_ext.area_resize(view, 8, 8) == expected).all()


def test_area_resize_refuses():
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(TypeError, match="area_resize: image must be uint8, got float32"):
        dalle_ext.area_resize(image.astype(np.float32), 2, 2)
    with pytest.raises(ValueError, match=r"area_resize: image must be a nonempty \(H, W, C\)"):
        dalle_ext.area_resize(image[0], 2, 2)
    with pytest.raises(ValueError, match="got 0 and 2"):
        dalle_ext.area_resize(image, 0, 2)
