"""A code store: the image tokens of a set with its captions, in place of the pictures.

`dalle data encode` writes it, `dalle prior train` reads it. A folder: codes.json says what it
holds, which dVAE made the codes and the SHA-256 of each shard; a shard is one safetensors file:

    codes   (n, crops, N) int16, the tokens of each crop in raster order
    first   (n + 1,) int64, the captions of item i are first[i] .. first[i + 1]
    end     (captions,) int64, where each caption ends in text
    text    (bytes,) uint8, all captions in UTF-8
    hold    (n,) uint64, the number by which a picture is held out (`split.hold_out`)

Letters: n items of a shard, N = rows * columns tokens of a picture.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from dalle.data.heads import ShardRecord as ShardRecord
from dalle.data.heads import check_codes_head
from dalle.data.mixture import MixedPairs, OneCaption
from dalle.data.pairs import LazyCaptions, Pairs
from dalle.data.source import Source
from dalle.data.split import Subset
from dalle.errors import DataError, UsageError
from dalle.files import check_regular, parse_json, read_object, real_path, regular_opener, sha256

HEAD_FILE = "codes.json"
FORMAT_VERSION = 1
MAX_CODES = 2**15  # what int16 holds
ENCODE_AGAIN = "the same `dalle data encode` makes it anew"
MAX_HEADER_BYTES = 1 << 16  # of a shard: five names


def shard_bytes(
    codes: np.ndarray, captions: Sequence[Sequence[str]], hold: np.ndarray
) -> tuple[bytes, int, int]:
    """A shard's file, the number of its captions, and of items with several.

    Args:
        codes: (n, crops, N) integers below 32768.
        captions: of each item, at least one.
        hold: (n,) uint64.
    """
    texts = [text.encode("utf-8", "surrogatepass") for item in captions for text in item]
    counts = np.array([len(item) for item in captions], np.int64)
    tensors: dict[str, np.ndarray] = {
        "codes": codes.astype(np.int16),
        "first": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "end": np.cumsum([len(text) for text in texts], dtype=np.int64),
        "text": np.frombuffer(b"".join(texts), np.uint8),
        "hold": hold.astype(np.uint64),
    }
    return save(tensors), len(texts), int((counts > 1).sum())


class CodePairs:
    """The pairs of a code store. Codes and captions are mapped into memory, not read at once.

    Args:
        folder: of `dalle data encode`.

    Attributes:
        vae: the hash of the dVAE that made the codes (`pretrained.fingerprint`).
        num_codes: of that dVAE.
        grid: (rows, columns) of tokens.
        crops: codes are there for so many crops of each picture.
        image_size: side in pixels of the pictures that were encoded.
        captions, several, skipped, files: as of other sets.

    Raises:
        DataError: no store, an unfinished or damaged one.
    """

    indexed = True

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        head = read_head(self.folder)
        self.name = real_path(self.folder).name
        self.vae, self.num_codes = str(head["vae"]), int(head["num_codes"])
        self.grid: tuple[int, int] = (int(head["grid"][0]), int(head["grid"][1]))
        self.crops, self.image_size = int(head["crops"]), int(head["image_size"])
        self.shards = [record for record in records_of(head, self.folder) if record.items]
        self.skipped: Counter[str] = Counter()
        for record in records_of(head, self.folder):
            self.skipped.update(record.skipped)
        self.files = [self.folder / record.name for record in self.shards]
        for path, record in zip(self.files, self.shards, strict=True):
            check_size(path, record)
        ends = np.cumsum([record.items for record in self.shards], dtype=np.int64)
        self._starts = np.concatenate([[0], ends])
        self._open: dict[int, dict[str, np.ndarray]] = {}
        self._known: dict[int, str] = {}  # the SHA-256 of shards that were read
        self._lock = threading.Lock()
        self.captions: Sequence[str] = LazyCaptions(self, self.captions_at)
        self.several: Mapping[int, Sequence[str]] = _Several(self)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _open={}, _lock=threading.Lock())

    def place(self, i: int) -> tuple[dict[str, np.ndarray], int]:
        """The arrays of the shard of item i, and its row there."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name}: item must be 0 .. {len(self) - 1}, got {i}")
        number = int(np.searchsorted(self._starts, i, "right")) - 1
        return self._arrays(number), i - int(self._starts[number])

    def _arrays(self, number: int) -> dict[str, np.ndarray]:
        """A shard's arrays; the first time, its bytes are compared with their checksum."""
        arrays = self._open.get(number)
        if arrays is None:
            with self._lock:
                path, record = self.files[number], self.shards[number]
                check_size(path, record)
                if number not in self._known:
                    self._known[number] = sha256(path)
                if self._known[number] != record.sha256:
                    wanted = f"must have the SHA-256 that {HEAD_FILE} says, got another"
                    raise DataError(f"data: {path} {wanted}; {ENCODE_AGAIN}")
                arrays = self._open[number] = map_shard(path, record, self.crops, self.grid)
        return arrays

    def tokens(self, i: int, crop: int = 0) -> np.ndarray:
        """(N,) int16, the codes of a crop of item i."""
        arrays, row = self.place(i)
        codes: np.ndarray = arrays["codes"][row, crop]
        return codes

    def captions_at(self, i: int) -> list[str]:
        """All captions of item i."""
        arrays, row = self.place(i)
        first, last = (int(n) for n in arrays["first"][row : row + 2])
        ends = arrays["end"][max(0, first - 1) : last].tolist()
        starts = ends if first else [0, *ends]
        return [
            arrays["text"][begin:end].tobytes().decode("utf-8", "surrogatepass")
            for begin, end in zip(starts, starts[1:], strict=False)
        ]

    def number_of_captions(self) -> int:
        """The captions of all items together."""
        return sum(record.captions for record in self.shards)

    def load(self, i: int) -> np.ndarray:
        """Raises DataError: there are no pictures."""
        raise DataError(f"data: {self.folder} must hold pictures, got codes")

    def hold_hashes(self) -> Iterator[np.ndarray]:
        """The numbers by which pictures are held out, uint64, a shard each."""
        for number in range(len(self.shards)):
            yield np.array(self._arrays(number)["hold"])

    def fingerprint(self) -> dict[str, str]:
        """The hash of the checksums of all shards, and that of the dVAE."""
        together = "".join(record.sha256 for record in self.shards)
        digest = hashlib.sha256(together.encode()).hexdigest()[:16]
        return {"codes": f"SHA-256 {digest}", "vae": self.vae}

    def parts(self) -> dict[str, str]:
        """Shard -> its number of pairs and a short hash."""
        return {record.name: f"{record.items} {record.sha256[:8]}" for record in self.shards}


