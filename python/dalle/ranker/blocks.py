"""The two towers of `dalle.ranker.model.ContrastiveRanker`.

Shape letters: B captions or pictures, L text slots, H = W side of a picture in pixels, E width of
the shared space.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dalle.configs import UPPER_LIMITS, Named, check_numbers
from dalle.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class RankerConfig(Named):
    """Size of a `ContrastiveRanker`.

    Args:
        vocab_size: ids of the tokenizer.
        image_size: side of a picture in pixels, a multiple of `grid`.
        text_len: caption slots; longer captions are cut.
        grid: rows and columns of patches a picture is cut into, even.
        width: channels of both towers, a multiple of 32.
        depth: residual blocks at each of the two image resolutions, and layers of the text tower.
        embed_dim: E.
    """

    vocab_size: int = 16384
    image_size: int = 256
    text_len: int = 32
    grid: int = 8
    width: int = 96
    depth: int = 2
    embed_dim: int = 256

    def __post_init__(self) -> None:
        check_numbers("ranker", self, {**UPPER_LIMITS, "vocab_size": 2**24})
        for name in ("vocab_size", "image_size", "text_len", "grid", "width", "depth", "embed_dim"):
            if getattr(self, name) < 1:
                raise UsageError(f"ranker: {name} must be at least 1, got {getattr(self, name)}")
        if self.grid % 2 or self.image_size % self.grid:
            raise UsageError(
                f"ranker: grid must be even and divide image_size = {self.image_size}, "
                f"got {self.grid}"
            )
        if self.width % 32:
            raise UsageError(f"ranker: width must be a multiple of 32, got {self.width}")


PRESETS = {
    "tiny": RankerConfig(),
    "small": RankerConfig(grid=16, width=192, depth=3),
    "base": RankerConfig(grid=16, width=512, depth=6, embed_dim=512),
}


class ResidualBlock(nn.Module):
    """x + conv1x1(silu(conv3x3(silu(norm(x)))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width, dtype=torch.float32)
        self.conv_1 = nn.Conv2d(width, width, 3, padding=1, dtype=torch.float32)
        self.conv_2 = nn.Conv2d(width, width, 1, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch: torch.Tensor = self.conv_2(F.silu(self.conv_1(F.silu(self.norm(x)))))
        return x + branch


class ImageTower(nn.Module):
    """Patches, residual blocks at two resolutions, then a small net over all positions.

    (B, 3, H, W) in [0, 1] -> (B, E). The last net sees each position by itself (no averaging),
    since captions speak of "left of" and "above".
    """

    def __init__(self, config: RankerConfig) -> None:
        super().__init__()
        narrow, wide = config.width // 3 * 2 // 8 * 8, config.width
        patch = config.image_size // config.grid
        self.stem = nn.Conv2d(3, narrow, patch, patch, dtype=torch.float32)
        self.place = nn.Parameter(
            torch.randn(narrow, config.grid, config.grid, dtype=torch.float32) * 0.02
        )
        self.fine = nn.Sequential(*[ResidualBlock(narrow) for _ in range(config.depth)])
        self.down = nn.Conv2d(narrow, wide, 2, 2, dtype=torch.float32)
        self.coarse = nn.Sequential(*[ResidualBlock(wide) for _ in range(config.depth)])
        self.norm = nn.GroupNorm(8, wide, dtype=torch.float32)
        self.narrow = nn.Conv2d(wide, wide // 2, 1, dtype=torch.float32)
        self.hidden = nn.Linear(
            wide // 2 * (config.grid // 2) ** 2, config.embed_dim, dtype=torch.float32
        )
        self.out = nn.Linear(config.embed_dim, config.embed_dim, dtype=torch.float32)

    @property
    def embedding_tables(self) -> list[nn.Parameter]:
        """As `Prior.embedding_tables`."""
        return [self.place]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.fine(self.stem(images * 2 - 1) + self.place)
        x = F.silu(self.norm(self.coarse(self.down(x).float())))
        features: torch.Tensor = self.out(F.silu(self.hidden(self.narrow(x).flatten(1))))
        return features


class TextTower(nn.Module):
    """A transformer over the caption's tokens that all see each other, averaged: (B, E)."""

    def __init__(self, config: RankerConfig) -> None:
        super().__init__()
        width = config.width
        self.token = nn.Embedding(config.vocab_size, width, dtype=torch.float32)
        self.place = nn.Parameter(torch.randn(config.text_len, width, dtype=torch.float32) * 0.02)
        nn.init.normal_(self.token.weight, std=1.0)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                width // 32,
                2 * width,
                0.0,
                F.gelu,
                batch_first=True,
                norm_first=True,
                dtype=torch.float32,
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, dtype=torch.float32)
        self.out = nn.Linear(width, config.embed_dim, dtype=torch.float32)

    @property
    def embedding_tables(self) -> list[nn.Parameter]:
        """As `Prior.embedding_tables`."""
        return [self.place]

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        text = text[:, : max(1, int((text >= 0).sum(1).max()))]  # drops slots that no caption uses
        blank = text < 0
        blank[:, 0] = False  # an empty caption still has one slot to average
        x = self.token(text.clamp_min(0)) + self.place[: text.shape[1]]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=blank)
        weight = (~blank).float()[..., None]
        features: torch.Tensor = self.out((self.norm(x) * weight).sum(1) / weight.sum(1))
        return features
