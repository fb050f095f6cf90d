"""A set that keeps some pairs of another: what `dalle data filter` and `dalle data dedup` write.

A folder: keep.json says of which set, by which rule and how many; keep.bin has the items that are
kept, and which of their captions. No picture is copied, so the set must stay where it is; one that
has changed since is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalle.data.heads import check_kept_head
from dalle.data.pairs import LazyCaptions, Pairs, captions_of, fingerprints
from dalle.data.split import Subset
from dalle.errors import DataError
from dalle.files import read_bytes, read_object, real_path, saving, to_json, write_atomic

HEAD_FILE, ITEMS_FILE = "keep.json", "keep.bin"
FORMAT_VERSION = 1
ROWS = np.dtype([("item", "<i8"), ("captions", "<u8")])


class KeptPairs(Subset):
    """Some pairs of a set with some of their captions.

    Args:
        pairs: the set.
        rows: (n,) of `ROWS`, items ascending; bit k of `captions` keeps caption k.
        name: in reports.
        rule: the hash of keep.json's rule.
    """

    def __init__(self, pairs: Pairs, rows: np.ndarray, name: str, rule: str) -> None:
        super().__init__(pairs, rows["item"], name)
        self.masks, self.rule = rows["captions"], rule
        self.captions: Sequence[str] = LazyCaptions(self, self.captions_at)
        self.several: Mapping[int, Sequence[str]] = _Several(self)

    def captions_at(self, i: int) -> Sequence[str]:
        """The captions of item i that are kept."""
        mask = int(self.masks[i])
        captions = captions_of(self.pairs, self.items[i])
        return [caption for k, caption in enumerate(captions) if mask >> min(k, 63) & 1]

    def fingerprint(self) -> dict[str, str]:
        """Those of the set, and hashes of the rule and of what is kept."""
        content = np.array(self.items, "<i8").tobytes() + self.masks.tobytes()
        digest = hashlib.sha256(content).hexdigest()[:16]
        return fingerprints(self.pairs) | {"kept": f"SHA-256 {digest}", "rule": self.rule}


class _Several(Mapping[int, Sequence[str]]):
    """The items with several captions left."""

    def __init__(self, pairs: KeptPairs) -> None:
        self.pairs = pairs

    def _has(self, i: int) -> bool:
        return int(self.pairs.masks[i]).bit_count() > 1 and len(self.pairs.captions_at(i)) > 1

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[int]:
        return (i for i in range(len(self.pairs)) if self._has(i))

    def __contains__(self, i: object) -> bool:
        if not isinstance(i, (int, np.integer)):
            return False
        return 0 <= int(i) < len(self.pairs) and self._has(int(i))

    def __getitem__(self, i: int) -> Sequence[str]:
        if i not in self:
            raise KeyError(i)
        return self.pairs.captions_at(i)


def is_kept_set(path: Path) -> bool:
    """Whether a folder has keep.json."""
    return (path / HEAD_FILE).is_file()


def write_kept(
    owner: str,
    out: Path,
    source: Mapping[str, Any],
    rule: Mapping[str, Any],
    rows: np.ndarray,
    pairs: Pairs,
    counts: Mapping[str, int],
) -> None:
    """Writes what is kept of a set.

    Args:
        owner: begins an error's line.
        out: an existing folder.
        source: what opens the set again: "data", "image_size", "seed".
        rule: by which it was chosen.
        rows: of `ROWS`.
        pairs: the set.
        counts: reason -> pairs that were left out.
    """
    head = {
        "format_version": FORMAT_VERSION,
        "source": {**source, "pairs": len(pairs), **fingerprints(pairs)},
        "rule": dict(rule),
        "kept": len(rows),
        "left_out": dict(counts),
        "sha256": hashlib.sha256(rows.tobytes()).hexdigest(),
    }
    with saving(owner, out / ITEMS_FILE):
        write_atomic(out / ITEMS_FILE, rows.astype(ROWS).tobytes())
        write_atomic(out / HEAD_FILE, to_json(head))


def read_kept(folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    """keep.json and the rows.

    Raises:
        DataError: damaged, or of another version.
    """
    path = folder / HEAD_FILE
    head = read_object(path, DataError)
    keys = {"format_version", "source", "rule", "kept", "sha256"}
    if not keys <= set(head):
        raise DataError(f"data: {path} must be written by `dalle data filter`, got other keys")
    if head["format_version"] != FORMAT_VERSION:
        raise DataError(
            f"data: {path}: format_version must be {FORMAT_VERSION}, got {head['format_version']}"
        )
    check_kept_head(path, head)
    try:
        content = read_bytes(folder / ITEMS_FILE, int(head["kept"]) * ROWS.itemsize)
    except OSError as problem:
        raise DataError(
            f"data: {folder / ITEMS_FILE} must be readable, got: {problem.strerror}"
        ) from problem
    if hashlib.sha256(content).hexdigest() != head["sha256"]:
        raise DataError(f"data: {folder / ITEMS_FILE} must be as {HEAD_FILE} says, got another")
    if not head["kept"]:
        raise DataError(f"data: {folder} must keep a pair, got none of {head['source']['pairs']}")
    return head, np.frombuffer(content, ROWS)


def apply_kept(folder: Path, head: Mapping[str, Any], rows: np.ndarray, pairs: Pairs) -> KeptPairs:
    """What is kept of a set that was opened again.

    Raises:
        DataError: it is not the one that was filtered.
    """
    then = {k: v for k, v in head["source"].items() if k not in ("data", "image_size", "seed")}
    if then != {"pairs": len(pairs), **fingerprints(pairs)}:
        raise DataError(
            f"data: {head['source']['data']} must be the set that {folder} was made of, got a "
            "changed one; make it anew"
        )
    if not ((rows["item"] >= 0) & (rows["item"] < len(pairs))).all():
        raise DataError(f"data: {folder / ITEMS_FILE} must keep items of the set, got others")
    rule = hashlib.sha256(to_json(head["rule"])).hexdigest()[:16]
    return KeptPairs(pairs, rows, real_path(folder).name, f"SHA-256 {rule}")
