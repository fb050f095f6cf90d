"""Caption-picture pairs: the protocol, the in-memory form, and how batches are loaded."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, overload, runtime_checkable

import numpy as np
from tqdm import tqdm

from dalle.configs import integer, integers
from dalle.console import printable
from dalle.data.order import BatchSampler as BatchSampler
from dalle.errors import DataError

MAX_NAMED = 10  # files named as left out; further ones are only counted
DRAWS = 1000  # pictures tried in place of one that cannot be used
# In a worker process (`data.loader`): what is left out, to be counted where the training runs.
collector: list[tuple[int, DataError]] | None = None


@runtime_checkable
class Pairs(Protocol):
    """Pictures with their captions.

    A set may also have:
    - `several`, a mapping from an item to all of its captions where it has more than one, and
      `captions_at(i)`, all captions of item i, where they are read when they are asked for;
    - `paths`, the file of each picture, or `files`, the files it reads: no output replaces them;
    - `read_bytes(i)`, the file of picture i and its name for messages;
    - `digests()`, a hash of each picture's bytes, or `hold_hashes()` (`split.hold_out`);
    - `parts()`, part -> what is in it, by which a changed set is described.

    Attributes:
        name: of the set, in reports.
        image_size: side in pixels of every picture, or 0 where pictures differ (a folder).
        captions: caption i belongs to picture i.
        skipped: reason -> number of items that were left out.
    """

    name: str
    image_size: int
    captions: Sequence[str]
    skipped: Counter[str]

    def __len__(self) -> int: ...

    def load(self, i: int) -> np.ndarray:
        """Picture i, (H, W, 3) uint8. Raises DataError where it does not decode."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """Hashes, by name, of all captions and all pictures in their order: two sets that differ
        in one of them differ in a hash, so that a resumed run notices it."""
        ...


class ArrayPairs:
    """Pairs held in memory.

    Args:
        name: of the set, in reports.
        images: (N, H, W, 3) uint8 with H = W.
        captions: N strings.
        skipped: reason -> number of items left out while building the set.
        several: item -> all its captions, where it has more than one.

    Raises:
        DataError: the shapes or the counts do not fit.
    """

    def __init__(
        self,
        name: str,
        images: np.ndarray,
        captions: Sequence[str],
        skipped: Counter[str] | None = None,
        several: Mapping[int, Sequence[str]] | None = None,
    ) -> None:
        if not isinstance(images, np.ndarray):
            raise DataError(f"{name}: images must be an array, got {type(images).__name__}")
        square = images.ndim == 4 and images.shape[3] == 3 and images.shape[1] == images.shape[2]
        if images.dtype != np.uint8 or not square:
            raise DataError(
                f"{name}: images must be (N, S, S, 3) uint8, got {images.shape} {images.dtype}"
            )
        if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
            raise DataError(f"{name}: captions must be strings, got other values, or one string")
        if len(images) != len(captions):
            raise DataError(f"{name}: captions must be {len(images)} strings, got {len(captions)}")
        self.name = name
        self.images = images
        self.image_size = int(images.shape[1])
        self.captions: Sequence[str] = list(captions)
        self.skipped: Counter[str] = Counter(skipped or {})
        self.several: Mapping[int, Sequence[str]] = dict(several or {})

    def __len__(self) -> int:
        return len(self.images)

    def load(self, i: int) -> np.ndarray:
        image: np.ndarray = self.images[i]
        return image

    def fingerprint(self) -> dict[str, str]:
        """Hashes of "captions" and "pictures"."""
        return _fingerprint(self, [np.ascontiguousarray(self.images).data])


def captions_of(pairs: Pairs, item: int) -> Sequence[str]:
    """All captions of an item, at least one."""
    read: Callable[[int], Sequence[str]] | None = getattr(pairs, "captions_at", None)
    if read is not None:
        return read(item)
    captions: Sequence[str] | None = getattr(pairs, "several", {}).get(item)
    return captions or (pairs.captions[item],)


def draw_caption(pairs: Pairs, item: int, seed: Callable[[], int]) -> str:
    """One of an item's captions, uniformly by `seed()`, which is called if there are several."""
    captions = captions_of(pairs, item)
    if len(captions) == 1:
        return captions[0]
    return captions[int(np.random.default_rng(seed()).integers(len(captions)))]


def all_captions(pairs: Pairs) -> list[str]:
    """The captions of all items; of items with several, all of them."""
    return list(each_caption(pairs))


def each_caption(pairs: Pairs) -> Iterator[str]:
    """`all_captions` one by one."""
    return (caption for item in range(len(pairs)) for caption in captions_of(pairs, item))


