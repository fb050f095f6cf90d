"""The evidence lower bound (ELB) of pictures, with hard tokens and beta = 1 (paper Eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor

import dalle_ext
from dalle.dvae.likelihood import logit_laplace_log_prob, map_pixels
from dalle.dvae.model import CHANNELS, DiscreteVAE


@torch.no_grad()
def log_likelihood(vae: DiscreteVAE, images: Tensor, tokens: Tensor) -> Tensor:
    """ln f(x | z) of each picture, in nats (a density of the mapped pixels).

    Args:
        vae: the model, in evaluation mode.
        images: (B, 3, H, W) in [0, 1].
        tokens: (B, h, w) int64.

    Returns:
        (B,).
    """
    maps = vae.decoder_maps(tokens)
    values = logit_laplace_log_prob(map_pixels(images), maps[:, :CHANNELS], maps[:, CHANNELS:])
    return values.flatten(1).sum(1)


@torch.no_grad()
def lower_bound(vae: DiscreteVAE, images: Tensor, *, first: int = 0) -> Tensor:
    """ln f(x | z) - KL(q(z | x) to the uniform prior) of each picture, in nats.

    The tokens z are a draw from q, not its relaxation; always the same one for a picture's place.

    Args:
        vae: the model, in evaluation mode.
        images: (B, 3, H, W) in [0, 1].
        first: number of pictures before these in a larger batch.

    Returns:
        (B,).
    """
    logits = vae.logits(images)
    before = first * logits.shape[2] * logits.shape[3]
    drawn = dalle_ext.gumbel_softmax(logits, 1.0, dim=1, seed=0, first_row=before)
    return log_likelihood(vae, images, drawn.index) - drawn.kl.flatten(1).sum(1)
