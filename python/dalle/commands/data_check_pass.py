"""The pass of `dalle data check` over a set: counts of what it holds, and of what is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dalle.data.images import open_checked
from dalle.data.mixture import file_of
from dalle.data.pairs import Pairs, captions_of
from dalle.data.progress import rows_in_blocks
from dalle.data.tally import Distinct, Tally, hash_of
from dalle.errors import DataError
from dalle.tokenizer import Tokenizer, lower
from dalle.train.prior_recipe import PriorTrainConfig

MAX_PROBLEMS = 100  # lines that are kept
BATCH = 64  # captions that are cut into tokens at once, since each is padded to the longest


@dataclass(frozen=True, kw_only=True)
class Looking:
    """How a set is looked at.

    Attributes:
        owner: begins every line.
        out: where the pass is kept, so that it goes on after a stop; None keeps nothing.
        data: what the pass depends on (`progress.of_data`).
        pictures: whether there are any.
        decoding: whether they are decoded, or only their headers read.
        image_size: side below which a picture is small.
        show: lines on small ones.
        tokenizer: counts tokens.
    """

    owner: str
    out: Path | None
    data: Mapping[str, Any]
    pictures: bool
    decoding: bool
    image_size: int
    show: int
    tokenizer: Tokenizer | None


@dataclass
class Found:
    """What a set holds.

    Attributes:
        width, height: of the pictures.
        formats: format -> pictures.
        small: pictures with a side below `--image-size`, and lines on the first of them.
        words: of each caption.
        texts: how many captions are different.
        tokens: of each caption, without and with the BPE dropout of training.
        several: items with more than one caption.
        left_out: reason -> what is left out.
        problems: lines on the first of it.
    """

    width: Tally = field(default_factory=Tally)
    height: Tally = field(default_factory=Tally)
    formats: Counter[str] = field(default_factory=Counter)
    small: int = 0
    small_lines: list[str] = field(default_factory=list)
    words: Tally = field(default_factory=Tally)
    texts: Distinct = field(default_factory=Distinct)
    tokens: tuple[Tally, Tally] = field(default_factory=lambda: (Tally(), Tally()))
    several: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def look_at(pairs: Pairs, how: Looking) -> Found:
    """Reads every item of a set once; of what it has read it keeps counts, and a few lines."""
    found = Found(left_out=Counter(pairs.skipped))
    found.problems = list(islice(getattr(pairs, "problems", ()), MAX_PROBLEMS))
    dropout = PriorTrainConfig().bpe_dropout

    def look(items: range) -> list[Any]:
        """(reason, line) of an item that is left out; else the hash of each caption and the number
        of its words, its tokens, and [width, height, format, where it is small] of the picture."""
        rows, texts = list[Any](), list[str]()
        small = 0
        for item in items:
            try:
                captions, picture = captions_of(pairs, item), None
                if how.pictures:
                    content, where = file_of(pairs, item)
                    opened = open_checked(content, where)
                    if how.decoding:
                        pairs.load(item)
                    picture = [*opened.size, str(opened.format), ""]
                    if min(opened.size) < how.image_size and small < how.show:
                        small, picture[3] = small + 1, where
            except DataError as problem:
                rows.append([getattr(problem, "reason", "cannot be read"), str(problem)])
                continue
            texts += captions
            rows.append([[[hash_of(text), len(text.split())] for text in captions], picture])
        tokens = _tokens(texts, how.tokenizer, len(found.words), dropout)
        for row in rows:
            if not isinstance(row[0], str):
                row[0] = [[*known, *next(tokens)] for known in row[0]]
        return rows

    depends_on = {
        "pass": how.owner,
        **how.data,
        "decoding": how.decoding,
        "image_size": how.image_size,
        "show": how.show,
        "tokenizer": None if how.tokenizer is None else how.tokenizer.fingerprint(),
        "dropout": dropout,
    }
    for row in rows_in_blocks(how.owner, how.out, depends_on, len(pairs), look, " pairs"):
        _count(found, row, how)
    return found


def _count(found: Found, row: Any, how: Looking) -> None:
    if isinstance(row[0], str):
        reason, line = row
        found.left_out[reason] += 1
        # Items of a shard that has gone or is damaged share their line.
        if len(found.problems) < MAX_PROBLEMS and line not in found.problems[-1:]:
            found.problems.append(line)
        return
    captions, picture = row
    found.several += len(captions) > 1
    for value, words, *tokens in captions:
        found.texts.add_hash(value)
        found.words.add(words)
        for tally, length in zip(found.tokens, tokens, strict=False):
            tally.add(length)
    if picture is None:
        return
    width, height, kind, where = picture
    found.width.add(width)
    found.height.add(height)
    found.formats[kind] += 1
    if min(width, height) < how.image_size:
        found.small += 1
        if len(found.small_lines) < how.show:
            found.small_lines.append(f"{where}: {width} x {height}")


def _tokens(
    texts: Sequence[str], tokenizer: Tokenizer | None, first: int, dropout: float
) -> Iterator[list[int]]:
    """The tokens of each caption, uncut, without and with dropout; [] without a tokenizer."""
    for begin in range(0, len(texts), BATCH):
        part = texts[begin : begin + BATCH]
        if tokenizer is None:
            yield from ([] for _ in part)
            continue
        width = max(1, *(len(lower(text).encode()) for text in part))  # a byte is a token at most
        places = range(first + begin, first + begin + len(part))
        lengths = [
            (tokenizer.encode(part, width, dropout=share, positions=places) != Tokenizer.PAD).sum(1)
            for share in (0.0, dropout)
        ]
        yield from torch.stack(lengths, 1).tolist()
