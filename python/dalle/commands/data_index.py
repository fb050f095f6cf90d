"""`dalle data index`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dalle.console import printable
from dalle.data.pairs import format_counts
from dalle.data.shard_files import find_shards, is_tar, open_shards
from dalle.errors import DataError, UsageError, stopped_with
from dalle.files import make_folder


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Writes the index of each tar shard below a folder, beside it; one that fits is kept.

    Attributes:
        data: folder of .tar files in webdataset's layout (KEY.jpg with KEY.txt or KEY.json), or one
            such file.
        out: folder for the indexes instead; DALLE_CACHE=FOLDER lets a training find them there.
        force: make all of them anew.
        show: how many problems to print.
    """

    data: Path
    out: Path | None = None
    force: bool = False
    show: int = 10


def index(config: IndexConfig) -> None:
    """Indexes the shards, and says how many pairs they hold and what is left out, and why."""
    if config.show < 0:
        raise UsageError(f"data index: show must be 0 or more, got {config.show}")
    if not config.data.is_dir() and not is_tar(config.data):
        kind = "a file" if config.data.exists() else "no such folder"
        raise DataError(
            f"data index: data must be a folder of .tar files, got {config.data}: {kind}"
        )
    paths, skipped = find_shards(config.data)
    if not paths:
        found = f" ({format_counts(skipped)})" if +skipped else ""
        raise DataError(f"data index: data must be a folder of .tar files, got none{found}")
    if config.out is not None:
        make_folder(config.out, "data index")
    with stopped_with("data index: stopped by the keyboard; the indexes that were made are kept"):
        shards, problems = open_shards(paths, out=config.out, force=config.force)
    counts = Counter(skipped)
    for shard in shards:
        counts.update(shard.head.skipped)
        counts["shard without a pair"] += not shard.head.pairs
        problems += shard.head.problems
    counts["shard is not readable"] += len(paths) - len(shards)
    pairs = sum(shard.head.pairs for shard in shards)
    size = sum(shard.index_path.stat().st_size for shard in shards)
    number = "1 shard" if len(shards) == 1 else f"{len(shards)} shards"
    print(f"{config.data}: {pairs:,} pairs in {number}, {size:,} bytes of index")
    print(f"left out: {counts.total()}")
    for reason, count in (+counts).most_common():
        print(f"  {count} x {reason}")
    for line in problems[: config.show]:
        print(f"  {printable(line)}")
    if 0 < config.show < len(problems):
        print(f"  ... and {len(problems) - config.show} more")
    if not pairs:
        raise DataError(f"data index: {config.data} must hold a usable pair, got none")
