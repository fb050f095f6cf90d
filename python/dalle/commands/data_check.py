"""`dalle data check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

from PIL import Image
from tqdm import tqdm

from dalle.commands import presets
from dalle.commands.data import contact_sheet
from dalle.console import is_main_process, printable
from dalle.data.codes import (
    HEAD_FILE,
    CodePairs,
    check_size,
    map_shard,
    read_head,
    records_of,
    stores_of,
)
from dalle.data.folder import FolderPairs
from dalle.data.images import open_checked
from dalle.data.mixture import file_of
from dalle.data.pairs import Pairs, captions_of, describe_pairs, input_files
from dalle.data.sources import check_apart, is_picture_folder
from dalle.data.tally import Distinct, Tally
from dalle.errors import DataError, UsageError
from dalle.files import check_not_input, check_targets, make_folder, sha256, to_json
from dalle.pictures import save_bytes, save_png
from dalle.prior.config import PRESETS
from dalle.tokenizer import Tokenizer, lower
from dalle.train.prior_recipe import PriorTrainConfig

OWNER = "data check"
RESULT = "check.json"
MAX_PROBLEMS = 100  # lines that are kept
BATCH = 64  # captions that are cut into tokens at once, since each is padded to the longest


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Reads a set from its first to its last picture, and says what training would find, leave out
    or cut. Of a code store it compares every shard with its checksum.

    Attributes:
        data: whatever a training takes: shapes, emoji, a folder of pictures with captions, of tar
            shards, a table, a filtered set, a code store.
        out: folder for check.json with the numbers; none is written if left out.
        verify: full decodes every picture, header only opens it; none trusts the suffixes of a
            folder.
        contact: where to write a contact sheet of the first pictures (PNG).
        show: how many problems of a kind to print.
        image_size: side in pixels that is to be trained with; says what is smaller. Of shapes and
            emoji, the side.
        tokenizer: folder of `dalle tokenizer train` (run/tokenizer); says which captions are
            longer than the prior.
        text_len: text positions of that prior; 0 stands for those of each preset.
        seed: which pictures of shapes.
    """

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"folder": "data"}

    data: str
    out: Path | None = None
    image_size: int = 0
    tokenizer: Path | None = None
    text_len: int = 0
    verify: Literal["full", "header", "none"] = "full"
    contact: Path | None = None
    show: int = 10
    seed: int = 0


@dataclass
class _Found:
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


def check(config: CheckConfig) -> None:
    """Counts pairs, sizes, caption lengths, and what is left out or cut, and why.

    Raises:
        DataError: nothing in the set can be used, or a shard of codes is damaged.
    """
    for name in ("image_size", "show", "text_len", "seed"):
        if getattr(config, name) < 0:
            value = getattr(config, name)
            raise UsageError(f"{OWNER}: {name} must be 0 or more, got {value}")
    if config.contact is not None:
        check_targets(OWNER, config.contact)
    tokenizer = None if config.tokenizer is None else Tokenizer.from_pretrained(config.tokenizer)
    if config.text_len == 1:
        raise UsageError(f"{OWNER}: text_len must be 0, or at least 2, got 1")
    plain = is_picture_folder(config.data)
    pairs = (
        FolderPairs(Path(config.data), verify=config.verify)
        if plain
        else presets.open_pairs(config.data, config.image_size, 64, config.seed, report=False)
    )
    stores = stores_of(pairs)
    if config.contact is not None:
        if stores:
            raise UsageError(f"{OWNER}: contact must be left out for codes, got {config.contact}")
        check_not_input(OWNER, config.contact, input_files(pairs))
    if config.out is not None:
        check_apart(OWNER, config.data, config.out)
        make_folder(config.out, OWNER)
        check_targets(OWNER, config.out / RESULT)
    # Those of a folder were decoded when it was opened.
    decoding = config.verify == "full" and not plain
    found = _look(pairs, config, tokenizer, decoding=decoding, pictures=not stores)
    print(f"{config.data}: {len(pairs)} pairs")
    damaged = _report_codes(stores, found)
    _report(pairs, found, config.show)
    if config.image_size and not stores:
        _report_too_small(found, config)
    if tokenizer is not None and found.words:
        _report_too_long(found.tokens, config.text_len)
    if config.contact is not None:
        print(
            f"contact sheet: {save_png(config.contact, contact_sheet(pairs, 64, 96), owner=OWNER)}"
        )
    if config.out is not None:
        result = _numbers(pairs, found, damaged)
        print(f"numbers: {save_bytes(config.out / RESULT, to_json(result), owner=OWNER)}")
    if damaged:
        raise DataError(
            f"{OWNER}: the shards of {config.data} must be as codes.json says, got {damaged} "
            "damaged; the same `dalle data encode` makes them anew"
        )
    if not found.words or not (found.width or stores):
        raise DataError(f"{OWNER}: {config.data} must hold a usable pair, got none")


