"""`dalle data filter`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from dalle.commands import presets
from dalle.commands.report import next_command
from dalle.config_files import CONFIG_NAME, write_resolved
from dalle.console import is_main_process
from dalle.data.codes import require_pictures
from dalle.data.filters import REASONS, CaptionFilter, FilterRule, judge, picture_size
from dalle.data.kept import HEAD_FILE, ITEMS_FILE, ROWS, write_kept
from dalle.data.mixture import file_of
from dalle.data.pairs import Pairs, captions_of
from dalle.data.sources import absolute, check_apart
from dalle.errors import DataError, UsageError
from dalle.files import make_folder, read_object
from dalle.pages import command, contact, html_page, picture
from dalle.pictures import save_bytes, save_png

OWNER = "data filter"
EXAMPLES = 10  # of each reason in the report
SIDE = 160  # pixels of their longer side
PAGE = "report.html"


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
    pairs = presets.open_pairs(config.data, config.image_size, 64, config.seed)
    require_pictures(OWNER, pairs)
    begin_folder(OWNER, config.out, config)
    rows, counts, examples = [], Counter[str](), defaultdict[str, list[int]](list)
    dropped_captions = 0
    progress = tqdm(range(len(pairs)), desc=OWNER, unit=" pairs", disable=not is_main_process())
    for item in progress:
        try:
            captions = captions_of(pairs, item)
            size = picture_size(file_of(pairs, item)[0])
        except DataError:
            captions, size = [], None
        mask, reason = judge(captions, size, caption_filter) if captions else (0, REASONS[4])
        if reason:
            counts[reason] += 1
            if len(examples[reason]) < EXAMPLES:
                examples[reason].append(item)
            continue
        dropped_captions += len(captions) - min(mask.bit_count(), len(captions))
        rows.append((item, mask | (1 << 63 if len(captions) > 63 else 0)))
    kept = np.array(rows, ROWS)
    source = {"data": absolute(config.data), "image_size": config.image_size, "seed": config.seed}
    rule = {"filter": asdict(config.rule), "order": list(REASONS)}
    write_kept(OWNER, config.out, source, rule, kept, pairs, counts)
    shown = {reason: examples[reason] for reason in REASONS if examples[reason]}
    words = f"{len(kept):,} of {len(pairs):,} pairs are kept"
    write_report(config.out, pairs, words, counts, shown, asdict(config.rule))
    print(f"{OWNER}: {words}, by {config.out / HEAD_FILE}")
    for reason in REASONS:
        if counts[reason]:
            print(f"{OWNER}:   left out {counts[reason]:,}: {reason}")
    if dropped_captions:
        print(f"{OWNER}:   of the pairs that are kept, {dropped_captions:,} captions are left out")
    print(f"{OWNER}: examples of each in {config.out / PAGE}")


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
