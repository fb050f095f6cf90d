"""The three folders of pictures on which `dalle train` is measured.

`python -m benchmarks.own_pictures DIR` writes DIR/emoji300 (300 emoji of 72 pixels), DIR/shapes400
(400 drawn shapes of 64) and DIR/photo60 (60 gradients with noise, as photographs have), every other
picture a JPEG, the others PNG, each with a .txt caption. Then, for each:

    dalle train --data DIR/emoji300 --out run
    python -m benchmarks.record_demo run
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dalle.data.shapes_pairs import ShapesPairs
from dalle.data.sources import load_pairs

SUBJECTS = "dawn sea forest desert storm meadow city snow lake night".split()


def save(folder: Path, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> None:
    """Writes pairs, every other picture as JPEG."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        image = Image.fromarray(picture)
        if number % 2:
            image.save(folder / f"{number:04}.jpg", quality=92)
        else:
            image.save(folder / f"{number:04}.png")
        (folder / f"{number:04}.txt").write_text(caption + "\n")


def photograph(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A gradient between two colours, with coarse and fine noise."""
    first, second = rng.integers(0, 255, 3), rng.integers(0, 255, 3)
    rows, columns = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[:, None]
    share = rng.random()
    level = share * rows + (1 - share) * columns
    coarse = rng.normal(128, 40, (height // 8 + 1, width // 8 + 1, 3)).clip(0, 255)
    grown = Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.BICUBIC)
    noise = np.asarray(grown).astype(float) - 128 + rng.normal(0, 8, (height, width, 3))
    return (first * (1 - level) + second * level + noise).clip(0, 255).astype(np.uint8)


def main() -> None:
    """Writes the folders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    rng = np.random.default_rng(0)
    emoji = load_pairs("emoji", image_size=72)
    chosen = rng.permutation(len(emoji))[:300]
    save(folder / "emoji300", [emoji.load(i) for i in chosen], [emoji.captions[i] for i in chosen])
    shapes = ShapesPairs("train", image_size=64, size=400)
    save(folder / "shapes400", list(shapes.images), shapes.captions)
    sizes = [(300, 400), (400, 300), (256, 256)]
    photos = [photograph(rng, *sizes[number % 3]) for number in range(60)]
    captions = [f"a photo of {SUBJECTS[n % 10]} number {n // 10}" for n in range(60)]
    save(folder / "photo60", photos, captions)


if __name__ == "__main__":
    main()
