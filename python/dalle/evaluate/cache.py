"""Results of long work in pieces on the disk, so that a killed command goes on where it stopped.

A folder `CACHE/KIND/KEY` holds `part-00000.safetensors`, ...; the key is a hash of all that the
content depends on. A part is written whole or not at all; a damaged one is computed again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from dalle.configs import integer
from dalle.console import progress_shown, say
from dalle.data.augment import center_crop
from dalle.data.pairs import load_or_skip
from dalle.errors import CheckpointError, DataError, UsageError
from dalle.evaluate.extractors import Extractor
from dalle.evaluate.sets import Source, picture_hash
from dalle.files import json_sha256, read_bytes, saving, write_atomic
from dalle.memory import require_memory
from dalle.pretrained import tensors_from_bytes, tensors_to_bytes

CACHE = Path("run/eval-cache")
PART = 512  # pictures whose features one file holds
MAX_PART_BYTES = 4 << 30
VERSION = 1  # of what a key stands for


@dataclass(frozen=True)
class Features:
    """Features of the pictures of a set that could be used.

    Attributes:
        values: (n, d) float32.
        items: (n,) int64, which picture of the set each row is of.
        source: the set.
        cached: parts that were there already.
    """

    values: Tensor
    items: Tensor
    source: Source
    cached: int

    def __len__(self) -> int:
        return len(self.values)


def in_parts(
    owner: str,
    folder: Path,
    total: int,
    size: int,
    compute: Callable[[Sequence[int], Callable[[int], None]], dict[str, Tensor]],
    *,
    name: str,
    check: Callable[..., bool],
) -> tuple[list[dict[str, Tensor]], int]:
    """Tensors for `total` items, `size` items a file; what is there already is read.

    Args:
        owner: begins the line of an error.
        folder: of the parts, made if missing.
        total, size: items in all and a part.
        compute: gives the tensors of a range of items; calls its second argument with the number
            done within the range.
        name: of the progress line.
        check: called as check(tensors, count=items): whether what was read is whole.

    Returns:
        The tensors of each part, and how many parts were there.
    """
    with saving(owner, folder):
        folder.mkdir(parents=True, exist_ok=True)
    parts, found = [], 0
    with progress_shown(name) as show:
        for number, start in enumerate(range(0, total, size)):
            items = range(start, min(start + size, total))
            path = folder / f"part-{number:05d}.safetensors"
            tensors = _read(owner, path, partial(check, count=len(items)))
            if tensors is None:
                tensors = compute(items, partial(_shown, show, start, total))
                with saving(owner, path):
                    write_atomic(path, tensors_to_bytes(tensors))
                show(items.stop, total)
            else:  # read at once: it says nothing of the time that the others take
                found += 1
            parts.append(tensors)
    return parts, found


def _shown(show: Callable[[int, int], None], start: int, total: int, done: int) -> None:
    """Reports what is done of a part as what is done of all."""
    show(start + done, total)


def _read(
    owner: str, path: Path, check: Callable[[dict[str, Tensor]], bool]
) -> dict[str, Tensor] | None:
    """A part, or None where there is none that is whole."""
    if not path.exists():
        return None
    try:
        tensors = tensors_from_bytes(read_bytes(path, MAX_PART_BYTES), path)
    except (OSError, CheckpointError):
        tensors = {}
    if tensors and check(tensors):
        return tensors
    say(f"{owner}: {path} is damaged and is computed again")
    return None


def key_of(description: dict[str, Any]) -> str:
    """The name of a folder for all that the description says."""
    return json_sha256({**description, "version": VERSION})[:32]


def blurred(image: np.ndarray, side: int, radius: float) -> np.ndarray:
    """The centred square at `side` pixels, blurred: (side, side, 3) uint8.

    Args:
        image: (H, W, 3) uint8.
        side: 0 keeps the square's own size.
        radius: of PIL's GaussianBlur, its standard deviation in pixels; 0 does nothing.
    """
    square = center_crop(image, side or min(image.shape[:2]))
    if radius == 0:
        return square
    return np.asarray(Image.fromarray(square).filter(ImageFilter.GaussianBlur(radius)))


def extract(
    owner: str,
    source: Source,
    extractor: Extractor,
    *,
    cache: Path = CACHE,
    batch_size: int = 64,
    side: int | None = None,
    radius: float = 0.0,
    minimum: int = 2,
    name: str = "features",
) -> Features:
    """Features of a set, from the cache where they are there.

    Args:
        owner: begins the line of an error.
        source: the set.
        extractor: the network.
        cache: folder; see the module's head.
        batch_size: pictures at once.
        side: of the centred square that is cut and resized first; None takes pictures as they are.
        radius: of the Gaussian blur then; with it `side` must be given.
        minimum: pictures that must be usable.
        name: of the set in messages, e.g. "real".

    Raises:
        DataError: fewer usable pictures than `minimum`, or features that are not finite.
    """
    batch_size = integer(owner, "batch_size", batch_size, 1)
    if radius and side is None:
        raise UsageError(f"{owner}: side must be given with a radius, got none")
    pairs = source.pairs
    if side:
        at_once = min(batch_size, len(pairs))
        what = f"{at_once} pictures of {side} pixels"
        advice = "take a smaller --side or --batch-size"
        require_memory(owner, at_once * 2 * 3 * side**2, what, advice)
    description = {
        "kind": "features",
        "extractor": [extractor.name, extractor.fingerprint, extractor.resize],
        "set": [picture_hash(pairs), len(pairs)],
        "square": [side, float(radius)],
    }

    def transform(image: np.ndarray, position: int) -> np.ndarray:
        return image if side is None else blurred(image, side, radius)

    def compute(items: Sequence[int], done: Callable[[int], None]) -> dict[str, Tensor]:
        values = [torch.empty(0, extractor.dimensions, dtype=torch.float32, device="cpu")]
        used: list[int] = []
        for start in range(0, len(items), batch_size):
            part = items[start : start + batch_size]
            images, positions = load_or_skip(pairs, part, transform, require_any=False)
            if images:
                values.append(extractor.features(images))
                used += [part[position] for position in positions]
            done(start + len(part))
        rows = torch.tensor(used, dtype=torch.int64, device="cpu")
        return {"features": torch.cat(values), "items": rows}

    def whole(read: dict[str, Tensor], count: int) -> bool:
        values, items = read.get("features"), read.get("items")
        if values is None or items is None or items.dtype != torch.int64:
            return False
        return values.shape == (len(items), extractor.dimensions) and len(items) <= count

    parts, found = in_parts(
        owner,
        Path(cache) / "features" / key_of(description),
        len(pairs),
        PART,
        compute,
        name=f"{extractor.name} features of {name}",
        check=whole,
    )
    values, items = (torch.cat([p[key] for p in parts]) for key in ("features", "items"))
    if found and len(items) < len(pairs) and not pairs.skipped:
        pairs.skipped = Counter({"could not be used": len(pairs) - len(items)})
    if len(items) < minimum:
        raise DataError(
            f"{owner}: {name} must hold {minimum} or more pictures that can be used, "
            f"got {len(items)} in {source.spec}"
        )
    bad = int(values.isfinite().all(1).logical_not().sum())
    if bad:
        raise DataError(
            f"{owner}: features of {name} must be finite, got NaN or infinity in {bad} of "
            f"{len(values)}"
        )
    return Features(values, items, source, found)
