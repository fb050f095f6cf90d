"""`dalle data pack`."""

from __future__ import annotations

import io
import json
import os
import shlex
import tarfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from dalle.commands import presets
from dalle.config_files import CONFIG_NAME
from dalle.console import is_main_process, printable
from dalle.data.codes import require_pictures
from dalle.data.images import decode
from dalle.data.mixture import file_of, say_weights_stay_behind
from dalle.data.pairs import Pairs, captions_of, describe_pairs, format_counts, leave_out
from dalle.data.shard_files import open_shards
from dalle.data.shard_index import SUFFIX as INDEX_SUFFIX
from dalle.data.sources import check_apart
from dalle.data.texts import MAX_CAPTION_BYTES
from dalle.errors import DataError, UsageError, stopped_with
from dalle.files import (
    make_folder,
    read_object,
    regular_opener,
    remove_temporary,
    saving,
    sync_folder,
    temporary_name,
    to_json,
    write_atomic,
)

OWNER = "data pack"
HEAD_FILE = "pack.json"
FORMATS = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Writes pairs into tar shards with indexes: OUT/00000.tar and so on, which `--data OUT` reads.
    The same set gives the same bytes; the same command goes on where it was stopped.

    Attributes:
        data: shapes, emoji, a folder of pictures with captions, of tar shards, or a table.
        out: a new folder for the shards.
        shard_size: pairs a shard.
        image_size: side in pixels of shapes and emoji; others keep their files as they are.
        verify: full leaves out pictures that do not decode; none packs them as they are, so that a
            training draws and leaves out the same ones as from the set itself.
        seed: which pictures of shapes.
    """

    data: str
    out: Path
    shard_size: int = 10_000
    image_size: int = 0
    verify: Literal["none", "full"] = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("shard_size", 1), ("image_size", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(
                    f"{OWNER}: {name} must be at least {least}, got {getattr(self, name)}"
                )


def pack(config: PackConfig) -> None:
    """Writes the shards that are not there yet, and says how large they are."""
    pairs = presets.open_pairs(config.data, config.image_size, 64, config.seed)
    require_pictures(OWNER, pairs)
    check_apart(OWNER, config.data, config.out)
    say_weights_stay_behind(OWNER, pairs)
    make_folder(config.out, OWNER)
    head = {"data": describe_pairs(pairs), "shard_size": config.shard_size, "verify": config.verify}
    _begin(config.out, head)
    kept = f"whole shards are kept in {config.out}, and the same command goes on"
    with stopped_with(f"{OWNER}: stopped by the keyboard; {kept}"):
        _pack(config, pairs, head)


def _pack(config: PackConfig, pairs: Pairs, head: dict[str, Any]) -> None:
    counts, sizes, skipped = list[int](), list[int](), Counter[str]()
    count = -(-len(pairs) // config.shard_size)
    with tqdm(total=len(pairs), desc=OWNER, unit=" pairs", disable=not is_main_process()) as bar:
        for number in range(count):
            items = range(
                number * config.shard_size, min(len(pairs), (number + 1) * config.shard_size)
            )
            record = _finished(config.out, number)
            if record is None:
                record = _write(config, pairs, number, items, bar)
            else:
                bar.update(len(items))
            counts.append(record["pairs"])
            sizes.append(record["bytes"])
            skipped.update(record["skipped"])
    paths = [_shard(config.out, number) for number in range(count)]
    open_shards(paths)
    for number in range(count):
        _record(config.out, number).unlink(missing_ok=True)
    finished = {**head, "pairs": counts, "bytes": sizes, "finished": True}
    with saving(OWNER, config.out / HEAD_FILE):
        write_atomic(config.out / HEAD_FILE, to_json(finished))
        remove_temporary(config.out)
    size = sum(sizes)
    indexes = sum(path.with_name(path.name + INDEX_SUFFIX).stat().st_size for path in paths)
    why = f"; left out {skipped.total()}: {format_counts(skipped)}" if skipped else ""
    shards = "1 shard" if count == 1 else f"{count} shards"
    print(
        f"{OWNER}: {sum(counts):,} pairs in {shards} of {size:,} bytes, with {indexes:,} of index, "
        f"in {config.out}{why}"
    )
    if not sum(counts):
        raise DataError(f"{OWNER}: {config.data} must hold a picture that can be packed, got none")
    then = ["dalle", "data", "stats", "--data", str(config.out), "--out", f"{config.out}-stats"]
    print(printable(f"{OWNER}: next: {shlex.join(then)}"))


def _shard(out: Path, number: int) -> Path:
    return out / f"{number:05d}.tar"


def _record(out: Path, number: int) -> Path:
    return out / f"{number:05d}.json"


def _begin(out: Path, head: dict[str, Any]) -> None:
    """Writes what is packed and how; refuses a folder with something else in it.

    Raises:
        UsageError: another set or other options were packed there, or it holds other files.
    """
    path = out / HEAD_FILE
    if path.exists():
        with saving(OWNER, out):
            remove_temporary(out)
        there = read_object(path, DataError)
        for key in head:
            if there.get(key) != json.loads(to_json(head[key])):
                raise UsageError(
                    f"{OWNER}: out must hold shards of this data and these options, got another "
                    f"{key}; take another folder"
                )
        return
    others = [name for name in os.listdir(out) if name != CONFIG_NAME and name[0] != "."]
    if others:
        raise UsageError(f"{OWNER}: out must be a new or empty folder, got {others[0]} in it")
    with saving(OWNER, path):
        write_atomic(path, to_json(head))


def _finished(out: Path, number: int) -> dict[str, Any] | None:
    """What a shard holds that is there, whole; None for one that is to be written."""
    with suppress(DataError, OSError, KeyError, TypeError, IndexError):
        record: dict[str, Any] | None = None
        head = read_object(out / HEAD_FILE, DataError)
        if head.get("finished"):
            pairs, size = head["pairs"][number], head["bytes"][number]
            record = {"pairs": pairs, "bytes": size, "skipped": {}}
        else:
            record = read_object(_record(out, number), DataError)
        if _shard(out, number).stat().st_size == record["bytes"]:
            return record
    return None


def _write(
    config: PackConfig, pairs: Pairs, number: int, items: range, bar: tqdm[Any]
) -> dict[str, Any]:
    """One shard, whole or not at all, and its record."""
    path, skipped, packed = _shard(config.out, number), Counter[str](), 0
    temporary = temporary_name(path)
    with saving(OWNER, path):
        try:
            with (
                open(temporary, "wb", opener=regular_opener) as file,
                tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
            ):
                for item in items:
                    try:
                        _add(tar, pairs, item, config.verify)
                        packed += 1
                    except DataError as problem:
                        skipped[getattr(problem, "reason", "does not decode")] += 1
                        leave_out(pairs, item, problem)
                    bar.update(1)
                tar.close()
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(config.out)
        record = {"pairs": packed, "bytes": path.stat().st_size, "skipped": dict(skipped)}
        write_atomic(_record(config.out, number), to_json(record))
    return record


def _add(tar: tarfile.TarFile, pairs: Pairs, item: int, verify: str) -> None:
    """A picture and its captions, as NUMBER.jpg (or .png, .webp) and NUMBER.txt (or .json)."""
    content, where = file_of(pairs, item)
    if verify == "full":
        decode(content, where)
    suffix = next((name for magic, name in FORMATS.items() if content.startswith(magic)), "png")
    captions = captions_of(pairs, item)
    text, text_suffix = "\n".join(captions).encode("utf-8", "surrogatepass"), "txt"
    if len(text) > MAX_CAPTION_BYTES:
        text, text_suffix = to_json({"caption": list(captions)}), "json"
    for name, data in ((f"{item:09d}.{suffix}", content), (f"{item:09d}.{text_suffix}", text)):
        info = tarfile.TarInfo(name)  # the same bytes at any time, for any user
        info.size, info.mode = len(data), 0o644
        tar.addfile(info, io.BytesIO(data))
