"""`dalle data check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from dalle.commands import presets
from dalle.commands.data import contact_sheet
from dalle.commands.data_check_pass import Found, Looking, look_at
from dalle.console import printable
from dalle.data.codes import (
    HEAD_FILE,
    CodePairs,
    ShardRecord,
    check_size,
    map_shard,
    read_head,
    records_of,
    stores_of,
)
from dalle.data.folder import VERIFIED, FolderPairs
from dalle.data.pairs import Pairs, input_files
from dalle.data.progress import KEPT_SO_FAR, finish, of_data, rows_in_blocks, state_of
from dalle.data.sources import check_apart, is_picture_folder
from dalle.data.tally import Tally
from dalle.errors import DataError, UsageError, stopped_with
from dalle.files import check_not_input, check_targets, make_folder, sha256, to_json
from dalle.pictures import save_bytes, save_png
from dalle.prior.config import PRESETS
from dalle.tokenizer import Tokenizer

OWNER = "data check"
RESULT = "check.json"


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Reads a set from its first to its last picture, and says what training would find, leave out
    or cut. Of a code store it compares every shard with its checksum.

    Attributes:
        data: whatever a training takes: shapes, emoji, a folder of pictures with captions, of tar
            shards, a table, a filtered set, a code store.
        out: folder for check.json with the numbers; the same command then goes on where it was
            stopped. None is written if left out.
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
    if config.out is not None:
        check_apart(OWNER, config.data, config.out)
    stopped = stopped_with(f"{OWNER}: stopped by the keyboard; {KEPT_SO_FAR}")
    with nullcontext() if config.out is None else stopped:
        _check(config, tokenizer, plain)


def _check(config: CheckConfig, tokenizer: Tokenizer | None, plain: bool) -> None:
    pairs = (
        _opened_folder(config)
        if plain
        else presets.open_pairs(config.data, config.image_size, 64, config.seed, report=False)
    )
    stores = stores_of(pairs)
    if config.contact is not None:
        if stores:
            raise UsageError(f"{OWNER}: contact must be left out for codes, got {config.contact}")
        check_not_input(OWNER, config.contact, input_files(pairs))
    if config.out is not None:
        make_folder(config.out, OWNER)
        check_targets(OWNER, config.out / RESULT)
    # Those of a folder were decoded when it was opened.
    decoding = config.verify == "full" and not plain
    data = {} if config.out is None else of_data(pairs)
    how = Looking(
        owner=OWNER,
        out=config.out,
        data=data,
        pictures=not stores,
        decoding=decoding,
        image_size=config.image_size,
        show=config.show,
        tokenizer=tokenizer,
    )
    found = look_at(pairs, how)
    print(f"{config.data}: {len(pairs)} pairs")
    damaged = _report_codes(stores, found, config.out)
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
        if not damaged:
            result["data"] = data["data"]
        print(f"numbers: {save_bytes(config.out / RESULT, to_json(result), owner=OWNER)}")
        finish(config.out, VERIFIED, *(_of_store(number) for number in range(len(stores))))
    if damaged:
        raise DataError(
            f"{OWNER}: the shards of {config.data} must be as codes.json says, got {damaged} "
            "damaged; the same `dalle data encode` makes them anew"
        )
    if not found.words or not (found.width or stores):
        raise DataError(f"{OWNER}: {config.data} must hold a usable pair, got none")


def _opened_folder(config: CheckConfig) -> FolderPairs:
    """A folder of pictures, all verified; with `--out` that goes on where it was stopped."""
    if config.out is None or config.verify == "none":
        return FolderPairs(Path(config.data), verify=config.verify)
    make_folder(config.out, OWNER)
    try:
        return FolderPairs(Path(config.data), verify=config.verify, keep=config.out)
    except DataError:  # there is no pair, and so no result
        finish(config.out, VERIFIED)
        raise


def _of_store(number: int) -> str:
    """The name of the pass over the shards of a store."""
    return f"codes-{number}"


def _damaged(folder: Path, number: int, out: Path | None) -> list[str]:
    """A line for each shard of a store that is damaged: its bytes, its checksum, its arrays.

    Raises:
        DataError: codes.json is damaged.
    """
    head = read_head(folder)
    records = records_of(head, folder)
    grid = int(head["grid"][0]), int(head["grid"][1])

    def line_of(record: ShardRecord) -> str:
        path = folder / record.name
        try:
            check_size(path, record)
            if sha256(path) != record.sha256:
                return f"{path}: another SHA-256 than {HEAD_FILE} says"
            codes = map_shard(path, record, int(head["crops"]), grid)["codes"]
        except (DataError, OSError) as problem:
            return str(problem)
        if codes.size and not 0 <= int(codes.min()) <= int(codes.max()) < int(head["num_codes"]):
            return f"{path}: codes must be 0 .. {int(head['num_codes']) - 1}"
        return ""

    files = state_of(folder / record.name for record in records)
    depends_on = {"pass": f"{OWNER} of shards", "head": head, "files": files}
    lines = rows_in_blocks(
        OWNER,
        out,
        depends_on,
        len(records),
        lambda items: [line_of(records[item]) for item in items],
        " shards",
        name=_of_store(number),
        block=1,
    )
    return [line for line in lines if line]


def _report_codes(stores: Sequence[CodePairs], found: Found, out: Path | None) -> int:
    """Reports each store, its damaged shards by name, and returns how many these are."""
    damaged = 0
    for number, store in enumerate(stores):
        lines = _damaged(store.folder, number, out)
        shards, size = len(store.shards), sum(record.bytes for record in store.shards)
        print(
            f"codes: {store.grid[0]} x {store.grid[1]} of {store.num_codes:,}, {store.crops} of "
            f"each picture, dVAE {store.vae}"
        )
        print(f"shards: {shards}, {size:,} bytes; {shards - len(lines)} have their checksum")
        found.problems[:0] = lines
        damaged += len(lines)
    return damaged


def _report(pairs: Pairs, found: Found, show: int) -> None:
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


def _numbers(pairs: Pairs, found: Found, damaged: int) -> dict[str, Any]:
    """What check.json holds."""
    return {
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


def _range_text(label: str, values: Tally) -> str:
    low, middle, high = (int(values.quantile(q)) for q in (0, 0.5, 1))
    return f"{label}: {low} to {high}, median {middle}"


def _show(lines: Sequence[str], limit: int) -> None:
    for line in lines[:limit]:
        print(f"  {printable(line)}")
    if 0 < limit < len(lines):
        print(f"  ... and {len(lines) - limit} more")


def _report_too_small(found: Found, config: CheckConfig) -> None:
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
