"""`dalle data filter`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dalle.commands import presets
from dalle.commands.report import next_command
from dalle.config_files import CONFIG_NAME, write_resolved
from dalle.data.codes import require_pictures
from dalle.data.filters import REASONS, CaptionFilter, FilterRule, judge, picture_size
from dalle.data.kept import HEAD_FILE, ITEMS_FILE, ROWS, write_kept
from dalle.data.mixture import file_of
from dalle.data.pairs import Pairs, captions_of
from dalle.data.progress import KEPT_SO_FAR, finish, in_blocks, of_data
from dalle.data.sources import absolute, check_apart
from dalle.errors import DataError, UsageError, stopped_with
from dalle.files import make_folder, read_object
from dalle.pages import command, contact, html_page, picture
from dalle.pictures import save_bytes, save_png

OWNER = "data filter"
EXAMPLES = 10  # of each reason in the report
DRAWN_SIDE = 64  # pixels of a built-in set where nothing is said
SIDE = 160  # pixels of their longer side
PAGE = "report.html"
# What is known of a pair: which captions are kept, as bits; 0, or 1 + the place of the reason in
# `REASONS`; how many captions of a pair that is kept are left out.
JUDGED = np.dtype([("captions", "<u8"), ("reason", "u1"), ("dropped", "<u4")])


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Keeps the pairs that the paper's filters keep; `dalle prior train --data OUT` trains on them.

    Nothing is copied: OUT holds which pairs of the set are kept, by which rule, and report.html
    with the count and ten examples of each reason.

    Attributes:
        data: a folder of pictures with captions, of tar shards, a table, shapes or emoji.
        out: a folder for the result.
        image_size: side in pixels of shapes and emoji.
        seed: which pictures of shapes.
        rule: what is kept.
    """

    data: str
    out: Path
    image_size: int = 0
    seed: int = 0
    rule: FilterRule = field(default_factory=FilterRule)


def filter_pairs(config: FilterConfig) -> None:
    """Judges every pair, writes what is kept and the report."""
    caption_filter = CaptionFilter(config.rule)
    pairs = presets.open_pairs(config.data, config.image_size, DRAWN_SIDE, config.seed)
    require_pictures(OWNER, pairs)
    begin_folder(OWNER, config.out, config)

    def judged(items: range) -> np.ndarray:
        found = [_judge(pairs, item, caption_filter) for item in items]
        return np.array(found, JUDGED)

    depends_on = {"pass": OWNER, **of_data(pairs), "rule": asdict(config.rule)}
    with stopped_with(f"{OWNER}: stopped by the keyboard; {KEPT_SO_FAR}"):
        found = in_blocks(OWNER, config.out, depends_on, len(pairs), JUDGED, judged, unit=" pairs")
    chosen = np.flatnonzero(found["reason"] == 0)
    kept = np.empty(len(chosen), ROWS)
    kept["item"], kept["captions"] = chosen, found["captions"][chosen]
    dropped_captions = int(found["dropped"].sum())
    places = {
        reason: np.flatnonzero(found["reason"] == number)
        for number, reason in enumerate(REASONS, 1)
    }
    counts = Counter({reason: len(items) for reason, items in places.items() if len(items)})
    examples = {reason: items[:EXAMPLES].tolist() for reason, items in places.items()}
    size = presets.size_of_sets(config.data, config.image_size, DRAWN_SIDE)
    source = {"data": absolute(config.data), "image_size": size, "seed": config.seed}
    rule = {"filter": asdict(config.rule), "order": list(REASONS)}
    write_kept(OWNER, config.out, source, rule, kept, pairs, counts)
    shown = {reason: examples[reason] for reason in REASONS if examples[reason]}
    words = f"{len(kept):,} of {len(pairs):,} pairs are kept"
    write_report(config.out, pairs, words, counts, shown, asdict(config.rule))
    finish(config.out)
    print(f"{OWNER}: {words}, by {config.out / HEAD_FILE}")
    for reason in REASONS:
        if counts[reason]:
            print(f"{OWNER}:   left out {counts[reason]:,}: {reason}")
    if dropped_captions:
        print(f"{OWNER}:   of the pairs that are kept, {dropped_captions:,} captions are left out")
    print(f"{OWNER}: examples of each in {config.out / PAGE}")


