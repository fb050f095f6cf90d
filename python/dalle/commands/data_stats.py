"""`dalle data stats`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dalle.commands import presets
from dalle.config_files import CONFIG_NAME, write_resolved
from dalle.data.codes import stores_of
from dalle.data.filters import picture_size
from dalle.data.mixture import file_of
from dalle.data.pairs import Pairs, captions_of, evenly_spaced, number_of_captions
from dalle.data.progress import KEPT_SO_FAR, finish, of_data, rows_in_blocks
from dalle.data.source import require_packages
from dalle.data.sources import check_apart
from dalle.data.tally import Tally
from dalle.errors import DataError, UsageError, stopped_with
from dalle.files import check_targets, make_folder, to_json
from dalle.pictures import save_bytes
from dalle.tokenizer import Tokenizer

OWNER = "data stats"
OF_CAPTIONS = ("words_a_caption", "tokens_a_caption")
QUANTILES = {"least": 0.0, "p5": 0.05, "median": 0.5, "p95": 0.95, "most": 1.0}


@dataclass(frozen=True, kw_only=True)
class StatsConfig:
    """Writes stats.json and a histogram (PNG) of each number: picture sizes, words a caption,
    tokens a caption. The same command goes on where it was stopped.

    Attributes:
        data: whatever a training takes.
        out: a folder for stats.json and the histograms.
        tokenizer: folder of `dalle tokenizer train`, to count tokens with.
        limit: pairs that are looked at, evenly spaced; 0 takes all.
        image_size: side in pixels of shapes and emoji.
        seed: which pictures of shapes.
    """

    data: str
    out: Path
    tokenizer: Path | None = None
    limit: int = 100_000
    image_size: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise UsageError(f"{OWNER}: limit must be 0 or more, got {self.limit}")


def stats(config: StatsConfig) -> None:
    """Counts, writes and prints."""
    require_packages(OWNER, ("matplotlib",), "eval")
    tokenizer = None if config.tokenizer is None else Tokenizer.from_pretrained(config.tokenizer)
    pairs = presets.open_pairs(config.data, config.image_size, 64, config.seed)
    check_apart(OWNER, config.data, config.out)
    make_folder(config.out, OWNER)
    check_targets(OWNER, config.out / "stats.json")
    write_resolved(config, config.out / CONFIG_NAME, owner=OWNER)
    items = evenly_spaced(len(pairs), config.limit or len(pairs))
    data = of_data(pairs)
    with stopped_with(f"{OWNER}: stopped by the keyboard; {KEPT_SO_FAR}"):
        values, unreadable = _values(pairs, items, tokenizer, config.out, data)
    result: dict[str, Any] = {
        "data": data["data"],
        "captions": number_of_captions(pairs),
        "looked_at": len(items),
        "unreadable": unreadable,
        "left_out": dict(pairs.skipped),
    }
    print(f"{OWNER}: {len(pairs):,} pairs in {pairs.name}, {result['captions']:,} captions")
    if unreadable:
        print(f"{OWNER}:   {unreadable:,} of {len(items):,} pictures could not be measured")
    for name, numbers in values.items():
        if not numbers:
            continue
        result[name] = _summary(numbers)
        row = ", ".join(f"{key} {value:,.4g}" for key, value in result[name].items())
        print(f"{OWNER}:   {name.replace('_', ' ')}: {row}")
        _histogram(config.out / f"{name}.png", name, numbers)
    save_bytes(config.out / "stats.json", to_json(result), owner=OWNER)
    finish(config.out)
    print(f"{OWNER}: numbers in {config.out / 'stats.json'}, histograms beside it")


def _values(
    pairs: Pairs,
    items: np.ndarray,
    tokenizer: Tokenizer | None,
    out: Path,
    data: Mapping[str, Any],
) -> tuple[dict[str, Tally], int]:
    """Name -> the number of each picture or caption; and how many pictures have no size."""
    names = ("width", "height", "aspect_ratio", *OF_CAPTIONS, "captions_a_picture")
    values = {name: Tally() for name in names}
    pictures, unreadable = not stores_of(pairs), 0

    def look(places: range) -> list[Any]:
        """Of each item the words and the tokens of each caption, and the size of the picture; None
        where it cannot be read."""
        rows, texts = list[Any](), list[str]()
        for item in items[places.start : places.stop].tolist():
            try:
                captions = captions_of(pairs, item)
                size = picture_size(file_of(pairs, item)[0]) if pictures else None
            except DataError:
                rows.append(None)
                continue
            texts += captions
            rows.append([[len(text.split()) for text in captions], size])
        tokens = list[int]()
        if tokenizer is not None and texts:
            tokens = (tokenizer.encode(texts, 1024) != Tokenizer.PAD).sum(1).tolist()
        lengths = iter(tokens)
        return [row and [row[0], [*islice(lengths, len(row[0]))], row[1]] for row in rows]

    depends_on = {
        "pass": OWNER,
        **data,
        "limit": len(items),
        "tokenizer": None if tokenizer is None else tokenizer.fingerprint(),
    }
    for row in rows_in_blocks(OWNER, out, depends_on, len(items), look, " pairs"):
        if row is None:
            unreadable += 1
            continue
        words, tokens, size = row
        values["captions_a_picture"].add(len(words))
        for name, numbers in zip(OF_CAPTIONS, (words, tokens), strict=True):
            for number in numbers:
                values[name].add(number)
        if size is not None:
            values["width"].add(size[0])
            values["height"].add(size[1])
            values["aspect_ratio"].add(size[0] / size[1])
        unreadable += pictures and size is None
    return values, unreadable


def _summary(numbers: Tally) -> dict[str, float]:
    return {"mean": numbers.mean(), **{name: numbers.quantile(q) for name, q in QUANTILES.items()}}


def _histogram(path: Path, name: str, numbers: Tally) -> None:
    """A histogram as a PNG, whole or not at all; the highest percent is one bar."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), dpi=120, layout="constrained")
    axis = figure.add_subplot()
    values, counts = numbers.values()
    least, top = numbers.quantile(0), numbers.quantile(0.99)
    whole = bool((values == np.floor(values)).all()) and top - least <= 60
    bins: Any = np.arange(least - 0.5, top + 1.5) if whole else 50
    axis.hist(np.minimum(values, top), bins=bins, weights=counts, color="#4477aa")
    axis.set_xlabel(name.replace("_", " "))
    axis.set_ylabel("captions" if name in OF_CAPTIONS else "pictures")
    axis.set_title(f"{len(numbers):,}, median {numbers.quantile(0.5):,.4g}", fontsize=10)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    save_bytes(path, buffer.getvalue(), owner=OWNER)
