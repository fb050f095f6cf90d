"""The prior: one transformer over caption and image tokens (paper 2.2, appendix B).

The stream has text_len + N positions, N = rows * columns: start-of-text, the caption's tokens, a
learned embedding per position where there is none; then start-of-image and all image tokens but
the last. Image slot p carries token p - 1, the row and column of slot p, and predicts token p.

Letters: B batch, T = text_len + N, d width, V text vocabulary, K image vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dalle_ext
from dalle.configs import check_options, field_names
from dalle.errors import UsageError
from dalle.plan import parameters
from dalle.pretrained import Pretrained, from_presets
from dalle.prior.blocks import KeysValues, Layer, Resblock
from dalle.prior.config import IMAGE_WEIGHT, PAD, PRESETS, TEXT_WEIGHT, PriorConfig
from dalle.prior.decode import generate
from dalle.prior.sampling import DrawConfig, SamplingConfig


class PriorOutput(NamedTuple):
    """One forward pass.

    Attributes:
        loss: text_loss / 8 + 7 image_loss / 8.
        text_loss, image_loss: cross-entropy in nats per counted token.
        text_logits: (B, text_len - 1, V) fp32; entry i predicts text[:, i].
        image_logits: (B, N, K) fp32; entry p predicts image_tokens[:, p].
    """

    loss: Tensor
    text_loss: Tensor
    image_loss: Tensor
    text_logits: Tensor
    image_logits: Tensor


class Prior(Pretrained[PriorConfig]):
    """The transformer; see the head of this file for the stream it reads."""

    config_type = PriorConfig

    def __init__(self, config: PriorConfig) -> None:
        super().__init__(config)
        c = config
        d = c.d_model
        classes = c.text_vocab + (c.text_targets == "padded")
        self.start_of_text = nn.Parameter(torch.empty(d, dtype=torch.float32))
        self.start_of_image = nn.Parameter(torch.empty(d, dtype=torch.float32))
        self.text_embedding = nn.Embedding(c.text_vocab, d, dtype=torch.float32)
        self.text_position = nn.Parameter(torch.empty(c.text_len, d, dtype=torch.float32))
        self.text_padding = nn.Parameter(torch.empty(c.text_len, d, dtype=torch.float32))
        rank = c.image_rank or d
        self.image_embedding = nn.Embedding(c.image_vocab, rank, dtype=torch.float32)
        narrow = bool(c.image_rank)
        self.image_widen = (
            nn.Linear(rank, d, bias=False, dtype=torch.float32) if narrow else nn.Identity()
        )
        self.image_row = nn.Parameter(torch.empty(c.grid[0], d, dtype=torch.float32))
        self.image_column = nn.Parameter(torch.empty(c.grid[1], d, dtype=torch.float32))
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_layers))
        self.norm = nn.LayerNorm(d, dtype=torch.float32)
        self.text_head = nn.Linear(d, classes, dtype=torch.float32)
        self.image_narrow = (
            nn.Linear(d, rank, bias=False, dtype=torch.float32) if narrow else nn.Identity()
        )
        self.image_head = nn.Linear(rank, c.image_vocab, dtype=torch.float32)
        self.patterns = c.patterns()
        self.init_weights()

    def init_weights(self) -> None:
        """The initialisation of Child et al. 2019, which the paper refers to (B.1)."""
        c = self.config
        token, position = (c.init_gain / math.sqrt(c.d_model * n) for n in (1, 2))
        tokens = (self.start_of_text, self.start_of_image, self.text_padding)
        for table in (*tokens, self.text_embedding.weight, self.image_embedding.weight):
            nn.init.normal_(table, std=token)
        nn.init.normal_(self.text_position, std=c.init_gain / math.sqrt(c.d_model))
        for table in (self.image_row, self.image_column):
            nn.init.normal_(table, std=position)
        for head in (self.text_head, self.image_head):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        for part in (self.image_widen, self.image_narrow):
            if isinstance(part, nn.Linear):
                nn.init.orthogonal_(part.weight)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.init_weights(c.num_layers, c.init_gain)

    def resblocks(self) -> dict[str, Resblock]:
        """Name -> residual block, two for each layer, in the order in which they run."""
        return {n: m for n, m in self.named_modules() if isinstance(m, Resblock)}

    def compute_in_(self, precision: str) -> None:
        """Draws in another precision: the resblocks' matrices are rounded to it, and stored in it.

        Args:
            precision: as of `PriorConfig`. Of a prior of 16 bits, "fp32" restores no digits.
        """
        half = precision != "fp32"
        self.config = replace(self.config, precision=precision, half_weights=half)
        for block in self.resblocks().values():
            block.compute_in_(self.config.compute_dtype)

    @property
    def embedding_tables(self) -> list[nn.Parameter]:
        """Tables like those of `nn.Embedding`, whose gradients are not compressed either."""
        return [self.text_position, self.text_padding, self.image_row, self.image_column]

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """A new model of size "tiny", "small", "base", "1b" or "12b"; `overrides` replace fields.

        Raises:
            UsageError: unknown preset or field, or a value out of range.
        """
        return cls(from_presets(cls.__name__, PRESETS, name, **overrides))

    @classmethod
    def min_parameters(cls, config: PriorConfig) -> int:
        """Exact, except that narrow image tables (`image_rank`) are not counted."""
        count = parameters(config)["total"]
        return count - 2 * (config.d_model + 1) * config.image_vocab if config.image_rank else count

    def embed_text(self, text: Tensor) -> Tensor:
        """(B, text_len - 1) tokens, PAD where there is none -> (B, text_len, d) fp32."""
        embedded = self.text_embedding(text.clamp_min(0)) + self.text_position[1:]
        embedded = torch.where((text == PAD)[:, :, None], self.text_padding[1:], embedded)
        start = (self.start_of_text + self.text_position[0]).expand(len(text), 1, -1)
        return torch.cat([start, embedded], 1)

    def image_positions(self) -> Tensor:
        """(N, d): row plus column embedding of each slot in raster order."""
        return (self.image_row[:, None] + self.image_column[None]).flatten(0, 1)

    def embed_image(self, image_tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, N) tokens -> (B, N, d) fp32; the last token is never an input.

        `keep`, (B, N) bool, drops the embedding of tokens where it is False.
        """
        embedded = self.image_widen(self.image_embedding(image_tokens[:, :-1]))
        if keep is not None:
            embedded = embedded * keep[:, :-1, None]
        start = self.start_of_image.expand(len(image_tokens), 1, -1)
        return torch.cat([start, embedded], 1) + self.image_positions()

    def run_layers(
        self, x: Tensor, patterns: tuple[dalle_ext.AttentionPattern, ...]
    ) -> tuple[Tensor, list[KeysValues]]:
        """(B, T, d) -> the same after all layers and the last norm; keys and values for a cache."""
        cached = []
        recompute = self.config.checkpointing and self.training and torch.is_grad_enabled()
        for layer, pattern in zip(self.layers, patterns, strict=True):
            if recompute:
                x, _ = checkpoint(layer.attention, x, pattern, use_reentrant=False)
                x = checkpoint(layer.mlp, x, use_reentrant=False)
            else:
                x, keys_values = layer(x, pattern)
                cached.append(keys_values)
        return self.norm(x), cached

    def forward(
        self, text: Tensor, image_tokens: Tensor, *, keep: Tensor | None = None
    ) -> PriorOutput:
        """Losses and logits of captions with their images.

        Args:
            text: (B, text_len - 1) int64 in [0, V), PAD (-1) where there is no token.
            image_tokens: (B, N) int64 in [0, K), raster order.
            keep: (B, N) bool; image tokens not kept are missing from the input, not from the loss.

        Raises:
            UsageError: shapes, dtypes or token ranges that do not fit.
        """
        c = self.config
        self.check_text(text)
        self.check_image_tokens(image_tokens, c.num_image_tokens, len(text))
        x = torch.cat([self.embed_text(text), self.embed_image(image_tokens, keep)], 1)
        x, _ = self.run_layers(x, self.patterns)
        text_logits = self.text_head(x[:, : c.text_len - 1])
        image_logits = self.image_head(self.image_narrow(x[:, c.text_len :]))
        target = text
        if c.text_targets == "padded":
            target = torch.where(text == PAD, c.text_vocab, text)
        text_loss = F.cross_entropy(
            text_logits.flatten(0, 1), target.flatten(), ignore_index=PAD, reduction="sum"
        ) / (target != PAD).sum().clamp_min(1)
        image_loss = F.cross_entropy(image_logits.flatten(0, 1), image_tokens.flatten())
        loss = TEXT_WEIGHT * text_loss + IMAGE_WEIGHT * image_loss
        return PriorOutput(loss, text_loss, image_loss, text_logits, image_logits)

    def generate(
        self,
        text: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        cond_scale: float = 1.0,
        cache_bits: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Draws images for captions: `dalle.prior.decode.generate` with this model.

        Equivalent to sampling one token at a time from `forward`'s logits.

        Args:
            text: (B, text_len - 1) int64, PAD where there is no token.
            temperature, top_k, top_p, cond_scale, cache_bits: of `SamplingConfig`.
            options: of `DrawConfig` but `sampling`; prime, progress: see there.

        Returns:
            (B, num_samples, rows, columns) int64.

        Raises:
            UsageError: shapes, token ranges or options that do not fit.
            NumericalError: logits that are NaN or infinite.
        """
        known = {*field_names(SamplingConfig), *field_names(DrawConfig), "prime", "progress"}
        check_options("generate", options, sorted(known - {"sampling"}))
        sampling = SamplingConfig(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            cond_scale=cond_scale,
            cache_bits=cache_bits,
        )
        return generate(self, text, sampling=sampling, **options)

    def check_text(self, text: Tensor) -> None:
        """Raises UsageError unless text is (B, text_len - 1) int64 of tokens and PAD."""
        c, shape = self.config, _shape(text)
        if len(shape) != 2 or shape[1] != c.text_len - 1 or text.dtype != torch.int64:
            want = f"(B, {c.text_len - 1}) int64"
            raise UsageError(f"Prior: text must be {want}, got {_described(text)}")
        _check_range("text", text, PAD, c.text_vocab)

    def check_image_tokens(self, tokens: Tensor, length: int, batch: int) -> None:
        """Raises UsageError unless tokens are (batch, length) int64 in [0, K)."""
        if _shape(tokens) != (batch, length) or tokens.dtype != torch.int64:
            want = f"({batch}, {length}) int64 for the grid {self.config.grid}"
            raise UsageError(f"Prior: image_tokens must be {want}, got {_described(tokens)}")
        _check_range("image_tokens", tokens, 0, self.config.image_vocab)


def _shape(x: Any) -> tuple[int, ...]:
    """Of a tensor; () of anything else."""
    return tuple(x.shape) if isinstance(x, Tensor) else ()


def _described(x: Any) -> str:
    return f"{_shape(x)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__


def _check_range(name: str, tokens: Tensor, low: int, high: int) -> None:
    if tokens.numel() == 0 or tokens.device.type != "cpu":
        return  # a read would stall the stream; on a GPU the embedding look-up checks
    lowest, highest = (int(v) for v in torch.aminmax(tokens))
    if lowest < low or highest >= high:
        got = lowest if lowest < low else highest
        raise UsageError(f"Prior: {name} must lie in {low} .. {high - 1}, got {got}")