class _Several(Mapping[int, Sequence[str]]):
    """The items with several captions, read when they are asked for."""

    def __init__(self, pairs: CodePairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return sum(record.several for record in self.pairs.shards)

    def __iter__(self) -> Iterator[int]:
        first = 0
        for number, record in enumerate(self.pairs.shards):
            if record.several:
                counts = np.diff(self.pairs._arrays(number)["first"])
                yield from (first + np.flatnonzero(counts > 1)).tolist()
            first += record.items

    def __contains__(self, i: object) -> bool:
        if not isinstance(i, (int, np.integer)) or not 0 <= i < len(self.pairs):
            return False
        arrays, row = self.pairs.place(int(i))
        return int(arrays["first"][row + 1] - arrays["first"][row]) > 1

    def __getitem__(self, i: int) -> list[str]:
        if i not in self:
            raise KeyError(i)
        return self.pairs.captions_at(i)


def read_head(folder: Path) -> dict[str, Any]:
    """codes.json of a store.

    Raises:
        DataError: missing, unfinished, damaged, or of another version.
    """
    path = folder / HEAD_FILE
    head = read_object(path, DataError)
    keys = {"format_version", "vae", "num_codes", "grid", "crops", "image_size", "shards"}
    if not keys <= set(head):
        raise DataError(f"data: {path} must be written by `dalle data encode`, got other keys")
    if head["format_version"] != FORMAT_VERSION:
        raise DataError(
            f"data: {path}: format_version must be {FORMAT_VERSION}, got {head['format_version']}"
        )
    check_codes_head(path, head)
    if not head.get("finished"):
        done = len(head["shards"])
        raise DataError(
            f"data: {folder} must be encoded to the end, got {done} shards; "
            "the same `dalle data encode` goes on"
        )
    if not sum(record.items for record in records_of(head, folder)):
        raise DataError(f"data: {folder} must hold codes, got none: no picture could be used")
    return head


def records_of(head: Mapping[str, Any], folder: Path) -> list[ShardRecord]:
    """The records of all shards. Raises DataError where one is damaged."""
    try:
        return [ShardRecord(**record) for record in head["shards"]]
    except (TypeError, ValueError) as problem:
        got = "other keys" if isinstance(problem, TypeError) else str(problem)
        raise DataError(f"data: {folder / HEAD_FILE} must describe shards, got {got}") from problem


def check_size(path: Path, record: ShardRecord) -> None:
    """Raises DataError where a shard has gone or has another size."""
    try:
        check_regular(path)
        size = path.stat().st_size
    except OSError as problem:
        raise DataError(
            f"data: {path} must be readable, got: {problem.strerror}; {ENCODE_AGAIN}"
        ) from problem
    if size != record.bytes:
        raise DataError(
            f"data: {path} must have {record.bytes:,} bytes, got {size:,}; {ENCODE_AGAIN}"
        )


def map_shard(
    path: Path, record: ShardRecord, crops: int, grid: tuple[int, int]
) -> dict[str, np.ndarray]:
    """The arrays of a shard, mapped into memory."""
    shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        "codes": (np.dtype("<i2"), (record.items, crops, grid[0] * grid[1])),
        "first": (np.dtype("<i8"), (record.items + 1,)),
        "end": (np.dtype("<i8"), (record.captions,)),
        "text": (np.dtype("u1"), (-1,)),
        "hold": (np.dtype("<u8"), (record.items,)),
    }
    with open(path, "rb", opener=regular_opener) as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(min(size, MAX_HEADER_BYTES))
    arrays = {}
    try:
        header = parse_json(text)
        for name, (dtype, shape) in shapes.items():
            begin, end = header[name]["data_offsets"]
            count = (end - begin) // dtype.itemsize
            wanted = (count,) if shape == (-1,) else shape
            if count != math.prod(wanted):
                raise ValueError(f"{count} numbers of {name}")
            if count == 0:
                arrays[name] = np.empty(wanted, dtype)
                continue
            flat = np.memmap(path, dtype, "r", 8 + size + begin, (count,))
            arrays[name] = flat.reshape(wanted)
    except (ValueError, KeyError, TypeError, OverflowError) as problem:
        plain = type(problem) is ValueError
        got = str(problem).splitlines()[0] if plain else "other fields in its header"
        raise DataError(f"data: {path} must be a shard of codes, got: {got}") from problem
    return arrays


