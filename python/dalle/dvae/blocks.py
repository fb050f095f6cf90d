"""Encoder and decoder of the discrete VAE: parameter names and shapes of the released ones.

Pre-activation bottleneck blocks without normalisation; the residual branch is multiplied by
1 / n_layers^2 (paper A.1). Module names are the released ones, so those weights fit. Letters: B
batch, K codebook size, H and W pixels, h and w grid positions, n_hid width of the last-resolution
block.

The patch form (`stem="patch"`) is ours, for small pictures and minutes on a CPU: one
convolution cuts the picture into patches, blocks work at grid resolution, and a last 1x1
convolution paints each patch. `docs/log.md` has the comparison.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle.devices import without_autocast

ENCODER_KERNELS = (3, 3, 3, 1)
DECODER_KERNELS = (1, 3, 3, 3)  # mirrored: the 1x1 comes first


class Conv2d(nn.Module):
    """Stride-1, zero-padded convolution whose parameters are named `w` and `b`, as released.

    With `fp32` it is computed so in a training of bf16 too, as the released last ones.
    """

    def __init__(
        self, n_in: int, n_out: int, kw: int, *, stride: int = 1, fp32: bool = False
    ) -> None:
        super().__init__()
        self.kw, self.stride, self.fp32 = kw, stride, fp32
        self.w = nn.Parameter(torch.empty(n_out, n_in, kw, kw, dtype=torch.float32))
        self.b = nn.Parameter(torch.zeros(n_out, dtype=torch.float32))
        nn.init.normal_(self.w, std=1 / math.sqrt(n_in * kw**2))

    def forward(self, x: Tensor) -> Tensor:
        if self.fp32:
            with without_autocast(x):
                return self._convolve(x.float())
        return self._convolve(x)

    def _convolve(self, x: Tensor) -> Tensor:
        if self.kw == 1:  # a matrix product over channels; free of copies for channels-last x
            y = F.linear(x.permute(0, 2, 3, 1), self.w[:, :, 0, 0], self.b)
            return y.permute(0, 3, 1, 2)
        padding = 0 if self.stride > 1 else (self.kw - 1) // 2
        return F.conv2d(x, self.w, self.b, stride=self.stride, padding=padding)


class Block(nn.Module):
    """Bottleneck of four convolutions; the skip path has a 1x1 where the width changes.

    Args:
        n_in, n_out: channels.
        n_layers: blocks of the whole stack; the branch is multiplied by 1 / n_layers^2.
        kernels: sides of the convolutions, `ENCODER_KERNELS` or `DECODER_KERNELS`.
    """

    def __init__(self, n_in: int, n_out: int, n_layers: int, kernels: Sequence[int]) -> None:
        super().__init__()
        n_hid = n_out // 4
        self.post_gain = 1 / n_layers**2
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths = (n_in, n_hid, n_hid, n_hid, n_out)
        parts: list[tuple[str, nn.Module]] = []
        for i, kw in enumerate(kernels):
            parts.append((f"relu_{i + 1}", nn.ReLU()))
            parts.append((f"conv_{i + 1}", Conv2d(widths[i], widths[i + 1], kw)))
        self.res_path = _sequence(*parts)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.id_path(x).float() + self.post_gain * self.res_path(x)
        return out


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, h, w), in fp32."""

    def __init__(self, width: int) -> None:
        super().__init__(width, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float().permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PatchBlock(nn.Module):
    """x + conv_2(relu(conv_1(norm(x)))): a per-position network, or one with 3x3 context."""

    def __init__(self, width: int, kw: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(width)
        self.conv_1 = Conv2d(width, 2 * width if kw == 1 else width, kw)
        self.conv_2 = Conv2d(2 * width if kw == 1 else width, width, 1)
        nn.init.zeros_(self.conv_2.w)  # starts as the identity

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.conv_2(F.relu(self.conv_1(self.norm(x))))
        return x.float() + branch


def channels_last(x: Tensor) -> Tensor:
    """x (B, C, H, W) with C innermost in memory, which all that follows keeps.

    Then 1x1 convolutions are products without copies, and the Gumbel-softmax finds the codes of a
    position side by side.
    """
    return x.contiguous(memory_format=torch.channels_last)


def straight_through(features: Tensor, vectors: Tensor) -> Tensor:
    """`vectors`, to the bit; their gradient goes to `features` as it is. Of equal shapes."""
    return vectors.detach() + (features - features.detach())


def _sequence(*parts: tuple[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(parts))


def _groups(
    n_in: int,
    widths: Sequence[int],
    n_blk: int,
    kernels: Sequence[int],
    between: str,
    resize: Callable[[], nn.Module],
) -> list[tuple[str, nn.Module]]:
    """A group of `n_blk` blocks for each of `widths`; between two of them `resize()`."""
    groups: list[tuple[str, nn.Module]] = []
    for group, n_out in enumerate(widths, 1):
        inner: list[tuple[str, nn.Module]] = []
        for index in range(1, n_blk + 1):
            inner.append((f"block_{index}", Block(n_in, n_out, len(widths) * n_blk, kernels)))
            n_in = n_out
        if group < len(widths):
            inner.append((between, resize()))
        groups.append((f"group_{group}", _sequence(*inner)))
    return groups


class Encoder(nn.Module):
    """Mapped pixels (B, 3, H, W) -> logits (B, K, h, w) over the codebook (paper A.1)."""

    def __init__(
        self, *, group_count: int, n_hid: int, n_blk_per_group: int, vocab_size: int, channels: int
    ) -> None:
        super().__init__()
        widths = [n_hid * 2**group for group in range(group_count)]
        pool = partial(nn.MaxPool2d, 2)
        self.blocks = _sequence(
            ("input", Conv2d(channels, n_hid, 7)),
            *_groups(n_hid, widths, n_blk_per_group, ENCODER_KERNELS, "pool", pool),
            (
                "output",
                _sequence(
                    ("relu", nn.ReLU()), ("conv", Conv2d(widths[-1], vocab_size, 1, fp32=True))
                ),
            ),
        )

    def forward(self, mapped: Tensor) -> Tensor:
        logits: Tensor = self.blocks(channels_last(mapped))
        return logits

    def logits_conv(self) -> Conv2d:
        """The 1x1 convolution that gives the logits."""
        conv = self.blocks.get_submodule("output.conv")
        assert isinstance(conv, Conv2d)
        return conv

    def features(self, mapped: Tensor) -> Tensor:
        """What the logits convolution takes: (B, width, h, w)."""
        x = channels_last(mapped)
        for name, part in self.blocks.named_children():
            x = part.get_submodule("relu")(x) if name == "output" else part(x)
        return x


class Decoder(nn.Module):
    """One-hot or relaxed tokens (B, K, h, w) -> (B, 6, H, W): mu of R, G, B, then ln b (A.1)."""

    def __init__(
        self,
        *,
        group_count: int,
        n_hid: int,
        n_blk_per_group: int,
        vocab_size: int,
        channels: int,
        n_init: int,
    ) -> None:
        super().__init__()
        widths = [n_hid * 2**group for group in reversed(range(group_count))]
        repeat = partial(nn.Upsample, scale_factor=2, mode="nearest")
        self.blocks = _sequence(
            ("input", Conv2d(vocab_size, n_init, 1)),
            *_groups(n_init, widths, n_blk_per_group, DECODER_KERNELS, "upsample", repeat),
            (
                "output",
                _sequence(("relu", nn.ReLU()), ("conv", Conv2d(n_hid, 2 * channels, 1, fp32=True))),
            ),
        )

    def codebook_conv(self) -> Conv2d:
        """The first 1x1 convolution, whose weight columns are the codebook."""
        conv = self.blocks.get_submodule("input")
        assert isinstance(conv, Conv2d)
        return conv

    def from_codes(self, codes: Tensor) -> Tensor:
        """The rest of the decoder, from the codebook convolution's output on."""
        for name, part in self.blocks.named_children():
            if name != "input":
                codes = part(codes)
        return codes

    def forward(self, tokens: Tensor) -> Tensor:
        return self.from_codes(self.codebook_conv()(tokens))


class PatchEncoder(Encoder):
    """The encoder in the patch form: one patch convolution, then blocks at grid resolution."""

    def __init__(
        self, *, patch: int, n_hid: int, n_blk: int, n_init: int, vocab_size: int, channels: int
    ) -> None:
        nn.Module.__init__(self)
        blocks = [(f"block_{i}", PatchBlock(n_hid, 1)) for i in range(1, n_blk + 1)]
        self.blocks = _sequence(
            ("input", Conv2d(channels, n_hid, patch, stride=patch)),
            *blocks,
            ("context", PatchBlock(n_hid, 3)),
            ("norm", ChannelNorm(n_hid)),
            ("code", Conv2d(n_hid, n_init, 1)),
            (
                "output",
                _sequence(
                    ("relu", nn.Identity()), ("conv", Conv2d(n_init, vocab_size, 1, fp32=True))
                ),
            ),
        )


class PatchDecoder(Decoder):
    """The decoder in the patch form: blocks at grid resolution, then each position paints."""

    def __init__(
        self, *, patch: int, n_hid: int, n_blk: int, n_init: int, vocab_size: int, channels: int
    ) -> None:
        nn.Module.__init__(self)
        blocks = [(f"block_{i}", PatchBlock(n_hid, 1)) for i in range(1, n_blk + 1)]
        self.blocks = _sequence(
            ("input", Conv2d(vocab_size, n_init, 1)),
            ("widen", Conv2d(n_init, n_hid, 1)),
            ("context_1", PatchBlock(n_hid, 3)),
            *blocks,
            ("context_2", PatchBlock(n_hid, 3)),
            ("last", PatchBlock(n_hid, 1)),
            ("norm", ChannelNorm(n_hid)),
            ("output", Conv2d(n_hid, 2 * channels * patch**2, 1, fp32=True)),
            ("paint", nn.PixelShuffle(patch)),
        )
