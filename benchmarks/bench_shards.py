"""Tar shards: the first index, opening a million pairs, and pictures a second beside webdataset.

    python -m benchmarks.bench_shards FOLDER --record

writes a million tiny pairs in 100 shards into FOLDER (2.6 GB, kept for the next run) and measures:

- the first index, a shard at a time, by wall clock;
- opening the folder with its indexes, in a process of its own: seconds, and how much more memory;
- pictures of 256 x 256 read, decoded and cropped to 128 a second, on one core: ours in random
  order beside the same plain files, and beside webdataset in the shard's order where it is
  installed (`pip install webdataset`). Ours must have the plain files' pixels.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dalle.data.augment import center_crop
from dalle.data.folder import FolderPairs
from dalle.data.images import decode
from dalle.data.shard_files import index_beside, make_index
from dalle.data.shards import ShardPairs

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for `python -m`
import harness  # noqa: E402

OPEN = """
import json, resource, sys, time
from dalle.data.shards import ShardPairs
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, begin = peak(), time.perf_counter()
pairs = ShardPairs(sys.argv[1])
seconds = time.perf_counter() - begin
pairs.captions[len(pairs) - 1], pairs.load(0)
print(json.dumps({"pairs": len(pairs), "seconds": seconds, "megabytes": peak() - before}))
"""


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """A file into a tar."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def jpeg(pixels: np.ndarray) -> bytes:
    """A picture's file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def tiny_shards(folder: Path, shards: int, pairs: int) -> None:
    """Shards of tiny pairs, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    content = jpeg(np.zeros((16, 16, 3), np.uint8))
    for shard in range(shards):
        path = folder / f"{shard:05d}.tar"
        if path.exists():
            continue
        scratch = path.with_suffix(".part")
        with tarfile.open(scratch, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(shard * pairs, (shard + 1) * pairs):
                add(tar, f"{number:09d}.jpg", content)
                add(tar, f"{number:09d}.txt", b"a caption with number %d" % number)
        scratch.rename(path)


def photos(folder: Path, count: int) -> tuple[Path, Path]:
    """`count` pictures of 256 x 256 as plain files and in one shard."""
    plain, shards = folder / "plain", folder / "shards"
    if not (shards / "00000.tar").exists():
        rng = np.random.default_rng(0)
        for made in (plain, shards):
            made.mkdir(parents=True, exist_ok=True)
        with tarfile.open(shards / "00000.part", "w") as tar:
            for number in range(count):
                coarse = rng.integers(0, 256, (24, 24, 3), np.uint8)
                grown = Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC)
                for suffix, content in ((".jpg", jpeg(np.asarray(grown))), (".txt", b"a photo")):
                    (plain / f"{number:06d}{suffix}").write_bytes(content)
                    add(tar, f"{number:06d}{suffix}", content)
        (shards / "00000.part").rename(shards / "00000.tar")
    return plain, shards


def first_index(folder: Path) -> dict[str, Any]:
    """Seconds for the index of each of ten shards, which is made anew."""
    seconds, cpu, pairs = [], [], 0
    for path in sorted(folder.glob("*.tar"))[:10]:
        index_beside(path).unlink(missing_ok=True)
        begin, work = time.perf_counter(), time.process_time()
        made = make_index(path)
        seconds.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - work)
        assert not isinstance(made, str), made
        pairs = made.head.pairs
    middle, work = statistics.median(seconds), statistics.median(cpu)
    found = {"pairs": pairs, "seconds": middle, "cpu_seconds": work}
    return found | {"pairs_per_second": pairs / middle, "pairs_per_cpu_second": pairs / work}


def throughput(plain: Path, shards: Path, count: int) -> list[harness.Row]:
    """Pictures read, decoded and cropped, `count` a call."""
    files, ours = FolderPairs(plain, verify="none"), ShardPairs(shards)
    order = np.random.default_rng(1).permutation(len(ours))[:count].tolist()

    def cropped(pairs: Any) -> list[np.ndarray]:
        return [center_crop(pairs.load(i), 128) for i in order]

    same = all((a == b).all() for a, b in zip(cropped(ours), cropped(files), strict=True))
    assert same, "the shards must hold the pixels of the plain files"
    rivals: dict[str, Callable[[], Any]] = {"plain files": lambda: cropped(files)}
    try:
        import webdataset
    except ImportError:
        print("webdataset is not installed: it is not measured")
    else:

        def stream() -> list[np.ndarray]:
            data = webdataset.WebDataset(str(shards / "00000.tar"), shardshuffle=False)
            found = []
            for sample in data:
                found.append(center_crop(decode(sample["jpg"], sample["__key__"]), 128))
                if len(found) == count:
                    break
            return found

        rivals["webdataset, in order"] = stream
    what = f"{count} pictures of 256 x 256 read, decoded, cropped to 128, one core"
    return harness.compare(what, lambda: cropped(ours), rivals, work=count, unit="pictures/s")


def main() -> None:
    """Prints the figures, and writes results/<date>_shards.json with --record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=10_000, help="in a shard")
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--record", action="store_true")
    words = parser.parse_args()
    tiny = words.folder / "tiny"
    tiny_shards(tiny, words.shards, words.pairs)
    index = first_index(tiny)
    rates = [f"{index[f'pairs_per_{name}']:,.0f}" for name in ("second", "cpu_second")]
    print(f"first index: {rates[0]} pairs/s by the wall clock, {rates[1]} of CPU time")
    ShardPairs(tiny)  # the other indexes
    run = [sys.executable, "-c", OPEN, str(tiny)]
    opened = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    print("open: {pairs:,} pairs in {seconds:.3f} s, {megabytes:.0f} MB more".format(**opened))
    rows = throughput(*photos(words.folder / "photos", words.pictures), words.pictures)
    print(harness.table(rows))
    if words.record:
        print(harness.record("shards", rows, first_index=index, opened=opened))


if __name__ == "__main__":
    main()
