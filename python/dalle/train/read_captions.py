"""Captions of a set that is too large to keep the tokens of all, read when a step needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from dalle.data.pairs import (
    Pairs,
    captions_of,
    draw_caption,
    evenly_spaced,
    leave_out,
    number_of_captions,
)
from dalle.errors import DataError, UsageError
from dalle.train.seeds import step_seed
from dalle.train.similar_captions import Parts, caption_vectors, draw_groups, token_rarity

MAX_KEPT = 100_000  # captions: of larger sets they are read and tokenized step by step
SAMPLE = 20_000  # items whose captions say how rare a token is


def are_many(pairs: Pairs) -> bool:
    """Whether the captions of a set are more than are kept."""
    return number_of_captions(pairs) > MAX_KEPT


class ReadCaptions:
    """The captions of a set for a ranker's batches. Nothing of them stays in memory.

    Args:
        pairs: the set.
        encode: B captions -> (B, L) int64 ids on the CPU, padded with -1.
        vocab_size: V.

    Raises:
        UsageError: captions that do not differ.
    """

    def __init__(
        self, pairs: Pairs, encode: Callable[[Sequence[str]], Tensor], vocab_size: int
    ) -> None:
        self.pairs, self.encode, self.vocab_size = pairs, encode, vocab_size
        sample = []
        for item in evenly_spaced(len(pairs), SAMPLE).tolist():
            with suppress(DataError):  # left out, and said, where it is trained on
                sample.append(captions_of(pairs, item)[0])
        if len(set(sample)) < 2:
            raise UsageError("ranker: pairs must hold two different captions, got fewer")
        self.rarity = token_rarity(encode(sample), vocab_size)

    def draw(
        self, size: int, group: int, rng: torch.Generator, parts: Parts | None = None
    ) -> Tensor:
        """(size,) items in groups of similar captions, as `similar_captions.draw_similar`."""

        def similarity(first: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
            text = self.encode([self._first(item) for item in torch.cat([first, pool]).tolist()])
            vectors = caption_vectors(text, self.vocab_size, self.rarity)
            rows = torch.arange(len(text), dtype=torch.int64, device="cpu").split(
                [len(first), len(pool)]
            )
            ids = ids_of(text)
            return vectors.products(*rows), ids[rows[0]][:, None] == ids[rows[1]][None]

        return draw_groups(len(self.pairs), similarity, size, group, rng, parts)

    def _first(self, item: int) -> str:
        """The first caption of an item; "" where it cannot be read, nor its picture soon."""
        try:
            return captions_of(self.pairs, item)[0]
        except DataError:
            return ""

    def text(self, items: Sequence[int], seed: int, epochs: Sequence[int]) -> Tensor:
        """(B, L) ids of a caption of each item; of several one is drawn each epoch, of which
        `epochs` has each item's."""
        captions = []
        for item, epoch in zip(items, epochs, strict=True):
            try:
                seeds = partial(step_seed, seed, epoch, 2, item)
                captions.append(draw_caption(self.pairs, item, seeds))
            except DataError as error:  # its shard has gone since its picture was read
                leave_out(self.pairs, item, error)
                captions.append("")
        return self.encode(captions)


def ids_of(text: Tensor) -> Tensor:
    """(N,) numbers that are equal where rows of (N, L) ids are."""
    ids: Tensor = torch.unique(text, dim=0, return_inverse=True)[1]
    return ids
