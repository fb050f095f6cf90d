"""Vector quantisation with straight-through gradients, beside the paper's relaxation (2.1).

A position takes the nearest codebook vector e_k to the encoder's feature z, and the gradient of the
decoder's input goes to z as it is (van den Oord et al. 2017, arXiv 1711.00937). The codebook gets
no gradient: it is the moving average of the features that its codes took (there, appendix A.1;
Razavi et al. 2019, arXiv 1906.00446). |z - e_k|^2 is |z|^2 less 2 z.e_k - |e_k|^2, so the
convolution that gives the logits holds 2 e_k and -|e_k|^2, and the argmax of the logits, which all
users of the model take, is the nearest code.

Letters: K codes, C width of a codebook vector, M points (positions) of an update.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dalle.dtensor import fill_, gather
from dalle.dvae.model import DiscreteVAE, DiscreteVAEConfig
from dalle.errors import UsageError

SMOOTHING = 1e-5  # Laplace smoothing of the counts, that of the authors' code
QUANTIZERS = ("gumbel", "straight-through")


def feature_width(config: DiscreteVAEConfig) -> int:
    """Channels of the encoder's features, that the logits are made of."""
    if config.stem == "patch":
        return config.n_init
    return int(config.n_hid * 2 ** (config.group_count - 1))


def require_same_width(owner: str, config: DiscreteVAEConfig) -> None:
    """Raises UsageError unless features and codebook vectors can be compared."""
    width = feature_width(config)
    if config.n_init != width:
        raise UsageError(
            f"{owner}: n_init must be {width}, the width of the encoder's features, with quantizer "
            f"straight-through, got {config.n_init}"
        )


def codebook_parameters(vae: DiscreteVAE) -> dict[str, nn.Parameter]:
    """Name -> parameter of the two convolutions that hold the codebook."""
    convs = (vae.encoder.logits_conv(), vae.decoder.codebook_conv())
    held = {id(parameter) for conv in convs for parameter in conv.parameters()}
    return {name: p for name, p in vae.named_parameters() if id(p) in held}


def freeze_codebook(vae: DiscreteVAE) -> None:
    """The codebook gets no gradient; before the model is spread over processes."""
    for parameter in codebook_parameters(vae).values():
        parameter.requires_grad_(False)


@torch.no_grad()
def set_codebook(vae: DiscreteVAE, vectors: Tensor) -> None:
    """Gives a model its codebook: `encode` then takes the nearest of the vectors.

    Args:
        vae: its features are as wide as the vectors.
        vectors: (K, C), the same on all processes.
    """
    logits_conv, codebook_conv = vae.encoder.logits_conv(), vae.decoder.codebook_conv()
    fill_(logits_conv.w, 2 * vectors[:, :, None, None])
    fill_(logits_conv.b, -vectors.square().sum(1))
    fill_(codebook_conv.w, vectors.t()[:, :, None, None].contiguous())
    fill_(codebook_conv.b, vectors.new_zeros(vectors.shape[1]))


@torch.no_grad()
def get_codebook(vae: DiscreteVAE) -> Tensor:
    """(K, C), the full codebook where the model is sharded. Collective."""
    return gather(vae.decoder.codebook_conv().w)[:, :, 0, 0].t().contiguous()


@torch.no_grad()
def takes_nearest(vae: DiscreteVAE) -> bool:
    """Whether the logits are those that `set_codebook` makes of the codebook. Collective."""
    vectors = get_codebook(vae)
    weight = gather(vae.encoder.logits_conv().w)[:, :, 0, 0]
    same = weight.shape == vectors.shape and torch.equal(weight, 2 * vectors)
    bias = gather(vae.encoder.logits_conv().b)
    same = same and torch.equal(bias, -vectors.square().sum(1))
    return bool(same and not gather(vae.decoder.codebook_conv().b).any())


def smoothed(counts: Tensor) -> Tensor:
    """(K,) counts with Laplace smoothing, of the same sum."""
    total = counts.sum()
    return (counts + SMOOTHING) / (total + len(counts) * SMOOTHING) * total