def _look(
    pairs: Pairs,
    config: CheckConfig,
    tokenizer: Tokenizer | None,
    *,
    decoding: bool,
    pictures: bool,
) -> _Found:
    """Reads every item of a set once; of what it has read it keeps counts, and a few lines."""
    texts: list[str] = []
    found = _Found(left_out=Counter(pairs.skipped))
    found.problems = list(islice(getattr(pairs, "problems", ()), MAX_PROBLEMS))
    progress = tqdm(range(len(pairs)), OWNER, unit=" pairs", disable=not is_main_process())
    for item in progress if decoding else range(len(pairs)):
        try:
            captions = captions_of(pairs, item)
            if pictures:
                content, where = file_of(pairs, item)
                picture = open_checked(content, where)
                if decoding:
                    pairs.load(item)
                _count_picture(found, picture, where, config)
        except DataError as problem:
            found.left_out[getattr(problem, "reason", "cannot be read")] += 1
            # Items of a shard that has gone or is damaged share their line.
            if len(found.problems) < MAX_PROBLEMS and str(problem) not in found.problems[-1:]:
                found.problems.append(str(problem))
            continue
        found.several += len(captions) > 1
        for text in captions:
            found.words.add(len(text.split()))
            found.texts.add(text)
            texts.append(text)
            if len(texts) == BATCH:
                _count_tokens(found, texts, tokenizer)
    _count_tokens(found, texts, tokenizer)
    return found


def _count_picture(found: _Found, picture: Image.Image, where: str, config: CheckConfig) -> None:
    width, height = picture.size
    found.width.add(width)
    found.height.add(height)
    found.formats[str(picture.format)] += 1
    if min(width, height) < config.image_size:
        found.small += 1
        if len(found.small_lines) < config.show:
            found.small_lines.append(f"{where}: {width} x {height}")


def _count_tokens(found: _Found, texts: list[str], tokenizer: Tokenizer | None) -> None:
    """Counts the tokens of captions, uncut, without and with dropout; `texts` is then empty."""
    if tokenizer is not None and texts:
        width = max(len(lower(text).encode()) for text in texts)  # a byte is a token at most
        first = len(found.tokens[0])
        places = range(first, first + len(texts))
        for tally, dropout in zip(found.tokens, (0.0, PriorTrainConfig().bpe_dropout), strict=True):
            ids = tokenizer.encode(texts, max(width, 1), dropout=dropout, positions=places)
            for length in (ids != Tokenizer.PAD).sum(1).tolist():
                tally.add(length)
    texts.clear()


def _damaged(folder: Path) -> list[str]:
    """A line for each shard of a store that is damaged: its bytes, its checksum, its arrays.

    Raises:
        DataError: codes.json is damaged.
    """
    head, lines = read_head(folder), []
    grid = int(head["grid"][0]), int(head["grid"][1])
    for record in records_of(head, folder):
        path = folder / record.name
        try:
            check_size(path, record)
            if sha256(path) != record.sha256:
                lines.append(f"{path}: another SHA-256 than {HEAD_FILE} says")
                continue
            codes = map_shard(path, record, int(head["crops"]), grid)["codes"]
        except (DataError, OSError) as problem:
            lines.append(str(problem))
            continue
        if codes.size and not 0 <= int(codes.min()) <= int(codes.max()) < int(head["num_codes"]):
            lines.append(f"{path}: codes must be 0 .. {int(head['num_codes']) - 1}")
    return lines


