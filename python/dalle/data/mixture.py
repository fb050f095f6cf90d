"""Several sets as one, by weights or one after the other; and one caption for each picture."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from dalle.console import say
from dalle.data.pairs import (
    LazyCaptions,
    Pairs,
    captions_of,
    describe_pairs,
    fingerprints,
    input_files,
    number_of_captions,
    picture_hashes,
)
from dalle.data.split import hold_hashes, is_indexed

CaptionChoice = Literal["first", "draw", "join"]


class MixedPairs:
    """Several sets, whose items follow each other.

    Args:
        parts: the sets.
        weights: by which training draws from them; None goes through all in one order.
        names: of the parts, where they are not the sets' own.
    """

    def __init__(
        self,
        parts: Sequence[Pairs],
        weights: Sequence[float] | None = None,
        names: Sequence[str] = (),
    ) -> None:
        sizes = {part.image_size for part in parts}
        self.items_of, self.weights = list(parts), None if weights is None else list(weights)
        self.names = list(names) or [part.name for part in parts]
        self.name = " + ".join(part.name for part in parts)
        self.image_size = sizes.pop() if len(sizes) == 1 else 0
        self.indexed = any(is_indexed(part) for part in parts)
        self._ends = list(accumulate(len(part) for part in parts))
        self.captions: Sequence[str] = LazyCaptions(self, self.captions_at)
        self.several: Mapping[int, Sequence[str]] = _Several(self)
        self.skipped: Counter[str] = Counter()
        for part in parts:
            self.skipped.update(part.skipped)

    def __len__(self) -> int:
        return self._ends[-1]

    def place(self, i: int) -> tuple[Any, int]:
        """The part of item i, and its number there."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name}: item must be 0 .. {len(self) - 1}, got {i}")
        number = int(np.searchsorted(self._ends, i, "right"))
        part = self.items_of[number]
        return part, i - self._ends[number] + len(part)

    def mixture(self) -> tuple[list[int], list[float]] | None:
        """The ends of the parts and their weights, for `order.sampler_for`; None without."""
        return None if self.weights is None else (list(self._ends), list(self.weights))

    def load(self, i: int) -> np.ndarray:
        """Picture i, (H, W, 3) uint8. Raises DataError where it does not decode."""
        part, item = self.place(i)
        image: np.ndarray = part.load(item)
        return image

    def captions_at(self, i: int) -> Sequence[str]:
        """All captions of item i."""
        return captions_of(*self.place(i))

    def number_of_captions(self) -> int:
        """The captions of all items together."""
        return sum(number_of_captions(part) for part in self.items_of)

    def read_bytes(self, i: int) -> tuple[bytes, str]:
        """The file of picture i, and its name for messages; a PNG where the part has no files."""
        return file_of(*self.place(i))

    @property
    def files(self) -> list[Path]:
        """The files of all parts."""
        return [path for part in self.items_of for path in input_files(part)]

    def digests(self) -> Iterator[bytes]:
        """A hash of each picture; b"" of one that cannot be read."""
        for part in self.items_of:
            yield from picture_hashes(part)

    def hold_hashes(self) -> Iterator[np.ndarray]:
        """`split.hold_hashes` of all parts."""
        for part in self.items_of:
            yield from hold_hashes(part)

    def fingerprint(self) -> dict[str, str]:
        """Hashes of "captions" and "pictures" of all parts, and of their weights."""
        prints = [fingerprints(part) for part in self.items_of]
        joined = {name: repr([p.get(name) for p in prints]) for name in ("captions", "pictures")}
        joined["weights"] = repr(self.weights)
        return {
            name: f"SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
            for name, text in joined.items()
        }

    def parts(self) -> dict[str, Any]:
        """Part -> its number of pairs, hashes and own parts."""
        weights: Sequence[float | None] = self.weights or [None] * len(self.items_of)
        return {
            name: describe_pairs(part) | ({} if weight is None else {"weight": weight})
            for name, part, weight in zip(self.names, self.items_of, weights, strict=True)
        }


class _Several(Mapping[int, Sequence[str]]):
    """The items of a mixture that have several captions."""

    def __init__(self, pairs: MixedPairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return sum(len(getattr(part, "several", {})) for part in self.pairs.items_of)

    def __iter__(self) -> Iterator[int]:
        first = 0
        for part in self.pairs.items_of:
            yield from (first + item for item in getattr(part, "several", {}))
            first += len(part)

    def __contains__(self, i: object) -> bool:
        if not isinstance(i, (int, np.integer)) or not 0 <= i < len(self.pairs):
            return False
        part, item = self.pairs.place(int(i))
        return item in getattr(part, "several", {})

    def __getitem__(self, i: int) -> Sequence[str]:
        if i not in self:
            raise KeyError(i)
        return self.pairs.captions_at(i)


def say_weights_stay_behind(owner: str, pairs: Any) -> None:
    """A line where a set with weights is copied: the copy has each pair once, and no weights."""
    if getattr(pairs, "mixture", lambda: None)() is not None:
        say(
            f"{owner}: note: weights are of trainings and are not written; to keep them, take each "
            "source alone, and give its result the weight"
        )


def file_of(pairs: Any, item: int) -> tuple[bytes, str]:
    """The file of a picture, and its name for messages; a PNG where the set has no files.

    Raises:
        DataError: it cannot be read.
    """
    if hasattr(pairs, "read_bytes"):
        content: tuple[bytes, str] = pairs.read_bytes(item)
        return content
    buffer = io.BytesIO()
    Image.fromarray(pairs.load(item)).save(buffer, "PNG")
    return buffer.getvalue(), f"{pairs.name}: picture {item}"


class OneCaption:
    """A set with one caption for each picture: the first, or all joined by spaces.

    Everything else is the set's.

    Args:
        pairs: the set.
        choice: "first" or "join".
    """

    captions: Sequence[str]
    name: str
    image_size: int
    skipped: Counter[str]

    def __init__(self, pairs: Pairs, choice: CaptionChoice) -> None:
        self.pairs, self.choice = pairs, choice
        self.captions = LazyCaptions(pairs, self.captions_at)
        self.several: Mapping[int, Sequence[str]] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "pairs":  # as pickle asks before there is a set
            raise AttributeError(name)
        return getattr(self.pairs, name)

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, i: int) -> np.ndarray:
        """Picture i, (H, W, 3) uint8. Raises DataError where it does not decode."""
        return self.pairs.load(i)

    def captions_at(self, i: int) -> Sequence[str]:
        """The one caption of item i."""
        captions = captions_of(self.pairs, i)
        return [" ".join(captions)] if self.choice == "join" else captions[:1]

    def number_of_captions(self) -> int:
        """As many as there are pictures."""
        return len(self.pairs)

    def fingerprint(self) -> dict[str, str]:
        """That of the set, with the choice."""
        return fingerprints(self.pairs) | {"caption_choice": self.choice}


def with_choice(pairs: Pairs, choice: CaptionChoice) -> Pairs:
    """A set of which training takes the captions by `--captions`.

    Args:
        pairs: the set.
        choice: "draw" (one of a picture's captions each epoch), "first" or "join".
    """
    return pairs if choice == "draw" else OneCaption(pairs, choice)
