"""Caption-picture pairs: the protocol, the in-memory form, loading by name, and the batch order."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from dalle.errors import DataError, UsageError

BUILT_IN = ("shapes", "emoji")
SAMPLES = 64  # pictures hashed of a set whose kind is not known
DRAWS = 1000  # pictures tried in the place of one that does not decode


@runtime_checkable
class Pairs(Protocol):
    """Pictures with one caption each.

    Attributes:
        name: what the set is called in reports.
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


class ArrayPairs:
    """Pairs held in memory.

    Args:
        name: what the set is called in reports.
        images: (N, H, W, 3) uint8 with H = W.
        captions: N strings.
        skipped: reason -> number of items left out while building the set.

    Raises:
        DataError: the shapes or the counts do not fit.
    """

    def __init__(
        self,
        name: str,
        images: np.ndarray,
        captions: Sequence[str],
        skipped: Counter[str] | None = None,
    ) -> None:
        square = images.ndim == 4 and images.shape[3] == 3 and images.shape[1] == images.shape[2]
        if images.dtype != np.uint8 or not square:
            raise DataError(
                f"{name}: images must be (N, S, S, 3) uint8, got {images.shape} {images.dtype}"
            )
        if len(images) != len(captions):
            raise DataError(f"{name}: captions must be {len(images)} strings, got {len(captions)}")
        self.name = name
        self.images = images
        self.image_size = int(images.shape[1])
        self.captions: Sequence[str] = list(captions)
        self.skipped: Counter[str] = Counter(skipped or {})

    def __len__(self) -> int:
        return len(self.images)

    def load(self, i: int) -> np.ndarray:
        return self.images[i]


def load_pairs(spec: str, *, image_size: int, split: str = "train", seed: int = 0) -> Pairs:
    """Opens a data set by name.

    Args:
        spec: "shapes", "emoji", or the path of a folder of pictures and .txt captions.
        image_size: side in pixels of the built-in sets; folders keep their own sizes.
        split: "train", "test", "zero" for shapes; "train", "heldout" for emoji; a folder is all
            "train".
        seed: which pictures of the endless set `shapes`; unused elsewhere.

    Raises:
        UsageError: unknown split.
        DataError: no such folder, or nothing usable in it.
        EnvironmentProblem: the emoji packages are not installed.
    """
    if spec == "shapes":
        from dalle.data.shapes_pairs import ShapesPairs

        return ShapesPairs(split, image_size=image_size, seed=seed)
    if spec == "emoji":
        from dalle.data.emoji import load_emoji

        return load_emoji(image_size, split)
    if not Path(spec).is_dir():
        found = "a file" if Path(spec).exists() else "no such folder"
        raise DataError(
            f"data: spec must be one of {', '.join(BUILT_IN)} or a folder, got {spec!r} ({found})"
        )
    if split != "train":
        raise UsageError(f"data: split of a folder must be 'train', got {split!r}")
    from dalle.data.folder import FolderPairs

    return FolderPairs(Path(spec))


def load_or_skip(
    pairs: Pairs,
    indices: Sequence[int] | np.ndarray,
    transform: Callable[[np.ndarray, int], np.ndarray] | None = None,
    *,
    some: bool = True,
) -> tuple[list[np.ndarray], list[int]]:
    """Loads pictures; one that does not decode is counted in `pairs.skipped` and left out.

    Args:
        pairs: where from.
        indices: which.
        transform: applied to each picture and its place in `indices`, in that order.
        some: whether one at least must decode.

    Returns:
        The pictures, and their places in `indices`. Both may be shorter than `indices`.

    Raises:
        DataError: not one of them decodes, where some must.
    """
    images, places, reason = [], [], ""
    for place, i in enumerate(indices):
        try:
            image = pairs.load(int(i))
        except DataError as error:
            reason = str(error)
            pairs.skipped["does not decode"] += 1
            continue
        images.append(image if transform is None else transform(image, place))
        places.append(place)
    if some and not images and len(indices):
        raise DataError(f"{pairs.name}: a batch must hold a picture that decodes, got {reason}")
    return images, places


