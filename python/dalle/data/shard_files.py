"""Tar shards below a folder, and their indexes: found, checked, made anew.

An index stands beside its shard, as 00000.tar.index. Where that folder cannot be written it goes
into a folder for the indexes of many sets, and a line says so.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from dalle import files
from dalle.console import is_main_process, say
from dalle.data import shard_index
from dalle.data.folder import SUFFIXES, walk
from dalle.data.shard_index import Head, read_head
from dalle.errors import DataError, EnvironmentProblem

CACHE = "DALLE_CACHE"  # variable with the folder for the indexes of folders that cannot be written
CHECKED = 2000  # shards of which every byte of the indexes is checked when they are opened; those
# of larger sets are checked one by one when they are first read
THREADS_FROM = 32 << 10  # bytes of a tar a pair
COMPRESSED = (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")


class Shard(NamedTuple):
    """A tar and its index.

    Attributes:
        path: of the tar.
        index_path: of its index.
        start: offset of the columns in the index.
        head: what the index says.
    """

    path: Path
    index_path: Path
    start: int
    head: Head


def cache_folder() -> Path:
    """Where indexes go that cannot stand beside their shards: `$DALLE_CACHE`, else below
    `$XDG_CACHE_HOME` or `~/.cache`."""
    given = os.environ.get(CACHE)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(given) if given else Path(base) / "dalle-ext"


def index_in(folder: Path, shard: Path) -> Path:
    """The index of a shard in a folder for the indexes of many sets."""
    place = hashlib.blake2b(os.fsencode(files.real_path(shard)), digest_size=8).hexdigest()
    return folder / f"{shard.name}-{place}{shard_index.SUFFIX}"


def find_shards(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The tars below a folder, sorted by path, and counts of what else a reader may miss; of a tar
    in place of a folder, itself."""
    shards: list[Path] = []
    skipped: Counter[str] = Counter()
    if is_tar(folder):
        return [folder], skipped
    for entry in walk(folder):
        if isinstance(entry, str):
            skipped[entry] += 1
            continue
        parent, names = entry
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if suffix == ".tar":
                shards.append(parent / name)
            elif name.lower().endswith(COMPRESSED):
                skipped["compressed tar"] += 1
            elif suffix in SUFFIXES:
                skipped["picture beside the shards"] += 1
    return sorted(shards), skipped


def is_tar(path: Path) -> bool:
    """Whether a path has the suffix of a tar and is no folder."""
    return path.suffix.lower() == ".tar" and path.exists() and not path.is_dir()


def is_shard_folder(path: Path) -> bool:
    """Whether a folder has tars, and no pictures above or beside the first of them; or a tar."""
    if not path.is_dir():
        return is_tar(path)
    compressed = False
    for entry in walk(path):
        if isinstance(entry, str):
            continue
        suffixes = {os.path.splitext(name)[1].lower() for name in entry[1]}
        if suffixes & set(SUFFIXES):
            return False
        if ".tar" in suffixes:
            return True
        compressed = compressed or any(n.lower().endswith(COMPRESSED) for n in entry[1])
    return compressed


def find_index(shard: Path, cache: Path | None = None, *, whole: bool = True) -> Shard | str:
    """The shard with its index, from beside it or from the cache; or why there is none.

    Args:
        shard: the tar.
        cache: instead of `cache_folder()`.
        whole: whether every byte of the index is checked, or only its head.
    """
    why = "no index"
    for place in (index_beside(shard), index_in(cache or cache_folder(), shard)):
        try:
            head, start = read_head(place)
            with open(shard, "rb", buffering=0, opener=files.regular_opener) as file:
                shard_index.check_fresh(file.fileno(), head, shard)
            if whole:
                shard_index.read_columns(place, start, head, check=True)
            return Shard(shard, place, start, head)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, DataError) as problem:
            why = str(problem)
    return why


def index_beside(shard: Path) -> Path:
    """The place of a shard's index beside it."""
    return shard.with_name(shard.name + shard_index.SUFFIX)


