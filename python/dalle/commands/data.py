"""`dalle data make-shapes` and `dalle data check`."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from dalle.data.augment import center_crop, to_tensor
from dalle.data.folder import FolderPairs
from dalle.data.images import BadPicture, open_checked, read_bytes
from dalle.data.pairs import Pairs, load_or_skip
from dalle.data.shapes import Scene
from dalle.data.shapes_pairs import ShapesPairs
from dalle.errors import UsageError
from dalle.files import saving, to_json
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


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Reads a folder of pictures and captions, and says what training would find.

    Attributes:
        folder: searched recursively for pictures, each with a .txt of the same name.
        verify: full decodes every picture, header only opens it, none trusts its suffix.
        contact: where to write a contact sheet of the first pictures (PNG).
        show: how many problems to print.
    """

    folder: Path
    verify: Literal["full", "header", "none"] = "full"
    contact: Path | None = None
    show: int = 10


def contact_sheet(pairs: Pairs, count: int, side: int) -> Image.Image:
    """The first pictures with their captions, centre-cropped to `side`, at least 64 pixels each."""
    images, kept = load_or_skip(
        pairs, range(min(count, len(pairs))), lambda image, _: center_crop(image, side)
    )
    scale = max(1, -(-96 // side))
    labels = [pairs.captions[i] for i in kept]
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
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(f"data make-shapes: {folder} must be empty or new, got files in it")
        facts = {}
        for i, scene in enumerate(pairs.scenes):
            buffer = io.BytesIO()
            Image.fromarray(pairs.load(i)).save(buffer, "PNG")
            # No fsync for each: a folder half written is refused above and drawn anew.
            (folder / f"{i:06d}.png").write_bytes(buffer.getvalue())
            (folder / f"{i:06d}.txt").write_text(scene.caption + "\n", encoding="utf-8")
            facts[f"{i:06d}"] = _facts(scene)
    save_bytes(config.out / "facts.json", to_json(facts))
    save_png(config.out / "contact.png", contact_sheet(pairs, 64, config.image_size))
    print(f"{len(pairs)} pairs ({config.split}) in {folder}")
    print(f"facts in {config.out / 'facts.json'}, contact sheet {config.out / 'contact.png'}")


def _spread(label: str, values: list[int]) -> str:
    low, middle, high = (int(v) for v in np.quantile(values, [0, 0.5, 1]))
    return f"{label}: {low} to {high}, median {middle}"


def check(config: CheckConfig) -> None:
    """Counts pairs, sizes, caption lengths, and what is left out and why."""
    if config.show < 0:
        raise UsageError(f"data check: show must be 0 or more, got {config.show}")
    pairs = FolderPairs(config.folder, verify=config.verify)
    widths, heights, formats = [], [], Counter[str]()
    for path in pairs.paths:
        try:
            picture = open_checked(read_bytes(path), path)
        except BadPicture:  # only where verify is none
            formats["not a picture"] += 1
            continue
        widths.append(picture.width)
        heights.append(picture.height)
        formats[str(picture.format)] += 1
    print(f"{config.folder}: {len(pairs)} pairs")
    print("formats: " + ", ".join(f"{name} {n}" for name, n in formats.most_common()))
    if widths:
        print(_spread("width", widths) + " pixels")
        print(_spread("height", heights) + " pixels")
    print(_spread("caption", [len(caption.split()) for caption in pairs.captions]) + " words")
    print(f"different captions: {len(set(pairs.captions))}")
    print(f"left out: {sum(pairs.skipped.values())}")
    for reason, count in pairs.skipped.most_common():
        print(f"  {count} x {reason}")
    for problem in pairs.problems[: config.show]:
        print(f"  {problem}")
    if config.contact is not None:
        print(f"contact sheet: {save_png(config.contact, contact_sheet(pairs, 64, 96))}")