def _judge(pairs: Pairs, item: int, caption_filter: CaptionFilter) -> tuple[int, int, int]:
    """A record of `JUDGED` for a pair."""
    try:
        captions = captions_of(pairs, item)
        size = picture_size(file_of(pairs, item)[0])
    except DataError:
        captions, size = [], None
    mask, reason = judge(captions, size, caption_filter) if captions else (0, REASONS[4])
    if reason:
        return 0, 1 + REASONS.index(reason), 0
    dropped = len(captions) - min(mask.bit_count(), len(captions))
    return mask | (1 << 63 if len(captions) > 63 else 0), 0, dropped


def begin_folder(owner: str, out: Path, config: Any) -> None:
    """Makes OUT, or takes one of an earlier result of the same set; writes the options there.

    Raises:
        UsageError: it is the set itself, or holds something else.
    """
    check_apart(owner, config.data, out)
    make_folder(out, owner)
    known = {HEAD_FILE, ITEMS_FILE, PAGE, "examples", CONFIG_NAME}
    others = sorted({p.name for p in out.iterdir() if p.name[0] != "."} - known)
    if (out / HEAD_FILE).exists():
        before = read_object(out / HEAD_FILE, DataError).get("source")
        # A set that this one is made of must not be replaced by what is made of it.
        if not isinstance(before, dict) or before.get("data") != absolute(config.data):
            others.append(f"{HEAD_FILE} of another set")
    if others:
        raise UsageError(f"{owner}: out must be a new or empty folder, got {others[0]} in it")
    write_resolved(config, out / CONFIG_NAME, owner=owner)


def thumbnail(pairs: Pairs, item: int) -> Image.Image:
    """A small picture of an item; a grey one where it does not decode."""
    try:
        image = Image.fromarray(pairs.load(item))
    except DataError:
        return Image.new("RGB", (SIDE, SIDE), (200, 200, 200))
    image.thumbnail((SIDE, SIDE))
    return image


def write_report(
    out: Path,
    pairs: Pairs,
    words: str,
    counts: Mapping[str, int],
    examples: Mapping[str, Sequence[int]],
    rule: Mapping[str, object],
) -> None:
    """OUT/report.html: the rule, the counts, and examples of each reason with their captions.

    Args:
        out: the folder.
        pairs: the set.
        words: what is kept.
        counts: reason -> pairs left out.
        examples: reason -> items.
        rule: option -> value.
    """
    rows = [(reason, f"{count:,}") for reason, count in counts.items() if count]
    parts = [f"<p>{escape(words)}.</p>", _table("Left out", rows)]
    for number, (reason, items) in enumerate(examples.items()):
        tiles = []
        for k, item in enumerate(items):
            name = f"examples/{number}-{k}.png"
            save_png(out / name, thumbnail(pairs, item), owner=OWNER)
            try:
                below = " / ".join(captions_of(pairs, item))
            except DataError:
                below = "(no caption)"
            tiles.append(picture(name, f"picture {item}", f"{item}: {below[:300]}"))
        parts += [f"<h2>{escape(reason)}: {counts[reason]:,}</h2>", contact(tiles, 1)]
    parts.append(_table("The rule", [(name, str(value)) for name, value in rule.items()]))
    parts.append(command(next_command(str(out), "tiny", out.parent)))
    save_bytes(out / PAGE, html_page(f"What is kept of {pairs.name}", parts), owner=OWNER)


def _table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in rows)
    return f"<h2>{escape(title)}</h2><table>{cells}</table>"