def load_or_draw(
    pairs: Pairs,
    indices: Sequence[int] | np.ndarray,
    seed: Callable[[int], int],
    transform: Callable[[np.ndarray, int], np.ndarray],
) -> tuple[list[np.ndarray], np.ndarray]:
    """Loads as many pictures as are asked for: where one does not decode, another is drawn.

    So a batch keeps its size, and what stands at a place of it depends on nothing but the place,
    however many processes share the batch out. Each that does not decode is counted in
    `pairs.skipped`.

    Args:
        pairs: where from.
        indices: which.
        seed: of the draws at a place in `indices`.
        transform: applied to each picture and its place.

    Returns:
        The pictures, and which they are, int64.

    Raises:
        DataError: none of those drawn for a place decodes.
    """
    images, items = [], []
    for place, i in enumerate(indices):
        item, draws, reason = int(i), None, ""
        for _ in range(DRAWS):
            try:
                image = pairs.load(item)
                break
            except DataError as error:
                reason = str(error)
            pairs.skipped["does not decode"] += 1
            draws = draws or np.random.default_rng(seed(place))
            item = int(draws.integers(len(pairs)))
        else:
            raise DataError(f"{pairs.name}: a batch must hold a picture that decodes, got {reason}")
        images.append(transform(image, place))
        items.append(item)
    return images, np.array(items, dtype=np.int64)


def fingerprints(pairs: Pairs) -> dict[str, str]:
    """Hashes of "captions" and "pictures", in their order.

    Of a folder's pictures all bytes count, of those of a kind that is not from here some samples.
    """
    captions, pictures = hashlib.sha256(), hashlib.sha256()
    for caption in pairs.captions:
        captions.update(caption.encode("utf-8", "surrogatepass") + b"\0")
    if isinstance(pairs, ArrayPairs):
        pictures.update(np.ascontiguousarray(pairs.images).data)
    elif hasattr(pairs, "digests"):
        for digest in pairs.digests():
            pictures.update(digest)
    else:
        for i in np.linspace(0, len(pairs) - 1, min(SAMPLES, len(pairs))).astype(int):
            with suppress(DataError):
                pictures.update(np.ascontiguousarray(pairs.load(int(i))).data)
    found = {"captions": captions, "pictures": pictures}
    return {name: f"SHA-256 {digest.hexdigest()[:16]}" for name, digest in found.items()}


class BatchSampler:
    """The order of training: each item once an epoch, batches run across epoch ends.

    Batch `step` is a slice of the concatenated permutations of epochs 0, 1, 2, ..., so it is a pure
    function of (seed, step) and a resumed run needs no state.

    Args:
        num_items: size of the set, at least 1.
        batch_size: items a batch, at least 1; need not divide num_items and may exceed it.
        seed: which order.

    Raises:
        UsageError: a size below 1.
    """

    def __init__(self, num_items: int, batch_size: int, seed: int) -> None:
        for label, value in (("num_items", num_items), ("batch_size", batch_size)):
            if value < 1:
                raise UsageError(f"BatchSampler: {label} must be at least 1, got {value}")
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self._orders: dict[int, np.ndarray] = {}  # the epochs in use; at most a few

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            rng = np.random.default_rng((self.seed, epoch))
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = rng.permutation(self.num_items)
        return self._orders[epoch]

    def indices(self, step: int) -> np.ndarray:
        """The items of batch `step` >= 0, (batch_size,) int64."""
        if step < 0:
            raise UsageError(f"BatchSampler: step must be at least 0, got {step}")
        position, end = step * self.batch_size, (step + 1) * self.batch_size
        pieces = []
        while position < end:
            epoch, offset = divmod(position, self.num_items)
            piece = self._order(epoch)[offset : offset + end - position]
            pieces.append(piece)
            position += len(piece)
        return np.concatenate(pieces).astype(np.int64, copy=False)
