"""Codebook health, and an initial codebook.

A dVAE trained for minutes from scratch collapses to a few dozen codes. The cure of the toy recipes
(not in the paper): train a continuous autoencoder first, cluster its codes, and set both 1x1
convolutions around the relaxation so that the logits are minus the squared distances to the
cluster centres. `docs/log.md` has the numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dalle.configs import integer, seed_number
from dalle.dvae.likelihood import map_pixels
from dalle.dvae.model import DiscreteVAE
from dalle.dvae.straight_through import require_same_width, set_codebook
from dalle.errors import UsageError

MIN_SPREAD = 1e-4  # of a feature's mean square; logits then stay below 1e5 times the sharpness
SEED_POINTS = 8  # points a centre that k-means++ draws from; more cost time and give little


class CodebookHealth(NamedTuple):
    """How much of the codebook a set of tokens uses.

    Attributes:
        used: number of different codes.
        size: K.
        perplexity: exp of the entropy of the code frequencies, 1 .. K.
    """

    used: int
    size: int
    perplexity: float

    def collapsed(self, num_tokens: int) -> bool:
        """Whether under 5 % of the codes that could have been used were, or a single one (needs
        >= 4 K tokens)."""
        least = min(self.size, max(2, 0.05 * self.size))
        return num_tokens >= 4 * self.size and self.used < least

    def in_words(self) -> str:
        """One line for a person."""
        share = 100 * self.used / self.size
        return (
            f"{self.used} of {self.size} codes used ({share:.0f} %), "
            f"perplexity {self.perplexity:.0f}"
        )


def codebook_health(counts: Tensor) -> CodebookHealth:
    """Health from the count of each code, (K,) integers."""
    total = counts.sum().clamp_min(1)
    share = counts.double() / total
    entropy = -(share * share.clamp_min(1e-300).log()).sum()
    return CodebookHealth(int((counts > 0).sum()), len(counts), float(entropy.exp()))


def kmeans(points: Tensor, num_centers: int, *, iterations: int, seed: int) -> tuple[Tensor, float]:
    """Lloyd's algorithm from k-means++; empty clusters restart at the farthest points.

    Args:
        points: (N, C) float, N >= num_centers.
        num_centers: clusters.
        iterations: passes over the points.
        seed: of the choice of first centres.

    Returns:
        (num_centers, C) centres and the mean squared distance to the nearest of them.

    Raises:
        UsageError: fewer points than centres, no centre, a bad seed.
    """
    num_centers, iterations = (
        integer("kmeans", name, value, minimum)
        for name, value, minimum in (("num_centers", num_centers, 1), ("iterations", iterations, 0))
    )
    seed = seed_number("kmeans", seed)
    if len(points) < num_centers:
        raise UsageError(f"kmeans: points must be at least {num_centers}, got {len(points)}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(points), generator=generator, dtype=torch.int64, device="cpu")[
        : SEED_POINTS * num_centers
    ]
    centers = _plus_plus(points[order].cpu(), num_centers, generator).to(points.device)
    for _ in range(iterations):
        nearest, distance = _nearest(points, centers)
        counts = torch.bincount(nearest, minlength=num_centers)
        sums = torch.zeros_like(centers).index_add_(0, nearest, points)
        centers = sums / counts.clamp_min(1)[:, None]
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty):
            centers[empty] = points[distance.topk(len(empty)).indices]
    return centers, float(_nearest(points, centers)[1].mean())


def _plus_plus(points: Tensor, num_centers: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): each next centre is a point drawn with
    probability proportional to its squared distance from the centres so far."""
    draws = torch.rand(num_centers, generator=generator, dtype=torch.float64, device="cpu")
    centers = points[:num_centers].clone()  # the first point stays: the order is random
    distance = torch.full_like(points[:, 0], torch.inf)
    for i in range(1, num_centers):
        distance = torch.minimum(distance, (points - centers[i - 1]).square().sum(1))
        mass = distance.cumsum(0, dtype=torch.float64)
        index = torch.searchsorted(mass, draws[i] * mass[-1], right=True)
        centers[i] = points[index.clamp_max(len(points) - 1)]
    return centers


def _nearest(points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest centre of each point and the squared distance to it."""
    norms = centers.square().sum(1)
    index, distance = [], []
    for part in points.split(4096):
        value, where = torch.addmm(norms, part, centers.t(), alpha=-2).min(1)
        index.append(where)
        distance.append(value + part.square().sum(1))
    return torch.cat(index), torch.cat(distance).clamp_min(0)


@torch.no_grad()
def init_codebook(
    vae: DiscreteVAE,
    images: Tensor,
    *,
    sharpness: float | None,
    iterations: int,
    max_points: int,
    seed: int,
) -> float:
    """Sets the codebook to cluster centres of the encoder's features on `images`.

    Afterwards the logits are -sharpness * |feature - centre|^2 / (mean squared distance), up to a
    term equal for all codes, and the decoder's codebook vectors are the centres. Where the images
    have hardly more different features than there are codes, that distance is close to 0; then a
    minimum is used instead, which keeps the logits exact in fp32. Without sharpness the codebook is
    set as by `straight_through.set_codebook`.

    Args:
        vae: a model with a patch stem, or without sharpness any of equal widths.
        images: (N, 3, H, W) in [0, 1].
        sharpness: how peaked the first logits are, or None.
        iterations: passes of k-means.
        max_points: features clustered at most (a random subset).
        seed: of the subset and the first centres.

    Returns:
        The mean squared distance of a feature to its centre.
    """
    if sharpness is None:
        require_same_width("init_codebook", vae.config)
    elif vae.config.stem != "patch":
        raise UsageError(f"init_codebook: stem must be 'patch', got {vae.config.stem!r}")
    features = [vae.encoder.features(map_pixels(part)) for part in images.split(256)]
    points = torch.cat([f.permute(0, 2, 3, 1).flatten(0, 2) for f in features])
    generator = torch.Generator().manual_seed(seed_number("init_codebook", seed))
    max_points = integer("init_codebook", "max_points", max_points, 1)
    if len(points) > max_points:
        points = points[
            torch.randperm(len(points), generator=generator, dtype=torch.int64, device="cpu")[
                :max_points
            ]
        ]
    # Not the seed of the subset.
    kmeans_seed = int(
        torch.randint(2**31, (), generator=generator, dtype=torch.int64, device="cpu")
    )
    centers, spread = kmeans(points, vae.num_tokens, iterations=iterations, seed=kmeans_seed)
    if sharpness is None:
        set_codebook(vae, centers)
        return spread
    min_spread = MIN_SPREAD * float(points.square().sum(1).mean())
    scale = sharpness / max(spread, min_spread, 1e-12)
    logits_conv, codebook_conv = vae.encoder.logits_conv(), vae.decoder.codebook_conv()
    logits_conv.w.copy_(2 * scale * centers[:, :, None, None])
    logits_conv.b.copy_(-scale * centers.square().sum(1))
    codebook_conv.w.copy_(centers.t()[:, :, None, None])
    codebook_conv.b.zero_()
    return spread