def make_index(shard: Path, out: Path | None = None, cache: Path | None = None) -> Shard | str:
    """Reads a shard and writes its index; returns why where the shard cannot be read.

    Args:
        shard: the tar.
        out: folder for the index; beside the shard, or else in the cache, if left out.
        cache: instead of `cache_folder()`.

    Raises:
        EnvironmentProblem: neither can be written.
    """
    try:
        head, columns = shard_index.build(shard)
    except (OSError, DataError) as problem:
        reason = problem.strerror or "" if isinstance(problem, OSError) else str(problem)
        return f"{shard}: {reason}" if isinstance(problem, OSError) else reason
    places = [index_beside(shard), index_in(cache or cache_folder(), shard)]
    if out is not None:
        places = [index_in(out, shard)]
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            shard_index.write(place, head, columns)
        except OSError as problem:
            refused = problem
            continue
        return Shard(shard, place, read_head(place)[1], head)
    advice = f"; {CACHE}=DIR names another folder" if out is None else ""
    raise EnvironmentProblem(
        f"data index: {places[-1]} must be writable, got {refused.strerror or refused}{advice}"
    )


def open_shards(
    paths: Sequence[Path],
    *,
    out: Path | None = None,
    cache: Path | None = None,
    force: bool = False,
) -> tuple[list[Shard], list[str]]:
    """The shards with their indexes, and lines on those that cannot be read.

    Indexes that are missing, or are not of their tar as it is now, are made, several at a time; a
    line says so.

    Args:
        paths: of the tars.
        out: as for `make_index`.
        cache: as for `make_index`.
        force: makes all of them anew.

    Raises:
        EnvironmentProblem: an index cannot be written anywhere.
    """
    where = out if out is not None else cache
    found: dict[Path, Shard | str] = {
        path: "no index" if force else find_index(path, where, whole=len(paths) <= CHECKED)
        for path in paths
    }
    missing = [path for path, shard in found.items() if isinstance(shard, str)]
    if missing:
        began = time.perf_counter()
        stale = [str(found[path]) for path in missing if found[path] != "no index"]
        begin = process_turn(len(missing))
        missing = missing[begin:] + missing[:begin]

        def build(path: Path) -> Shard | str:
            made = found[path] if force else find_index(path, where)  # by another process by now?
            return made if isinstance(made, Shard) else make_index(path, out, cache)

        bar = tqdm(total=len(missing), desc="index", disable=None if is_main_process() else True)
        with bar:
            for path, made in zip(missing, _built(missing, build), strict=True):
                found[path] = made
                bar.update()
        made_now = [found[path] for path in missing]
        _say_made(made_now, time.perf_counter() - began, stale, chosen=out is not None)
    shards = [shard for shard in found.values() if isinstance(shard, Shard)]
    return shards, [shard for shard in found.values() if isinstance(shard, str)]


def process_turn(count: int) -> int:
    """Where this process begins among `count` things that each process would do: `torchrun`'s
    begin at different ones, and find those of the others done when they come to them."""
    rank, world = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if not (rank.isdigit() and world.isdigit() and int(rank) < int(world)):
        return 0
    return int(rank) * count // int(world)


def _built(paths: Sequence[Path], build: Callable[[Path], Shard | str]) -> Iterator[Shard | str]:
    """The new indexes, several at a time where reading and hashing, which threads share out, take
    longer than the interpreter, which they do not."""
    first = build(paths[0])
    yield first
    of_pair = first.head.tar_bytes / max(1, first.head.pairs) if isinstance(first, Shard) else 0
    if of_pair < THREADS_FROM:
        yield from map(build, paths[1:])
        return
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(build, paths[1:])


def _say_made(
    made: Sequence[Shard | str], seconds: float, stale: Sequence[str], *, chosen: bool
) -> None:
    """A line on new indexes: how many, why those that were there were not taken, where they are;
    `chosen` is whether that place was asked for."""
    shards = [shard for shard in made if isinstance(shard, Shard)]
    pairs = sum(shard.head.pairs for shard in shards)
    if not pairs:  # which is an error of its own
        return
    number = "1 shard" if len(shards) == 1 else f"{len(shards)} shards"
    folders = sorted({str(shard.index_path.parent) for shard in shards})
    more = f" and {len(folders) - 1} more folders" if len(folders) > 1 else ""
    apart = any(shard.index_path.parent != shard.path.parent for shard in shards)
    why = f" (beside the shards they cannot be; {CACHE} names another folder)" if apart else ""
    if chosen:
        why = f" ({CACHE}={folders[0]} lets a training find them)"
    anew = f" ({len(stale)} anew: {stale[0]})" if stale else ""
    say(
        f"data: indexed {number} of {pairs:,} pairs in {seconds:.1f} s{anew}; "
        f"the indexes are in {folders[0]}{more}{why}"
    )