def moved(
    vectors: Tensor, counts: Tensor, new_counts: Tensor, new_sums: Tensor, decay: float
) -> tuple[Tensor, Tensor]:
    """The codebook and its counts after one update.

    N <- decay N + (1 - decay) n, S <- decay S + (1 - decay) s, e = S / smoothed(N). S is not kept:
    it is e smoothed(N), so that codebook and counts are the whole state.

    Args:
        vectors: e, (K, C).
        counts: N, (K,), points of an update that a code took, averaged.
        new_counts: n, (K,), of this update.
        new_sums: s, (K, C), the sums of these points.
        decay: weight of the past.
    """
    after = decay * counts + (1 - decay) * new_counts
    sums = decay * smoothed(counts)[:, None] * vectors + (1 - decay) * new_sums
    return sums / smoothed(after)[:, None], after


class MovingCodebook:
    """The codebook of a `DiscreteVAE`, moved after each update; counts lie with the model.

    Args:
        vae: on its device; its codebook is set already, or will be before `reset`.
        decay: weight of the past at each update, in [0, 1).
        device: of the model.
        sum_: sums a tensor in place over all processes, whose points are counted together.
    """

    def __init__(
        self, vae: DiscreteVAE, decay: float, device: torch.device, sum_: Callable[[Tensor], None]
    ) -> None:
        self._vae, self._decay, self._sum_ = vae, decay, sum_
        self.counts = torch.ones(vae.num_tokens, dtype=torch.float32, device=device)

    def reset(self, points: int) -> None:
        """Each code begins with an equal share of an update's `points`, over all processes."""
        self.counts.fill_(points / len(self.counts))

    def load_counts(self, values: Any) -> None:
        """Restores `counts.tolist()`. Raises UsageError where they are other numbers."""
        size, given = len(self.counts), values if isinstance(values, list) else []
        numbers = [float(x) for x in given if isinstance(x, int | float) and 0 <= x < math.inf]
        if len(numbers) != size or len(given) != size:
            raise UsageError(
                f"dvae: codebook_counts must be {size} numbers of 0 or more, got {len(numbers)}"
            )
        self.counts = torch.tensor(numbers, dtype=torch.float32, device=self.counts.device)

    @torch.no_grad()
    def update(
        self,
        features: Tensor,
        codes: Tensor,
        grad_norm: float | Tensor,
        *,
        window: Tensor | None = None,
        first: int = 0,
        total: int = 0,
        seed: int = 0,
    ) -> Tensor:
        """Moves the codebook to the points of an update. Collective.

        With `window` codes that no point of the window or of this update took are dead; each is
        revived as a random point of this update, with the weight of one point.

        Args:
            features: (M, C) float, this process's points.
            codes: (M,) int64, what they took.
            grad_norm: of the update; where it is not finite nothing moves, as the weights.
            window: (K,) counts over all processes since codes were last revived; None revives none.
            first: number of points on the processes before this one.
            total: points over all processes.
            seed: of the points that revive.

        Returns:
            The number of codes that were revived, 0-d int64 on the device.
        """
        vectors, counts = get_codebook(self._vae), self.counts
        new_counts = torch.bincount(codes, minlength=len(counts)).to(counts.dtype)
        sums = torch.zeros_like(vectors).index_add_(0, codes, features)
        both = torch.cat([sums, new_counts[:, None]], 1)
        self._sum_(both)
        sums, new_counts = both[:, :-1], both[:, -1]
        after, counts_after = moved(vectors, counts, new_counts, sums, self._decay)
        dead = torch.zeros_like(counts, dtype=torch.bool)
        if window is not None:
            dead = (window.to(counts.device) + new_counts) == 0
            fresh = self._random_points(features, dead, first, total, seed)
            after = torch.where(dead[:, None], fresh, after)
            counts_after = torch.where(dead, 1 - self._decay, counts_after)
        norm = torch.as_tensor(grad_norm, dtype=torch.float64, device=counts.device)
        good = norm.isfinite() & after.isfinite().all()
        set_codebook(self._vae, torch.where(good, after, vectors))
        self.counts = torch.where(good, counts_after, counts)
        return (dead & good).sum()

    def _random_points(
        self, features: Tensor, dead: Tensor, first: int, total: int, seed: int
    ) -> Tensor:
        """(K, C): a point for each dead code, different ones where there are enough."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(total, generator=generator, dtype=torch.int64, device="cpu")
        rank = (dead.cumsum(0) - 1).clamp_min(0) % total
        local = order.to(features.device)[rank] - first
        mine = (local >= 0) & (local < len(features))
        points = features[local.clamp(0, len(features) - 1)] * mine[:, None]
        self._sum_(points)
        return points
