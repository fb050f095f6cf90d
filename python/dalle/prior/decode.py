"""Drawing images token by token with a cache (paper 2.6).

The text is read once per caption and shared by all samples of it. Each layer keeps the keys and
values of the image slots in tensors of fixed size, and a step reads only those its pattern sees.

Letters: B captions, S samples of each, H heads, D head size, N image slots, K image vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor, nn

import dalle_ext
from dalle.configs import integer
from dalle.errors import NumericalError, UsageError
from dalle.prior.blocks import AttentionBlock, KeysValues, Layer
from dalle.prior.config import PAD, PriorConfig
from dalle.prior.sampling import (
    MAX_SEED,
    PAPER,
    SamplingConfig,
    caption_key,
    draw,
    first_numbers,
    uniform_noise,
)

Progress = Callable[[int, int], None]


class SupportsDecoding(Protocol):
    """What this file needs of a `Prior`, which calls it."""

    training: bool
    patterns: tuple[dalle_ext.AttentionPattern, ...]
    layers: nn.ModuleList
    norm: nn.LayerNorm
    start_of_text: nn.Parameter
    start_of_image: nn.Parameter
    image_embedding: nn.Embedding
    image_head: nn.Linear

    @property
    def config(self) -> PriorConfig: ...
    @property
    def image_widen(self) -> nn.Module: ...
    @property
    def image_narrow(self) -> nn.Module: ...
    def embed_text(self, text: Tensor) -> Tensor: ...
    def embed_image(self, image_tokens: Tensor) -> Tensor: ...
    def image_positions(self) -> Tensor: ...
    def run_layers(
        self, x: Tensor, patterns: tuple[dalle_ext.AttentionPattern, ...]
    ) -> tuple[Tensor, list[KeysValues]]: ...
    def check_text(self, text: Tensor) -> None: ...
    def check_image_tokens(self, tokens: Tensor, length: int, batch: int) -> None: ...
    def eval(self) -> Self: ...
    def train(self, mode: bool = True) -> Self: ...


def attended_slots(pattern: dalle_ext.AttentionPattern, slot: int) -> slice | Tensor:
    """The image slots that `slot` sees, itself included, as an index along the slots.

    Row, column and causal are slices, so reading them copies nothing.
    """
    columns = pattern.grid[1]
    if pattern.kind == "row":
        return slice(max(0, slot - columns), slot + 1)
    if pattern.kind == "column":
        return slice(slot % columns, slot + 1, columns)
    if pattern.kind == "causal":
        return slice(0, slot + 1)
    return torch.tensor(
        [slot - o for o in reversed(pattern.offsets) if o <= slot],
        dtype=torch.int64,
        device="cpu",
    )


class DecodeState:
    """The cache of one branch (with or without the caption) of B captions with S samples each.

    Args:
        prior: in evaluation mode.
        text: (B, text_len - 1) with PAD; prefilled here in one pass.
        num_samples: S.
        prime: (B, n) image tokens that every sample starts with, n < N.
    """

    def __init__(
        self, prior: SupportsDecoding, text: Tensor, num_samples: int, prime: Tensor
    ) -> None:
        self.prior, self.num_samples = prior, num_samples
        c = prior.config
        batch, primed = prime.shape
        x = prior.embed_text(text)
        if primed:  # attention is causal: the filler after the prime has no effect
            filler = prime.new_zeros(batch, c.num_image_tokens - primed)
            x = torch.cat([x, prior.embed_image(torch.cat([prime, filler], 1))], 1)
            _, keys_values = prior.run_layers(x, prior.patterns)
        else:
            text_only = dalle_ext.AttentionPattern("causal", text_len=c.text_len - 1, grid=(1, 1))
            _, keys_values = prior.run_layers(x, (text_only,) * c.num_layers)
        self.positions = prior.image_positions()
        self.text: list[tuple[Tensor, Tensor]] = []
        self.image: list[tuple[Tensor, Tensor]] = []
        for pair in keys_values:
            self.text.append((pair.keys[:, :, : c.text_len], pair.values[:, :, : c.text_len]))
            heads, size = pair.keys.shape[1], pair.keys.shape[3]
            cache = []
            for states in pair:
                slots = states.new_empty(batch, num_samples, heads, c.num_image_tokens, size)
                slots[:, :, :, :primed] = states[:, None, :, c.text_len : c.text_len + primed]
                cache.append(slots)
            self.image.append((cache[0], cache[1]))

    def step(self, slot: int, previous: Tensor | None) -> Tensor:
        """Logits of the token at `slot`.

        Args:
            slot: image slots are filled in order.
            previous: (B, S) tokens of slot - 1; None at slot 0.

        Returns:
            (B, S, K) fp32.
        """
        prior = self.prior
        batch = self.image[0][0].shape[0]
        if previous is None:
            x = prior.start_of_image.expand(batch * self.num_samples, 1, -1)
        else:
            x = prior.image_widen(prior.image_embedding(previous.reshape(-1, 1)))
        x = x + self.positions[slot]
        for index, layer in enumerate(prior.layers):
            assert isinstance(layer, Layer)
            x = self._attend(index, layer.attention, slot, x)
            x = layer.mlp(x)
        logits: Tensor = prior.image_head(prior.image_narrow(prior.norm(x)))
        return logits.view(batch, self.num_samples, -1)

    def _attend(self, index: int, block: AttentionBlock, slot: int, x: Tensor) -> Tensor:
        """The attention resblock for one position of every sample; x is (B * S, 1, d)."""
        query, key, value = block.project(x)  # (B * S, H, 1, D)
        image_keys, image_values = self.image[index]
        text_keys, text_values = self.text[index]
        batch, samples, heads, _, size = image_keys.shape
        image_keys[:, :, :, slot] = key.view(batch, samples, heads, size)
        image_values[:, :, :, slot] = value.view(batch, samples, heads, size)
        visible = attended_slots(self.prior.patterns[index], slot)
        queries = query.view(batch, samples, heads, 1, size)
        shared = queries[:, :, :, 0].transpose(1, 2)  # (B, H, S, D): all samples against one text
        text_scores = (shared @ text_keys.transpose(-2, -1)).transpose(1, 2)  # (B, S, H, text)
        image_scores = (queries @ image_keys[:, :, :, visible].transpose(-2, -1))[:, :, :, 0]
        scores = torch.cat([text_scores, image_scores], -1).float() / math.sqrt(size)
        weights = scores.softmax(-1).to(query.dtype)
        text_weights, image_weights = weights.split(
            [text_keys.shape[2], scores.shape[-1] - text_keys.shape[2]], -1
        )
        mixed = (text_weights.transpose(1, 2) @ text_values).transpose(1, 2)
        mixed = mixed + (image_weights[:, :, :, None] @ image_values[:, :, :, visible])[:, :, :, 0]
        return block.merge(x, mixed.reshape(batch * samples, heads, 1, size))


@torch.no_grad()
def generate(
    prior: SupportsDecoding,
    text: Tensor,
    *,
    num_samples: int = 1,
    sampling: SamplingConfig = PAPER,
    prime: Tensor | None = None,
    seed: int = 0,
    first_sample: int | Sequence[int] = 0,
    max_batch: int = 256,
    progress: Progress | None = None,
) -> Tensor:
    """Draws image tokens for captions.

    Args:
        prior: the model; its mode is put back afterwards.
        text: (B, text_len - 1) int64, PAD where there is no token; not changed.
        num_samples: S, images of each caption.
        sampling: temperature, top_k, top_p (which act after the temperature) and cond_scale. The
            caption-free branch of guidance reads padding only, so train with `caption_dropout` for
            scales above 1.
        prime: (B, n) int64, the first n tokens of each image in raster order, kept as they are.
        seed: the noise is a function of (seed, caption, number of the sample, step) alone, so an
            image does not depend on what else is drawn, nor on `max_batch` (but logits of batches
            of other sizes may differ in their last bits). A caption that comes twice gets the same
            images twice. With `cond_scale` 0 all captions are the empty one.
        first_sample: number of the first sample, to continue an earlier call; or one number for
            each caption.
        max_batch: images drawn at a time.
        progress: called as progress(tokens drawn, tokens in all).

    Returns:
        (B, S, rows, columns) int64.

    Raises:
        UsageError: shapes, token ranges or options that do not fit.
        NumericalError: logits that are NaN or infinite.
    """
    c = prior.config
    prior.check_text(text)
    num_samples = integer("generate", "num_samples", num_samples, 1)
    max_batch = integer("generate", "max_batch", max_batch, 1)
    seed = integer("generate", "seed", seed, 0, MAX_SEED)
    first = first_numbers("generate", "first_sample", first_sample, len(text))
    if prime is None:
        prime = text.new_empty(len(text), 0)
    _check_prime(prior, prime, len(text))
    if sampling.cond_scale == 0:
        text = torch.full_like(text, PAD)
    keys = [caption_key(row) for row in text.cpu()]
    device = prior.start_of_text.device
    text, prime = (x.to(device) for x in (text, prime))
    slots, max_samples = c.num_image_tokens, min(num_samples, max_batch)
    max_captions = max(1, max_batch // max_samples)
    parts = [
        (rows, columns)
        for rows in torch.arange(len(text), dtype=torch.int64, device="cpu").split(max_captions)
        for columns in torch.arange(num_samples, dtype=torch.int64, device="cpu").split(max_samples)
        if len(rows)
    ]
    out = torch.empty(len(text), num_samples, slots, dtype=torch.int64, device="cpu")
    training = prior.training
    prior.eval()
    try:
        for index, (rows, columns) in enumerate(parts):

            def report(done: int, before: int = index) -> None:
                if progress is not None:
                    progress(before * slots + done, len(parts) * slots)

            start, stop = int(columns[0]), int(columns[-1]) + 1
            noise = [
                uniform_noise(seed, keys[row], range(first[row] + start, first[row] + stop), slots)
                for row in rows.tolist()
            ]
            out[rows[:, None], columns[None]] = _generate(
                prior,
                text[rows],
                prime[rows],
                torch.stack(noise).to(device),
                sampling,
                report,
            )
    finally:
        prior.train(training)
    return out.view(len(text), num_samples, *c.grid)


def _generate(
    prior: SupportsDecoding,
    text: Tensor,
    prime: Tensor,
    noise: Tensor,
    sampling: SamplingConfig,
    report: Callable[[int], None],
) -> Tensor:
    """(B, S, N) tokens on the CPU for B captions; `noise` is (B, S, N) on the prior's device."""
    batch, samples, slots = noise.shape
    state = DecodeState(prior, text, samples, prime)
    uncond, cond_scale = None, sampling.cond_scale
    if cond_scale not in (0, 1):
        uncond = DecodeState(prior, torch.full_like(text, PAD), samples, prime)
    tokens = prime.new_empty(batch, samples, slots)
    tokens[:, :, : prime.shape[1]] = prime[:, None]
    finite = torch.ones((), dtype=torch.bool, device=tokens.device)  # read once, at the end
    for slot in range(prime.shape[1], slots):
        previous = tokens[:, :, slot - 1] if slot else None
        logits = state.step(slot, previous)
        if uncond is not None:
            base = uncond.step(slot, previous)
            logits = base + cond_scale * (logits - base)
        finite &= logits.isfinite().all()
        drawn = draw(logits.flatten(0, 1), noise[:, :, slot].flatten(), sampling)
        tokens[:, :, slot] = drawn.view(batch, samples)
        report(slot + 1)
    if not finite:
        hint = "" if uncond is None else f"; cond_scale {cond_scale} may be too large"
        raise NumericalError(f"generate: logits must be finite, got NaN or infinity{hint}")
    return tokens.cpu()


def _check_prime(prior: SupportsDecoding, prime: Tensor, batch: int) -> None:
    slots = prior.config.num_image_tokens
    if prime.dim() != 2 or len(prime) != batch or prime.shape[1] >= slots:
        want = f"({batch}, n) with n below {slots} for the grid {prior.config.grid}"
        raise UsageError(f"generate: prime must be {want}, got {tuple(prime.shape)}")
    prior.check_image_tokens(prime, prime.shape[1], batch)
