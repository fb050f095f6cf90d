"""The paper's two augmentations, and the conversion of pictures to tensors.

Both listings assume pictures whose shorter side is at least the target; a smaller picture is
refused. `center_crop` is for data sets whose pictures must not be cut or mirrored at random.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

import dalle_ext
from dalle.configs import integer
from dalle.data.pairs import Pairs, load_or_skip
from dalle.errors import DataError, UsageError


class TooSmall(DataError):
    """A picture smaller than the crop."""

    reason = "smaller than the crop"


class NotRgb(DataError):
    """An array that is no picture of three colours."""

    reason = "not (H, W, 3) uint8"


def _check(name: str, image: np.ndarray, size: int, minimum: int) -> int:
    """Returns the shorter side of a (H, W, 3) uint8 picture."""
    if size < 1:
        raise UsageError(f"{name}: size must be at least 1, got {size}")
    if not isinstance(image, np.ndarray):
        raise NotRgb(f"{name}: image must be (H, W, 3) uint8, got {type(image).__name__}")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise NotRgb(f"{name}: image must be (H, W, 3) uint8, got {image.shape} {image.dtype}")
    shorter = int(min(image.shape[:2]))
    if shorter < minimum:
        raise TooSmall(
            f"{name}: image must have sides of at least {minimum}, "
            f"got {image.shape[0]} x {image.shape[1]}"
        )
    return shorter


def _random_crop(image: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    row = int(rng.integers(0, image.shape[0] - side, endpoint=True))
    column = int(rng.integers(0, image.shape[1] - side, endpoint=True))
    return image[row : row + side, column : column + side]


def _area(image: np.ndarray, side: int) -> np.ndarray:
    """AREA resize to side x side, clipped and rounded to uint8 by the resize itself."""
    return image if image.shape[:2] == (side, side) else dalle_ext.area_resize(image, side, side)


def dvae_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Listing 1 of the paper (appendix A.2): what the dVAE trains on.

    A random square of the shorter side s, resized to t uniform in
    [min(s, round(9/8 size)), min(s, round(12/8 size))], then a random crop, mirrored half the time.

    Args:
        image: (H, W, 3) uint8, both sides at least `size`.
        size: target side; 256 in the paper.
        rng: all randomness.

    Returns:
        (size, size, 3) uint8, a copy.

    Raises:
        TooSmall: the picture is.
        NotRgb: it has another shape or type.
    """
    size = integer("dvae_crop", "size", size)
    shorter = _check("dvae_crop", image, size, size)
    image = _random_crop(image, shorter, rng)
    # Python's round() takes halves to even, as the listing's does.
    low, high = min(shorter, round(9 * size / 8)), min(shorter, round(12 * size / 8))
    image = _area(image, int(rng.integers(low, high, endpoint=True)))
    image = _random_crop(image, size, rng)
    if rng.random() < 0.5:
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def prior_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Listing 2 of the paper (appendix B.2): what the transformer's image tokens are made of.

    A square of the shorter side s near the centre (offset uniform in
    [3(h - s)//8, max(3(h - s)//8 + 1, 5(h - s)//8)), upper end excluded), resized to t uniform in
    [size, min(s, round(9/8 size))], then a random crop. No mirror image: pictures may hold text.

    Args:
        image: (H, W, 3) uint8, both sides at least `size`.
        size: target side; 256 in the paper.
        rng: all randomness.

    Returns:
        (size, size, 3) uint8, a copy.

    Raises:
        TooSmall: the picture is.
        NotRgb: it has another shape or type.
    """
    size = integer("prior_crop", "size", size)
    shorter = _check("prior_crop", image, size, size)
    start = []
    for extent in image.shape[:2]:
        low = 3 * (extent - shorter) // 8
        high = max(low + 1, 5 * (extent - shorter) // 8)
        start.append(int(rng.integers(low, high)))
    image = image[start[0] : start[0] + shorter, start[1] : start[1] + shorter]
    side = int(rng.integers(size, min(shorter, round(9 * size / 8)), endpoint=True))
    return np.ascontiguousarray(_random_crop(_area(image, side), size, rng))


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The middle square, AREA-resized to size x size; no randomness, any size of picture.

    Args:
        image: (H, W, 3) uint8.
        size: target side.

    Returns:
        (size, size, 3) uint8, a copy; a picture of that very size comes back unchanged.
    """
    size = integer("center_crop", "size", size)
    shorter = _check("center_crop", image, size, 1)
    row, column = (image.shape[0] - shorter) // 2, (image.shape[1] - shorter) // 2
    image = image[row : row + shorter, column : column + shorter]
    return np.array(_area(image, size))


def load_cropped(
    pairs: Pairs, items: Sequence[int], size: int
) -> tuple[list[np.ndarray], list[int]]:
    """Pictures by `center_crop`, and their items, without those that cannot be used.

    Raises:
        DataError: none can be used.
    """
    crops, positions = load_or_skip(pairs, items, lambda image, _: center_crop(image, size))
    return crops, [items[position] for position in positions]


def to_tensor(images: Sequence[np.ndarray] | np.ndarray) -> Tensor:
    """Stacks pictures of one size.

    Args:
        images: B pictures, (H, W, 3) uint8 each.

    Returns:
        (B, 3, H, W) float32 in [0, 1], contiguous.

    Raises:
        DataError: no picture, not uint8, or sizes differ.
    """
    if not isinstance(images, Iterable) or not all(isinstance(i, np.ndarray) for i in images):
        raise DataError("to_tensor: images must be arrays, got other values")
    shapes = {image.shape for image in images}
    dtypes = {image.dtype for image in images}
    if len(shapes) != 1 or dtypes != {np.dtype(np.uint8)} or len(next(iter(shapes))) != 3:
        raise DataError(
            "to_tensor: images must be (H, W, 3) uint8 of one size, got "
            f"{sorted(shapes)} {sorted(map(str, dtypes))}"
        )
    stacked = torch.from_numpy(np.ascontiguousarray(np.stack(list(images)).transpose(0, 3, 1, 2)))
    return stacked.to(torch.float32).div_(255)
