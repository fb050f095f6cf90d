"""`dalle data make-shapes` and `dalle data check`."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from PIL import Image

from dalle.console import printable
from dalle.data.augment import center_crop, to_tensor
from dalle.data.folder import FolderPairs
from dalle.data.images import BadPicture, open_checked, read_bytes
from dalle.data.pairs import Pairs, all_captions, load_or_skip
from dalle.data.shapes import Scene
from dalle.data.shapes_pairs import ShapesPairs
from dalle.errors import UsageError
from dalle.files import check_not_input, check_targets, saving, to_json
from dalle.pictures import check_sheet, grid, save_bytes, save_png
from dalle.prior.config import PRESETS
from dalle.tokenizer import Tokenizer, lower
from dalle.train.prior_recipe import PriorTrainConfig


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
    """Reads a folder of pictures and captions, and says what training would find, leave out or cut.

    Attributes:
        data: folder, searched recursively for pictures, each with a .txt of the same name.
        verify: full decodes every picture, header only opens it, none trusts its suffix.
        contact: where to write a contact sheet of the first pictures (PNG).
        show: how many problems of a kind to print.
        image_size: side in pixels that is to be trained with; says what is smaller.
        tokenizer: folder of `dalle tokenizer train` (run/tokenizer); says which captions are
            longer than the prior.
        text_len: text positions of that prior; 0 stands for those of each preset.
    """

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"folder": "data"}

    data: Path
    image_size: int = 0
    tokenizer: Path | None = None
    text_len: int = 0
    verify: Literal["full", "header", "none"] = "full"
    contact: Path | None = None
    show: int = 10


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
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(f"data make-shapes: {folder} must be empty or new, got files in it")
        facts = {}
        for i, scene in enumerate(pairs.scenes):
            buffer = io.BytesIO()
            Image.fromarray(pairs.load(i)).save(buffer, "PNG")
            # No fsync for each file: a half-written folder is refused above and drawn again.
            (folder / f"{i:06d}.png").write_bytes(buffer.getvalue())
            (folder / f"{i:06d}.txt").write_text(scene.caption + "\n", encoding="utf-8")
            facts[f"{i:06d}"] = _facts(scene)
    save_bytes(config.out / "facts.json", to_json(facts))
    save_png(config.out / "contact.png", contact_sheet(pairs, 64, config.image_size))
    print(f"{len(pairs)} pairs ({config.split}) in {folder}")
    print(f"facts in {config.out / 'facts.json'}, contact sheet {config.out / 'contact.png'}")


def _range_text(label: str, values: list[int]) -> str:
    low, middle, high = (int(v) for v in np.quantile(values, [0, 0.5, 1]))
    return f"{label}: {low} to {high}, median {middle}"


def check(config: CheckConfig) -> None:
    """Counts pairs, sizes, caption lengths, and what is left out or cut, and why."""
    for name in ("image_size", "show", "text_len"):
        if getattr(config, name) < 0:
            value = getattr(config, name)
            raise UsageError(f"data check: {name} must be 0 or more, got {value}")
    if config.contact is not None:
        check_targets("data check", config.contact)
    tokenizer = None if config.tokenizer is None else Tokenizer.from_pretrained(config.tokenizer)
    if config.text_len == 1:
        raise UsageError("data check: text_len must be 0, or at least 2, got 1")
    pairs = FolderPairs(config.data, verify=config.verify)
    if config.contact is not None:
        check_not_input("data check", config.contact, pairs.paths)
    sizes: dict[int, tuple[int, int]] = {}
    formats = Counter[str]()
    for item, path in enumerate(pairs.paths):
        try:
            picture = open_checked(read_bytes(path), path)
        except BadPicture as problem:  # only where verify is none
            formats[problem.reason] += 1
            continue
        sizes[item] = picture.size
        formats[str(picture.format)] += 1
    captions = all_captions(pairs)
    print(f"{config.data}: {len(pairs)} pairs")
    print("formats: " + ", ".join(f"{name} {n}" for name, n in formats.most_common()))
    if sizes:
        print(_range_text("width", [width for width, _ in sizes.values()]) + " pixels")
        print(_range_text("height", [height for _, height in sizes.values()]) + " pixels")
    print(_range_text("caption", [len(caption.split()) for caption in captions]) + " words")
    print(f"different captions: {len(set(captions))}")
    if pairs.several:
        print(
            f"files of several captions: {len(pairs.several)}, {len(captions)} captions in all;"
            " training draws one of a picture's each time"
        )
    print(f"left out: {sum(pairs.skipped.values())}")
    for reason, count in pairs.skipped.most_common():
        print(f"  {count} x {reason}")
    _show(pairs.problems, config.show)
    if config.image_size:
        _report_too_small(pairs, sizes, config)
    if tokenizer is not None:
        _report_too_long(captions, tokenizer, config.text_len)
    if config.contact is not None:
        print(f"contact sheet: {save_png(config.contact, contact_sheet(pairs, 64, 96))}")


def _show(lines: Sequence[str], limit: int) -> None:
    for line in lines[:limit]:
        print(f"  {printable(line)}")
    if 0 < limit < len(lines):
        print(f"  ... and {len(lines) - limit} more")


def _report_too_small(
    pairs: FolderPairs, sizes: dict[int, tuple[int, int]], config: CheckConfig
) -> None:
    """Reports the pictures that the paper's crops refuse."""
    side = config.image_size
    small = [(item, size) for item, size in sizes.items() if min(size) < side]
    note = "`dalle dvae train` and `prior train` leave them out; the ranker and augment none do not"
    print(
        f"smaller than {side} pixels: {len(small)} of {len(sizes)} pictures"
        + (f" ({note})" if small else "")
    )
    _show([f"{pairs.paths[item]}: {w} x {h}" for item, (w, h) in small], config.show)


def _report_too_long(captions: list[str], tokenizer: Tokenizer, text_len: int) -> None:
    """Reports how many captions are cut, without and with the BPE dropout of training."""
    presets_by_len: dict[int, list[str]] = {}
    for name, preset in PRESETS.items():
        presets_by_len.setdefault(text_len or preset.text_len, []).append(name)
    lengths = [_lengths(captions, tokenizer, p) for p in (0.0, PriorTrainConfig().bpe_dropout)]
    print(_range_text("tokens", lengths[0]) + " a caption")
    for slots, names in presets_by_len.items():
        cut, cut_with_dropout = (sum(length > slots - 1 for length in part) for part in lengths)
        label = "this prior" if text_len else f"presets {', '.join(names)}"
        print(
            f"cut at {slots - 1} tokens ({label}): {cut} of {len(captions)} captions, "
            f"{cut_with_dropout} with the BPE dropout of training"
        )


def _lengths(captions: list[str], tokenizer: Tokenizer, dropout: float) -> list[int]:
    """Tokens of each caption, uncut. In parts, since each is padded to its longest caption."""
    lengths: list[int] = []
    for begin in range(0, len(captions), 64):
        part = captions[begin : begin + 64]
        width = max(len(lower(caption).encode()) for caption in part)  # a byte is a token at most
        ids = tokenizer.encode(
            part, max(width, 1), dropout=dropout, positions=range(begin, begin + len(part))
        )
        lengths += (ids != Tokenizer.PAD).sum(1).tolist()
    return lengths
