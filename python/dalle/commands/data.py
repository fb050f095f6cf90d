"""`dalle data make-shapes`."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from dalle.data.augment import center_crop, to_tensor
from dalle.data.pairs import Pairs, load_or_skip
from dalle.data.shapes import Scene
from dalle.data.shapes_pairs import ShapesPairs
from dalle.errors import UsageError
from dalle.files import atomic_folder, saving, to_json
from dalle.pictures import check_sheet, grid, save_bytes, save_png


@dataclass(frozen=True, kw_only=True)
class MakeShapesConfig:
    """Draws pictures of the procedural set into a folder.

    Attributes:
        out: written there: pairs/NNNNNN.png and .txt, facts.json, contact.png.
        split: train, test (captions held out), zero (colour-shape pairs held out).
        count: number of pictures.
        image_size: side in pixels, a multiple of 8, at least 24.
        seed: which pictures.
    """

    out: Path
    split: Literal["train", "test", "zero"] = "train"
    count: int = 1000
    image_size: int = 24
    seed: int = 0


def contact_sheet(pairs: Pairs, count: int, side: int) -> Image.Image:
    """The first pictures with their captions, centre-cropped to `side`, at least 64 pixels each."""
    images, positions = load_or_skip(
        pairs, range(len(pairs)), lambda image, _: center_crop(image, side), limit=count
    )
    scale = max(1, -(-96 // side))
    labels = [pairs.captions[i] for i in positions]
    return grid(to_tensor(images), columns=8, scale=scale, labels=labels)


def _facts(scene: Scene) -> dict[str, object]:
    return {"caption": scene.caption, "kind": scene.kind, **asdict(scene)}


def make_shapes(config: MakeShapesConfig) -> None:
    """Draws pictures with captions and facts into a folder."""
    if config.count < 1:
        raise UsageError(f"data make-shapes: count must be at least 1, got {config.count}")
    if config.seed < 0:
        raise UsageError(f"data make-shapes: seed must be 0 or more, got {config.seed}")
    check_sheet("data make-shapes", min(64, config.count), config.image_size, 1)
    pairs = ShapesPairs(
        config.split, image_size=config.image_size, seed=config.seed, size=config.count
    )
    folder = config.out / "pairs"
    with saving("data make-shapes", folder):
        config.out.mkdir(parents=True, exist_ok=True)
        if folder.exists() and any(folder.iterdir()):
            raise UsageError(f"data make-shapes: {folder} must be empty or new, got files in it")
        facts = {}
        with atomic_folder(folder) as made:
            for i, scene in enumerate(pairs.scenes):
                buffer = io.BytesIO()
                Image.fromarray(pairs.load(i)).save(buffer, "PNG")
                # No fsync for each file: the folder gets its name when all are written.
                (made / f"{i:06d}.png").write_bytes(buffer.getvalue())
                (made / f"{i:06d}.txt").write_text(scene.caption + "\n", encoding="utf-8")
                facts[f"{i:06d}"] = _facts(scene)
    save_bytes(config.out / "facts.json", to_json(facts), owner="data make-shapes")
    sheet = contact_sheet(pairs, 64, config.image_size)
    save_png(config.out / "contact.png", sheet, owner="data make-shapes")
    print(f"{len(pairs)} pairs ({config.split}) in {folder}")
    print(f"facts in {config.out / 'facts.json'}, contact sheet {config.out / 'contact.png'}")
