"""Batches of captions that differ in a word or two, for the ranker's training."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dalle.configs import integer

Similarity = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
POOL = 2048  # captions among which similar ones are searched


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


def draw_similar(
    vectors: CaptionVectors, caption_ids: torch.Tensor, size: int, group: int, rng: torch.Generator
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

    Returns:
        (size,) int64 indices.
    """

    def similarity(first: torch.Tensor, pool: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        same = caption_ids[first][:, None] == caption_ids[pool][None]
        return vectors.products(first, pool), same

    return draw_groups(len(caption_ids), similarity, size, group, rng)


def draw_groups(
    count: int, similar: Similarity, size: int, group: int, rng: torch.Generator
) -> torch.Tensor:
    """`draw_similar` of `count` items.

    Args:
        count: how many items there are.
        similar: (M,) and (P,) items -> the similarity of their captions, (M, P), and whether they
            are equal, (M, P) bool.
        size, group, rng: as there.
    """
    size, group = integer("ranker", "size", size, 1), integer("ranker", "group", group, 1)
    first = torch.randint(count, (size // group,), generator=rng, dtype=torch.int64, device="cpu")
    if group == 1:
        return first
    pool = torch.randint(count, (pool_size(count),), generator=rng, dtype=torch.int64, device="cpu")
    similarity, same = similar(first, pool)
    similarity += (
        torch.rand(similarity.shape, generator=rng, dtype=torch.float32, device="cpu") * 0.05
    )
    similarity[same] -= 2.0
    neighbours = pool[similarity.topk(group - 1, dim=1).indices]
    return torch.cat([first[:, None], neighbours], 1).flatten()