def input_files(pairs: Pairs) -> list[Path]:
    """The files that a set reads, which no output replaces."""
    return [*getattr(pairs, "paths", ()), *getattr(pairs, "files", ())]


class LazyCaptions(Sequence[str]):
    """The first caption of each item of a set, by a function that reads all captions of one."""

    def __init__(self, pairs: Sized, read: Callable[[int], Sequence[str]]) -> None:
        self.pairs, self.read = pairs, read

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = i + len(self) if i < 0 else i
        if not 0 <= i < len(self):
            raise IndexError(f"item must be 0 .. {len(self) - 1}, got {i}")
        return self.read(i)[0]


class LazySeveral(Mapping[int, Sequence[str]]):
    """The items that have several captions, by a function that reads all captions of one.

    Args:
        items: sorted, which have several.
        read: of an item.
    """

    def __init__(self, items: np.ndarray, read: Callable[[int], Sequence[str]]) -> None:
        self.chosen, self.read = items, read

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[int]:
        yield from self.chosen.tolist()

    def __contains__(self, i: object) -> bool:
        if not isinstance(i, (int, np.integer)):
            return False
        place = int(np.searchsorted(self.chosen, i))
        return place < len(self.chosen) and int(self.chosen[place]) == i

    def __getitem__(self, i: int) -> Sequence[str]:
        if i not in self:
            raise KeyError(i)
        return self.read(i)


def number_of_captions(pairs: Pairs) -> int:
    """How many `all_captions` are."""
    count: Callable[[], int] | None = getattr(pairs, "number_of_captions", None)
    if count is not None:
        return count()
    several: Mapping[int, Sequence[str]] = getattr(pairs, "several", {})
    return len(pairs) + sum(len(captions) - 1 for captions in several.values())


def leave_out(pairs: Pairs, item: int, error: DataError) -> None:
    """Counts a picture that cannot be used in `pairs.skipped`, once, and reports the reason.

    Of pictures with one cause, such as a shard that has gone (`error.group`), one is reported.
    """
    if collector is not None:
        collector.append((item, error))
        return
    reasons: dict[int, str] = _kept(pairs, "left_out")
    if item in reasons:
        return
    reasons[item] = getattr(error, "reason", "does not decode")
    pairs.skipped[reasons[item]] += 1
    named: dict[object, int] = _kept(pairs, "named")
    cause = getattr(error, "group", item)
    if cause in named or len(named) >= MAX_NAMED:
        return
    named[cause] = item
    line = _describe(pairs, item, error)
    suffix = "; further ones are counted, not named" if len(named) == MAX_NAMED else ""
    tqdm.write(printable(f"{pairs.name}: left out: {line}{suffix}"), file=sys.stderr)


def _kept(pairs: Pairs, name: str) -> dict[Any, Any]:
    """A dict that stays with a set; of a class with __slots__ it does not."""
    kept: dict[Any, Any] | None = getattr(pairs, name, None)
    if kept is None:
        kept = {}
        with suppress(AttributeError):
            object.__setattr__(pairs, name, kept)  # works for frozen dataclasses too
    return kept


def _describe(pairs: Pairs, item: int, error: DataError) -> str:
    paths = getattr(pairs, "paths", None)
    where = f"picture {item}" if paths is None else str(paths[item])
    return str(error) if where in str(error) else f"{where}: {error}"


def left_out(pairs: Pairs) -> str:
    """End of a line on what this process could not use: "; left out: 2 x REASON", or ""."""
    reasons = Counter(getattr(pairs, "left_out", {}).values())
    return f"; left out: {format_counts(reasons)}" if reasons else ""


def format_counts(reasons: Counter[str]) -> str:
    """ "2 x REASON, 1 x REASON", the most frequent first."""
    return ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())


def load_or_skip(
    pairs: Pairs,
    indices: Iterable[int] | np.ndarray,
    transform: Callable[[np.ndarray, int], np.ndarray] | None = None,
    *,
    require_any: bool = True,
    limit: int | None = None,
) -> tuple[list[np.ndarray], list[int]]:
    """Loads pictures; one that cannot be used is left out and counted in `pairs.skipped`.

    A picture cannot be used if it does not decode, or if the transform refuses it.

    Args:
        pairs: the data set.
        indices: items to load.
        transform: applied to each picture and its position in `indices`, in that order.
        require_any: whether at least one must be usable.
        limit: number of pictures after which loading stops; None loads all.

    Returns:
        The pictures, and their positions in `indices`. Both may be shorter than `indices`.

    Raises:
        DataError: none can be used, with `require_any`.
    """
    images: list[np.ndarray] = []
    positions: list[int] = []
    reason = ""
    if limit is not None:
        limit = integer(pairs.name, "limit", limit, 0)
    for position, item in enumerate(indices):
        if limit is not None and len(images) >= limit:
            break
        try:
            image = pairs.load(item := integer(pairs.name, "indices", item))
            images.append(image if transform is None else transform(image, position))
            positions.append(position)
        except DataError as error:
            reason = _describe(pairs, item, error)
            leave_out(pairs, item, error)
    if require_any and reason and not images:
        raise DataError(f"{pairs.name}: a batch must hold a picture that can be used, got {reason}")
    return images, positions


