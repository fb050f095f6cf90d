"""Sizes of the prior and its presets (paper appendix B)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import dalle_ext
from dalle.configs import Named, check_numbers
from dalle.errors import UsageError
from dalle_ext.ops.sparse_attention import KINDS

PAD = -1
MAX_LENGTH = 2**20  # positions
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16-scaled": torch.float16}
TEXT_TARGETS = ("real", "padded")
TEXT_WEIGHT, IMAGE_WEIGHT = 1 / 8, 7 / 8


def layer_kinds(num_layers: int) -> tuple[str, ...]:
    """The pattern of each layer: column where (i - 2) mod 4 = 0, row elsewhere, conv in the last.

    Layers count from 1. Equivalent to the paper's 64: row, column, row, row, ..., conv.
    """
    kinds = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, num_layers + 1)]
    return (*kinds[:-1], "conv")


@dataclass(frozen=True, kw_only=True)
class PriorConfig(Named):
    """Sizes of the prior; the defaults are the paper's 12-billion-parameter model.

    Attributes:
        text_vocab, image_vocab: V and K.
        text_len: text positions, start-of-text included; a caption has up to text_len - 1 tokens.
        grid: (rows, columns) of image tokens.
        d_model, num_heads, num_layers: width, heads, layers of two resblocks each.
        kernel_size: odd width of the last layer's convolutional pattern.
        attention: the pattern of each layer; empty means the paper's schedule.
        precision: "fp32", "bf16" or "fp16-scaled", of everything inside the resblocks; the
            identity path, the norms and the logits are fp32. fp16 needs `ResblockScaler` to train.
        half_weights: store the matrices of the resblocks in that 16-bit type too, as the paper
            did; otherwise they are fp32 and rounded where they are used.
        checkpointing: recompute each resblock in the backward pass instead of keeping it.
        text_targets: "real" counts real text tokens in the text loss; "padded" also the padding
            after them, as one more class.
        init_gain: weights start as N(0, init_gain / sqrt(fan_in)).
        dropout: on the residual branches while training; the paper has none.
        image_rank: width of the image token table and of the image head's input, with a linear
            map to and from d_model; 0 is d_model itself, as in the paper. Narrow, the head costs
            less where d_model and layers are small beside K.
    """

    text_vocab: int = 16384
    image_vocab: int = 8192
    text_len: int = 256
    grid: tuple[int, int] = (32, 32)
    d_model: int = 3968
    num_heads: int = 62
    num_layers: int = 64
    kernel_size: int = 11
    attention: tuple[str, ...] = ()
    precision: str = "fp32"
    half_weights: bool = False
    checkpointing: bool = False
    text_targets: str = "real"
    init_gain: float = 0.125
    dropout: float = 0.0
    image_rank: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        object.__setattr__(self, "attention", tuple(self.attention))
        check_numbers("Prior", self)
        for name in ("text_vocab", "image_vocab", "text_len", "d_model", "num_heads", "num_layers"):
            minimum = 2 if name == "text_len" else 1
            self._require(getattr(self, name) >= minimum, name, f"at least {minimum}")
        fits = len(self.grid) == 2 and min(self.grid) >= 1
        self._require(fits, "grid", "(rows, columns) of at least 1")
        fits = self.length <= MAX_LENGTH
        self._require(fits, "text_len", f"such that with the grid it is at most {MAX_LENGTH}")
        self._require(self.init_gain > 0, "init_gain", "positive")
        self._require(self.d_model % self.num_heads == 0, "d_model", "a multiple of num_heads")
        odd = self.kernel_size >= 1 and self.kernel_size % 2 == 1
        self._require(odd, "kernel_size", "odd and at least 1")
        self._require(self.precision in DTYPES, "precision", f"one of {', '.join(DTYPES)}")
        fits = self.precision != "fp32" or not self.half_weights
        self._require(fits, "half_weights", "False where precision is fp32")
        known = self.text_targets in TEXT_TARGETS
        self._require(known, "text_targets", f"one of {', '.join(TEXT_TARGETS)}")
        self._require(0 <= self.dropout < 1, "dropout", "in [0, 1)")
        self._require(self.image_rank >= 0, "image_rank", "0 or more")
        fits = len(self.attention) in (0, self.num_layers)
        self._require(fits, "attention", "empty or one pattern for each layer")
        known = set(self.attention) <= set(KINDS)
        self._require(known, "attention", f"made of {', '.join(KINDS)}")

    def _require(self, holds: bool, name: str, requirement: str) -> None:
        if not holds:
            raise UsageError(f"Prior: {name} must be {requirement}, got {getattr(self, name)!r}")

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the computation inside the resblocks."""
        return DTYPES[self.precision]

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype in which the matrices of the resblocks are stored."""
        return self.compute_dtype if self.half_weights else torch.float32

    @property
    def num_image_tokens(self) -> int:
        """N = rows * columns."""
        return self.grid[0] * self.grid[1]

    @property
    def length(self) -> int:
        """T = text_len + N."""
        return self.text_len + self.num_image_tokens

    def patterns(self) -> tuple[dalle_ext.AttentionPattern, ...]:
        """The attention pattern of each layer; layers of one kind share one object."""
        kinds = self.attention or layer_kinds(self.num_layers)
        sizes: dict[str, Any] = {"text_len": self.text_len, "grid": self.grid}
        sizes["kernel_size"] = self.kernel_size
        by_kind = {kind: dalle_ext.AttentionPattern(kind, **sizes) for kind in set(kinds)}
        return tuple(by_kind[kind] for kind in kinds)


def _sizes(width: int, heads: int, layers: int, text_len: int, side: int, **others: Any) -> Any:
    """A preset: d_model, num_heads, num_layers, text_len and the side of a square grid."""
    sizes: dict[str, Any] = {
        "d_model": width,
        "num_heads": heads,
        "num_layers": layers,
        "text_len": text_len,
    }
    return PriorConfig(**sizes, grid=(side, side), **others)


PRESETS: dict[str, PriorConfig] = {
    "tiny": _sizes(128, 4, 4, 16, 8, text_vocab=2048, image_vocab=512, kernel_size=5),
    "small": _sizes(256, 4, 8, 64, 16, text_vocab=8192, image_vocab=2048),
    "base": _sizes(768, 12, 12, 256, 32),
    "1b": _sizes(1792, 28, 24, 256, 32, checkpointing=True),
    "12b": _sizes(3968, 62, 64, 256, 32, checkpointing=True),
}