def stores_of(pairs: Pairs) -> list[CodePairs]:
    """The code stores that a set is made of; empty for a set of pictures.

    Raises:
        UsageError: a mixture of codes and pictures.
    """
    inner: Any = pairs
    if isinstance(inner, CodePairs):
        return [inner]
    if isinstance(inner, (Subset, OneCaption)):
        return stores_of(inner.pairs)
    if not isinstance(inner, MixedPairs):
        return []
    stores = [stores_of(part) for part in inner.items_of]
    if any(stores) and not all(stores):
        raise UsageError("data: parts must be all pictures or all codes, got both")
    return [store for part in stores for store in part]


def tokens_of(pairs: Pairs, items: Sequence[int] | np.ndarray, crops: Sequence[int]) -> Tensor:
    """The codes of some items of a set made of code stores.

    Args:
        pairs: the set.
        items: B of its items.
        crops: which crop of each.

    Returns:
        (B, N) int64 on the CPU.

    Raises:
        DataError: a shard is damaged or has gone.
    """
    rows = []
    for item, crop in zip(items, crops, strict=True):
        inner: Any = pairs
        while not isinstance(inner, CodePairs):
            if isinstance(inner, Subset):
                inner, item = inner.pairs, inner.items[int(item)]
            elif isinstance(inner, MixedPairs):
                inner, item = inner.place(int(item))
            else:
                inner = inner.pairs
        rows.append(inner.tokens(int(item), crop % inner.crops))
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def check_codes(
    owner: str, stores: Sequence[CodePairs], vae: str, grid: tuple[int, int], size: int
) -> None:
    """Whether codes fit a dVAE, and a prior's grid.

    Args:
        owner: begins the error's line.
        stores: that are trained on.
        vae: the dVAE's hash.
        grid: of the prior.
        size: side of its pictures in pixels.

    Raises:
        UsageError: they do not.
    """
    for store in stores:
        if store.vae != vae:
            raise UsageError(
                f"{owner}: vae must be the one that {store.folder} was encoded with "
                f"({store.vae}), got another ({vae})"
            )
        if store.grid != grid:
            raise UsageError(
                f"{owner}: image_size must be {store.image_size} for the codes of "
                f"{store.folder}, got {size}"
            )


def require_pictures(owner: str, pairs: Pairs) -> None:
    """Raises UsageError for codes, where pictures are needed."""
    for store in stores_of(pairs):
        raise UsageError(f"{owner}: data must be pictures, got the codes of {store.folder}")


def is_code_store(path: Path) -> bool:
    """Whether a folder has codes.json."""
    return (path / HEAD_FILE).is_file()


SOURCE = Source(name="a code store", fits=is_code_store, opens=CodePairs)