def load_or_draw(
    pairs: Pairs,
    indices: Sequence[int] | np.ndarray,
    seed: Callable[[int], int],
    transform: Callable[[np.ndarray, int], np.ndarray],
) -> tuple[list[np.ndarray], np.ndarray]:
    """Loads a picture for each index; another is drawn in place of one that cannot be used.

    So a batch keeps its size, and the picture at a position depends on that position alone,
    however many processes split the batch. Each that does not decode or that the transform
    refuses is counted in `pairs.skipped`.

    Args:
        pairs: the data set.
        indices: items to load.
        seed: gives the seed of the draws at a position in `indices`.
        transform: applied to each picture and its position.

    Returns:
        The pictures, and their items, int64.

    Raises:
        DataError: none of those drawn for a position can be used.
    """
    images, items = [], []
    for position, item in enumerate(integers(pairs.name, "indices", indices)):
        draws, reason = None, ""
        for _ in range(DRAWS):
            try:
                images.append(transform(pairs.load(item), position))
                break
            except DataError as error:
                reason = _describe(pairs, item, error)
                leave_out(pairs, item, error)
            draws = draws or np.random.default_rng(seed(position))
            item = int(draws.integers(len(pairs)))
        else:
            raise DataError(
                f"{pairs.name}: a batch must hold a picture that can be used, got {reason}"
            )
        items.append(item)
    return images, np.array(items, dtype=np.int64)


def fingerprints(pairs: Pairs) -> dict[str, str]:
    """`Pairs.fingerprint`, and its like for a set without one: all pictures are hashed."""
    own: Callable[[], dict[str, str]] | None = getattr(pairs, "fingerprint", None)
    return _fingerprint(pairs, picture_hashes(pairs)) if own is None else own()


def hashed_fingerprint(pairs: Pairs) -> dict[str, str]:
    """`fingerprint` of a set: hashes of all captions and of `picture_hashes`."""
    return _fingerprint(pairs, picture_hashes(pairs))


def describe_pairs(pairs: Pairs) -> dict[str, Any]:
    """What a checkpoint says about its data, as JSON values: number, hashes, parts."""
    parts: Callable[[], dict[str, str]] | None = getattr(pairs, "parts", None)
    more = {} if parts is None else {"parts": parts()}
    return {"pairs": len(pairs), **fingerprints(pairs), **more}


def picture_hashes(pairs: Pairs) -> Iterator[bytes]:
    """A hash of each picture: of its file where the set knows it, else of its pixels; b"" of one
    that cannot be read."""
    known: Callable[[], Iterator[bytes]] | None = getattr(pairs, "digests", None)
    if known is not None:
        yield from known()
        return
    for i in range(len(pairs)):
        try:
            image = np.ascontiguousarray(pairs.load(i))
        except DataError:
            yield b""
        else:
            yield hashlib.blake2b(image.data, digest_size=16).digest()


def _fingerprint(pairs: Pairs, contents: Iterable[bytes | memoryview]) -> dict[str, str]:
    captions, pictures = hashlib.sha256(), hashlib.sha256()
    for item in range(len(pairs)):
        captions.update(caption_bytes(captions_of(pairs, item)))
    for content in contents:
        pictures.update(content)
    digests = {"captions": captions, "pictures": pictures}
    return {name: f"SHA-256 {digest.hexdigest()[:16]}" for name, digest in digests.items()}


def caption_bytes(captions: Sequence[str]) -> bytes:
    """The captions of an item in the form that they are hashed in."""
    encoded = [caption.encode("utf-8", "surrogatepass") for caption in captions]
    return b"%d " % len(encoded) + b"".join(b"%d %s" % (len(c), c) for c in encoded)


def evenly_spaced(count: int, limit: int) -> np.ndarray:
    """Up to `limit` of the integers below `count`, ascending; the first and the last among them."""
    return np.linspace(0, count - 1, min(limit, count)).astype(int)
