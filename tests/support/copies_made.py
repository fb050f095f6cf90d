"""Pictures of no two alike, and copies of them as somebody might have made them."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw


def picture(seed: int, side: int = 64) -> np.ndarray:
    """A coloured ground with a soft texture and some outlines: (side, side, 3) uint8."""
    rng = np.random.default_rng(seed)
    cells = int(rng.integers(2, 7))
    ground = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
    made = ground.resize((side, side), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(made)
    for _ in range(int(rng.integers(2, 7))):
        x, y = rng.uniform(0, side, 2)
        w, h = rng.uniform(side / 8, side / 2, 2)
        box, colour = (x - w / 2, y - h / 2, x + w / 2, y + h / 2), tuple(rng.integers(0, 256, 3))
        draw = (pen.ellipse, pen.rectangle)[int(rng.integers(2))]
        draw(box, fill=tuple(int(c) for c in colour))
    return np.asarray(made)


def copied(image: np.ndarray, kind: str, seed: int) -> np.ndarray:
    """A copy: "cropped" to 3/4 of the sides, "recoloured", or "jpeg" of quality 25.

    Nearer ones: "trimmed" by a tenth of the sides, "resized" to 3/4.
    """
    rng = np.random.default_rng(seed)
    made, side = Image.fromarray(image), image.shape[0]
    if kind == "resized":
        return np.asarray(made.resize((side * 3 // 4,) * 2, Image.Resampling.BILINEAR))
    if kind in ("cropped", "trimmed"):
        rest = side // (4 if kind == "cropped" else 10)
        x, y = (int(v) for v in rng.integers(0, rest, 2))
        return np.asarray(made.crop((x, y, x + side - rest, y + side - rest)))
    if kind == "recoloured":
        hsv = np.asarray(made.convert("HSV")).astype(np.float32)
        hsv[..., 0] = (hsv[..., 0] + rng.choice([-1, 1]) * 20) % 256
        hsv[..., 1:] *= rng.uniform(0.7, 1.3, 2)
        return np.asarray(Image.fromarray(hsv.clip(0, 255).astype(np.uint8), "HSV").convert("RGB"))
    buffer = io.BytesIO()
    made.save(buffer, "JPEG", quality=25)
    return np.asarray(Image.open(buffer).convert("RGB"))
