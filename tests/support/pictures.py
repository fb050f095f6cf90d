"""Picture files of a few kinds."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def encode(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def photo(width=40, height=24, mode="RGB"):
    ramp = np.linspace(0, 255, width * height * 3).reshape(height, width, 3).astype(np.uint8)
    return Image.fromarray(ramp).convert(mode)


JPEG = encode(photo(), format="JPEG")


PNG = encode(photo(), format="PNG")


WIDE_GIF = encode(photo(), format="GIF")
