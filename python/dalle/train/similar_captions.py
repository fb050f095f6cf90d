"""Batches of captions that differ in a word or two, for the ranker's training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dalle.configs import integer
from dalle.data.order import BLOCK, MixtureSampler, sampler_for
from dalle.data.pairs import Pairs

Similarity = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
POOL = 2048  # captions among which similar ones are searched
LEAST_POOL = 64  # of a part of a mixture, however small its weight


class CaptionVectors(NamedTuple):
    """Captions as bags of tokens weighted by rarity; the product of two is their similarity.

    Attributes:
        tokens: (N, L) int64, padded with 0.
        weights: (N, L), each row of length 1; 0 at padding and where a token comes again.
        vocab_size: V.
    """

    tokens: torch.Tensor
    weights: torch.Tensor
    vocab_size: int

    def dense(self, items: torch.Tensor) -> torch.Tensor:
        """(M,) indices -> (M, V)."""
        rows = torch.zeros(len(items), self.vocab_size, dtype=torch.float32, device="cpu")
        return rows.scatter_add_(1, self.tokens[items], self.weights[items])

    def products(self, items: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """(M,) and (P,) indices -> (M, P): `dense(items) @ dense(others).T`, computed sparsely."""
        return F.embedding_bag(
            self.tokens[others],
            self.dense(items).T.contiguous(),
            per_sample_weights=self.weights[others],
            mode="sum",
        ).T


def _counted(text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of each row in order, and 1 where one comes first, else 0."""
    tokens = text.sort(1).values
    counted = (tokens >= 0).float()
    counted[:, 1:] *= tokens[:, 1:] != tokens[:, :-1]
    return tokens.clamp_min(0), counted


