"""Drawing the tokens that an edit does not keep, given those that it keeps.

Kept tokens before the first redrawn one are a prime. A kept token behind a redrawn one is put in
its place and weighs the candidates (`dalle.prior.particles`), which are drawn in groups.

Letters: S samples of a group, N = h * w tokens, K image vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dalle.configs import integer
from dalle.errors import UsageError
from dalle.prior.decode import Decoder, Drawn, decoder_options, draw_parts, not_finite
from dalle.prior.particles import Weights
from dalle.prior.sampling import (
    RESAMPLING,
    DrawConfig,
    SamplingConfig,
    all_finite,
    caption_key,
    draw,
    log_likelihood,
    uniform_noise,
)
from dalle.prior.step import SupportsDecoding, check_weights

GROUP = 256  # candidates that are weighted against each other at most


@dataclass(frozen=True)
class Weighted(Drawn):
    """What a group has drawn after a step.

    Attributes:
        log_weights: (1, S) float64, comparable between groups of an edit.
        resampled: how many times the group was drawn anew.
    """

    log_weights: Tensor
    resampled: int


def is_weighted(keep: Tensor) -> bool:
    """Whether a kept token comes after a redrawn one; keep is (N,) bool."""
    return bool((~keep[:-1] & keep[1:]).any())


def draw_edited(
    prior: SupportsDecoding,
    text: Tensor,
    given: Tensor,
    keep: Tensor,
    config: DrawConfig,
    *,
    group: int = GROUP,
) -> Generator[Drawn]:
    """Draws candidates of one edit, and hands over after every step what there is.

    Redrawn tokens are drawn as by `generate`, from the same noise. Where no kept token comes after
    a redrawn one, that is all, and the steps are those of `draw_parts`. Else they are `Weighted`: a
    kept token multiplies a candidate's weight by the probability that the model gives it, at the
    temperature and with the guidance; top_k and top_p bound only what is drawn. Where the effective
    number of candidates of a group falls below half, all are drawn anew from it, by noise that is a
    function of (seed, caption, number of the group's first candidate, slot). At temperature 1
    without top_k, top_p and guidance, weighted candidates follow the model's distribution of the
    redrawn tokens given all kept ones, exact in the limit of large groups.

    Args:
        prior: the model; its mode is put back afterwards.
        text: (1, text_len - 1) int64 with PAD.
        given: (N,) int64, the tokens of the picture; those that are not kept are not read.
        keep: (N,) bool, True where a token is kept; neither all nor none.
        config: `num_samples` candidates in all; `max_batch` counts where none is weighted.
        group: candidates drawn at a time where they are; another number gives other candidates.

    Raises:
        UsageError: shapes, token ranges or options that do not fit; before anything is drawn.
        NumericalError: logits that are NaN or infinite.
    """
    slots = prior.config.num_image_tokens
    prior.check_text(text)
    if len(text) != 1:
        raise UsageError(f"edit: text must be of one caption, got {len(text)}")
    group = integer("edit", "group", group, 1)
    (first_sample,) = config.first(1)
    check_weights(config.weights, prior.start_of_text.device)
    if keep.dtype != torch.bool or tuple(keep.shape) != (slots,):
        raise UsageError(f"edit: keep must be ({slots},) bool, got {tuple(keep.shape)}")
    if bool(keep.all()) or not bool(keep.any()):
        raise UsageError(f"edit: keep must keep 1 to {slots - 1} tokens, got {int(keep.sum())}")
    given = torch.where(keep, given.cpu(), 0)[None]
    prior.check_image_tokens(given, slots, 1)
    if not is_weighted(keep):
        return draw_parts(prior, text, config, given[:, : int(keep.sum())])
    total = config.num_samples
    groups = [range(left, min(left + group, total)) for left in range(0, total, group)]
    options = decoder_options(config, group)
    return _weighted(prior, text, given, keep.tolist(), config, first_sample, groups, options)


@torch.no_grad()
def _weighted(
    prior: SupportsDecoding,
    text: Tensor,
    given: Tensor,
    kept: list[bool],
    config: DrawConfig,
    first_sample: int,
    groups: list[range],
    options: dict[str, Any],
) -> Generator[Drawn]:
    """The work of `draw_edited` where candidates are weighted."""
    sampling, seed = config.sampling, config.seed
    device, slots = prior.start_of_text.device, len(kept)
    first, last = kept.index(False), slots - 1 - kept[::-1].index(False)
    key = caption_key(text[0, :0] if sampling.cond_scale == 0 else text[0].cpu())
    # top_k and top_p would give a kept token behind them no chance at all.
    whole = SamplingConfig(temperature=sampling.temperature)
    given = given.to(device)
    training = prior.training
    prior.eval()
    decoder: Decoder | None = None
    try:
        for number, columns in enumerate(groups):
            samples = len(columns)
            if decoder is None or decoder.samples != samples:
                del decoder  # its cache goes before the next one comes
                decoder = Decoder(prior, 1, samples, **options)
            decoder.set_text(text, given[:, :first])
            numbers = range(first_sample + columns.start, first_sample + columns.stop)
            noise = uniform_noise(seed, key, numbers, slots).T.contiguous().to(device)  # (N, S)
            particles = Weights(
                1, samples, uniform_noise(seed, key, numbers[:1], slots, RESAMPLING), device
            )
            tokens = given[:, None].repeat(1, samples, 1)
            # Read once, at the end: reading it makes the host wait for a GPU.
            finite = torch.ones((), dtype=torch.bool, device=device)
            for slot in range(first, slots):
                logits = decoder.step(slot, tokens[:, :, slot - 1] if slot else None)
                finite &= all_finite(logits)
                if kept[slot]:
                    likelihood = log_likelihood(logits, tokens[:, :, slot], whole)
                    index = particles.observe(likelihood, slot, resample=slot < last)
                    if index is not None:
                        tokens = tokens.gather(1, index[..., None].expand_as(tokens))
                        decoder.reorder(index)
                else:
                    tokens[0, :, slot] = draw(logits[0], noise[slot], sampling)
                done = slot + 1 == slots
                if done and not finite:
                    raise not_finite(sampling)
                place = range(1), columns, slot + 1, tokens, done, number, len(groups)
                yield Weighted(*place, particles.log, particles.resampled)
    finally:
        prior.train(training)
