"""Colours of pictures with an ICC profile, as sRGB."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, features

SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}  # mode of Pillow -> colour space of a profile
SAME = 2  # of 255: a profile that moves no colour further is sRGB, and the picture stays as it is


def to_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """The picture in sRGB by its profile, by the perceptual intent.

    A profile that cannot be used (damaged, of another number of channels) changes nothing, as
    browsers have it.

    Args:
        picture: of mode RGB, L or CMYK; one of another mode comes back as it is.
        profile: of the picture, or b"".

    Returns:
        A picture of mode RGB, or the same picture.
    """
    if picture.mode == "P" and profile:
        picture = picture.convert("RGB")
    if not profile or picture.mode not in SPACES:
        return picture
    transform = _transform(profile, picture.mode)
    return picture if transform is None else transform.apply(picture)


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where it cannot be used or does nothing."""
    if not features.check("littlecms2"):
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode != "CMYK" and _is_identity(transform, mode):
            return None
        return transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform moves no colour of a lattice by more than `SAME`."""
    steps = np.linspace(0, 255, 18).astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    tried = Image.fromarray(colours if mode == "RGB" else steps[None])
    before = np.asarray(tried.convert("RGB")).astype(int)
    return bool(np.abs(np.asarray(transform.apply(tried)) - before).max() <= SAME)