def token_rarity(text: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """(V,) -log of the share of captions, (N, L) ids padded with -1, that hold a token."""
    tokens, counted = _counted(text)
    share = torch.zeros(vocab_size, dtype=torch.float32, device="cpu").index_add_(
        0, tokens.flatten(), counted.flatten()
    )
    return -(share / max(len(text), 1)).clamp_min(1 / max(len(text), 1)).log()


def caption_vectors(
    text: torch.Tensor, vocab_size: int, rarity: torch.Tensor | None = None
) -> CaptionVectors:
    """Vectors of captions, (N, L) ids padded with -1; `rarity` is theirs if left out."""
    if rarity is None:
        rarity = token_rarity(text, vocab_size)
    tokens, counted = _counted(text)
    return CaptionVectors(
        tokens, F.normalize(counted * rarity.clamp_min(0.05)[tokens], dim=1), vocab_size
    )


def pool_size(count: int) -> int:
    """How many of `count` pairs a step searches for similar captions."""
    return min(POOL, 4 * count)


class Parts(NamedTuple):
    """What a batch takes from the parts of a mixture.

    Attributes:
        items: (size,) int64 of the mixture's order; the first of each group stays.
        numbers: (size,) int64, the part of each; neighbours are of the part that stands there.
        pools: of each part (its first item, the item after its last, captions to search).
    """

    items: torch.Tensor
    numbers: torch.Tensor
    pools: Sequence[tuple[int, int, int]]


class PartsByWeight:
    """Gives `Parts` by the weights of a mixture.

    A batch has as many items of each part as the mixture's order has in that batch, so as many as
    the other trainings see, however much captions of two parts differ. Sorted by part, so that
    nearly all groups are of one.

    Args:
        sampler: the order.
        group: items a group.
    """

    def __init__(self, sampler: MixtureSampler, group: int) -> None:
        self.sampler, self.group = sampler, group
        self.sizes = [int(size) for size in sampler.sizes]
        self.counts = [int(count) for count in sampler.counts]  # of each `BLOCK` items
        starts = [int(first) for first in sampler.firsts]
        self.pools = [
            (start, start + size, min(4 * size, max(count * POOL // BLOCK, LEAST_POOL, group - 1)))
            for start, size, count in zip(starts, self.sizes, self.counts, strict=True)
        ]

    def at(self, step: int) -> Parts:
        """Those of batch `step`, a pure function of it."""
        items = self.sampler.indices(step)
        numbers = np.searchsorted(self.sampler.firsts, items, "right") - 1
        if self.group > 1:
            order = np.argsort(numbers, kind="stable")
            items, numbers = items[order], numbers[order]
        return Parts(torch.from_numpy(items), torch.from_numpy(numbers), self.pools)

    def epoch(self, step: int, item: int) -> int:
        """How often the part of an item has been gone through before batch `step`."""
        number = next(n for n, (_, end, _) in enumerate(self.pools) if item < end)
        before = step * self.sampler.batch_size * self.counts[number] // BLOCK
        return before // self.sizes[number]


def parts_by_weight(pairs: Pairs, size: int, group: int, seed: int) -> PartsByWeight | None:
    """That of a mixture with weights; None of any other set.

    Args:
        pairs: the set.
        size: batch size, a multiple of `group`.
        group: items a group.
        seed: which order.
    """
    sampler = sampler_for(pairs, size, seed)
    return PartsByWeight(sampler, group) if isinstance(sampler, MixtureSampler) else None


def draw_similar(
    vectors: CaptionVectors,
    caption_ids: torch.Tensor,
    size: int,
    group: int,
    rng: torch.Generator,
    parts: Parts | None = None,
) -> torch.Tensor:
    """Draws a batch in groups: one item at random, then those with the most similar captions.

    Neighbours come from a random pool with a little noise, so that groups differ from step to step;
    never one with the very same caption.

    Args:
        vectors: of N captions.
        caption_ids: (N,) equal where captions are.
        size: batch size, a multiple of `group`.
        group: items a group.
        rng: source of all choices.
        parts: of a mixture, whose order and weights are then followed.

    Returns:
        (size,) int64 indices.
    """

    def similarity(first: torch.Tensor, pool: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        same = caption_ids[first][:, None] == caption_ids[pool][None]
        return vectors.products(first, pool), same

    return draw_groups(len(caption_ids), similarity, size, group, rng, parts)


def draw_groups(
    count: int,
    similar: Similarity,
    size: int,
    group: int,
    rng: torch.Generator,
    parts: Parts | None = None,
) -> torch.Tensor:
    """`draw_similar` of `count` items.

    Args:
        count: how many items there are.
        similar: (M,) and (P,) items -> the similarity of their captions, (M, P), and whether they
            are equal, (M, P) bool.
        size, group, rng, parts: as there.
    """
    size, group = integer("ranker", "size", size, 1), integer("ranker", "group", group, 1)
    if parts is None:
        first = torch.randint(
            count, (size // group,), generator=rng, dtype=torch.int64, device="cpu"
        )
        numbers = torch.zeros(len(first), group, dtype=torch.int64, device="cpu")
        pools: Sequence[tuple[int, int, int]] = [(0, count, pool_size(count))]
    else:
        first, pools = parts.items[::group], parts.pools
        numbers = parts.numbers.view(-1, group)
    if group == 1:
        return first
    groups = first[:, None].repeat(1, group)
    for number, (start, end, searched) in enumerate(pools):
        wanted = numbers[:, 1:] == number
        rows = wanted.any(1).nonzero().flatten()
        if not len(rows):
            continue
        pool = torch.randint(
            start, end, (searched,), generator=rng, dtype=torch.int64, device="cpu"
        )
        similarity, same = similar(first[rows], pool)
        similarity += (
            torch.rand(similarity.shape, generator=rng, dtype=torch.float32, device="cpu") * 0.05
        )
        similarity[same] -= 2.0
        wanted = wanted[rows]
        best = pool[similarity.topk(int(wanted.sum(1).max()), dim=1).indices]
        nth = (wanted.cumsum(1) - 1).clamp_min(0)
        groups[rows, 1:] = torch.where(wanted, best.gather(1, nth), groups[rows, 1:])
    return groups.flatten()