def _report_codes(stores: Sequence[CodePairs], found: _Found) -> int:
    """Reports each store, its damaged shards by name, and returns how many these are."""
    damaged = 0
    for store in stores:
        lines = _damaged(store.folder)
        shards, size = len(store.shards), sum(record.bytes for record in store.shards)
        print(
            f"codes: {store.grid[0]} x {store.grid[1]} of {store.num_codes:,}, {store.crops} of "
            f"each picture, dVAE {store.vae}"
        )
        print(f"shards: {shards}, {size:,} bytes; {shards - len(lines)} have their checksum")
        found.problems[:0] = lines
        damaged += len(lines)
    return damaged


def _report(pairs: Pairs, found: _Found, show: int) -> None:
    if found.formats:
        print("formats: " + ", ".join(f"{name} {n}" for name, n in found.formats.most_common()))
    if found.width:
        print(_range_text("width", found.width) + " pixels")
        print(_range_text("height", found.height) + " pixels")
    if found.words:
        print(_range_text("caption", found.words) + " words")
        about = "" if found.texts.exact else "about "
        print(f"different captions: {about}{found.texts.count()}")
    if found.several:
        print(
            f"files of several captions: {found.several}, {len(found.words)} captions in all;"
            " training draws one of a picture's each time"
        )
    print(f"left out: {found.left_out.total()}")
    for reason, count in found.left_out.most_common():
        print(f"  {count} x {reason}")
    _show(found.problems, show)


def _numbers(pairs: Pairs, found: _Found, damaged: int) -> dict[str, Any]:
    """What check.json holds."""
    result: dict[str, Any] = {
        "pairs": len(pairs),
        "usable": len(pairs) - (found.left_out - Counter(pairs.skipped)).total(),
        "captions": len(found.words),
        "different_captions": found.texts.count(),
        "different_captions_exact": found.texts.exact,
        "several": found.several,
        "formats": dict(found.formats),
        "left_out": dict(found.left_out),
        "damaged_shards": damaged,
        "problems": found.problems,
    }
    if not damaged:
        result["data"] = describe_pairs(pairs)
    return result


def _range_text(label: str, values: Tally) -> str:
    low, middle, high = (int(values.quantile(q)) for q in (0, 0.5, 1))
    return f"{label}: {low} to {high}, median {middle}"


def _show(lines: Sequence[str], limit: int) -> None:
    for line in lines[:limit]:
        print(f"  {printable(line)}")
    if 0 < limit < len(lines):
        print(f"  ... and {len(lines) - limit} more")


def _report_too_small(found: _Found, config: CheckConfig) -> None:
    """Reports the pictures that the paper's crops refuse."""
    note = "`dalle dvae train` and `prior train` leave them out; the ranker and augment none do not"
    print(
        f"smaller than {config.image_size} pixels: {found.small} of {len(found.width)} pictures"
        + (f" ({note})" if found.small else "")
    )
    _show(found.small_lines, config.show)
    if 0 < config.show < found.small:
        print(f"  ... and {found.small - config.show} more")


def _report_too_long(tokens: tuple[Tally, Tally], text_len: int) -> None:
    """Reports how many captions are cut, without and with the BPE dropout of training."""
    presets_by_len: dict[int, list[str]] = {}
    for name, preset in PRESETS.items():
        presets_by_len.setdefault(text_len or preset.text_len, []).append(name)
    print(_range_text("tokens", tokens[0]) + " a caption")
    for slots, names in presets_by_len.items():
        cut, cut_with_dropout = (tally.above(slots - 1) for tally in tokens)
        label = "this prior" if text_len else f"presets {', '.join(names)}"
        print(
            f"cut at {slots - 1} tokens ({label}): {cut} of {len(tokens[0])} captions, "
            f"{cut_with_dropout} with the BPE dropout of training"
        )
