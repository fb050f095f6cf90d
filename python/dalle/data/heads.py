"""What the JSON files of sets say, checked: codes.json of a store, keep.json of a filtered set.

They are JSON of any shape until then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle.errors import DataError

MAX_COUNT = 1 << 53  # of items, bytes and the like


def is_count(value: Any, least: int = 0) -> bool:
    """Whether a JSON value is an integer from `least` to `MAX_COUNT`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_COUNT


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What codes.json says of a shard.

    Attributes:
        name: of the file.
        items, captions, several: pairs, their captions, and pairs with more than one.
        bytes, sha256: of the file.
        skipped: reason -> number of pictures that were left out.

    Raises:
        ValueError: a value of another kind, or a name that is a path.
    """

    name: str
    items: int
    captions: int
    several: int
    bytes: int
    sha256: str
    skipped: dict[str, int]

    def __post_init__(self) -> None:
        numbers = {key: getattr(self, key) for key in ("items", "captions", "several", "bytes")}
        if not isinstance(self.skipped, dict):
            raise ValueError(f"skipped {self.skipped!r}")
        for key, value in {**numbers, **self.skipped}.items():
            if not is_count(value):
                raise ValueError(f"{key} {value!r}")
        if not isinstance(self.name, str) or self.name != Path(self.name).name:
            raise ValueError(f"name {self.name!r}")
        if not isinstance(self.sha256, str):
            raise ValueError(f"sha256 {self.sha256!r}")


def check_codes_head(path: Path, head: Mapping[str, Any]) -> None:
    """Raises DataError where codes.json does not describe a store."""
    grid = head["grid"]
    known = {
        "vae": isinstance(head["vae"], str),
        "grid": isinstance(grid, list) and len(grid) == 2 and all(is_count(n, 1) for n in grid),
        "shards": isinstance(head["shards"], list),
        **{key: is_count(head[key], 1) for key in ("num_codes", "crops", "image_size")},
    }
    _refuse(path, "`dalle data encode`", head, known)


def check_kept_head(path: Path, head: Mapping[str, Any]) -> None:
    """Raises DataError where keep.json does not describe a filtered set."""
    source = head["source"]
    counts = ("image_size", "seed", "pairs")
    whole = isinstance(source, dict) and isinstance(source.get("data"), str)
    known = {
        "source": whole and all(is_count(source.get(key)) for key in counts),
        "kept": is_count(head["kept"]),
        "sha256": isinstance(head["sha256"], str),
    }
    _refuse(path, "`dalle data filter`", head, known)


def _refuse(path: Path, writer: str, head: Mapping[str, Any], known: Mapping[str, bool]) -> None:
    for key, fits in known.items():
        if not fits:
            got = repr(head[key])
            got = got if len(got) <= 80 else f"{got[:77]}..."
            raise DataError(f"data: {path} must be written by {writer}, got {key} {got}")
