"""The discrete VAE: pictures to a grid of tokens and back (paper 2.1, appendix A).

Letters: B batch, K codebook size, H and W pixels, h = H / factor, w = W / factor.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

import dalle_ext
from dalle.configs import UPPER_LIMITS, Named, check_numbers, integer
from dalle.devices import autocast
from dalle.dvae.blocks import (
    Block,
    Decoder,
    Encoder,
    PatchBlock,
    PatchDecoder,
    PatchEncoder,
    straight_through,
)
from dalle.dvae.likelihood import expected_pixels, logit_laplace_log_prob, map_pixels
from dalle.errors import UsageError
from dalle.pretrained import Pretrained, from_presets

CHANNELS = 3
STEMS = ("released", "patch")


@dataclass(frozen=True, kw_only=True)
class DiscreteVAEConfig(Named):
    """Sizes of the discrete VAE; the defaults are the released model's.

    Attributes:
        group_count: resolutions; the grid is 2^(group_count - 1) times coarser than the picture.
        n_hid: width of the blocks at full resolution, a multiple of 4 (of 8 with a patch stem).
        n_blk_per_group: residual blocks at each resolution; with a patch stem, per-position
            blocks in the encoder and in the decoder.
        n_init: width of a codebook vector.
        vocab_size: K, the number of codes.
        stem: "released", or "patch": blocks at grid resolution only (not in the paper).
        patch: pixels a token covers along each side, with the patch stem.
    """

    group_count: int = 4
    n_hid: int = 256
    n_blk_per_group: int = 2
    n_init: int = 128
    vocab_size: int = 8192
    stem: str = "released"
    patch: int = 8

    def __post_init__(self) -> None:
        check_numbers("DiscreteVAE", self, {**UPPER_LIMITS, "vocab_size": 2**24})
        for name in ("group_count", "n_hid", "n_blk_per_group", "n_init", "vocab_size", "patch"):
            if getattr(self, name) < 1:
                value = getattr(self, name)
                raise UsageError(f"DiscreteVAE: {name} must be at least 1, got {value}")
        if self.stem not in STEMS:
            raise UsageError(f"DiscreteVAE: stem must be one of {STEMS}, got {self.stem!r}")
        multiple = 4 if self.stem == "released" else 8
        if self.n_hid % multiple:
            raise UsageError(
                f"DiscreteVAE: n_hid must be a multiple of {multiple}, got {self.n_hid}"
            )

    @property
    def factor(self) -> int:
        """Pixels a token covers along each side."""
        return 2 ** (self.group_count - 1) if self.stem == "released" else self.patch


PRESETS = {
    "tiny": DiscreteVAEConfig(
        group_count=3, n_hid=32, n_blk_per_group=1, n_init=32, vocab_size=512
    ),
    "small": DiscreteVAEConfig(
        group_count=4, n_hid=64, n_blk_per_group=1, n_init=64, vocab_size=2048
    ),
    "base": DiscreteVAEConfig(n_hid=128),
    "paper": DiscreteVAEConfig(),
}


class DVAEOutput(NamedTuple):
    """What training needs of one forward pass; scalars are means over the batch.

    Attributes:
        loss: (-sum ln f + kl_weight * sum over positions of KL) / (H W 3), in nats per value.
        nll: -sum ln f / (H W 3), in nats per value; a density, may be negative.
        kl: KL to the uniform categorical in nats per position, 0 .. ln K.
        index: (B, h, w) int64, argmax of the noisy logits.
        mu: (B, 3, H, W), location of the likelihood on the logit scale.
        codes: (B, h, w) int64, argmax of the logits: the tokens that `encode` gives.
    """

    loss: Tensor
    nll: Tensor
    kl: Tensor
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index, the released API name
    mu: Tensor
    codes: Tensor


class VectorQuantized(NamedTuple):
    """What training with straight-through gradients needs of one forward pass.

    Attributes:
        mu: (B, 3, H, W), location of the likelihood on the logit scale.
        nll: -sum ln f / (H W 3), in nats per value, a mean over the batch.
        commitment: mean of (z - e)^2 over all numbers of the features, e without a gradient.
        codes: (B, h, w) int64, the nearest codes: the tokens that `encode` gives.
        features: (B, n_init, h, w) float32, z without a gradient.
    """

    mu: Tensor
    nll: Tensor
    commitment: Tensor
    codes: Tensor
    features: Tensor


class DiscreteVAE(Pretrained[DiscreteVAEConfig]):
    """Encoder, Gumbel-softmax relaxation and decoder.

    `encoder` and `decoder` carry the released parameter names; the encoder takes mapped pixels
    and gives logits, the decoder takes one-hot or relaxed tokens.

    Attributes:
        train_precision: "fp32" or "bf16", of the convolutions while in training mode; the identity
            path, the logits, the likelihood and the weights are fp32. Tokens always are of fp32.
    """

    config_type = DiscreteVAEConfig
    train_precision: str = "fp32"

    def __init__(self, config: DiscreteVAEConfig) -> None:
        super().__init__(config)
        if config.stem == "released":
            sizes = {
                "group_count": config.group_count,
                "n_hid": config.n_hid,
                "n_blk_per_group": config.n_blk_per_group,
                "vocab_size": config.vocab_size,
                "channels": CHANNELS,
            }
            self.encoder = Encoder(**sizes)
            self.decoder = Decoder(**sizes, n_init=config.n_init)
        else:
            patch_sizes = {
                "patch": config.patch,
                "n_hid": config.n_hid,
                "n_blk": config.n_blk_per_group,
                "n_init": config.n_init,
                "vocab_size": config.vocab_size,
                "channels": CHANNELS,
            }
            self.encoder = PatchEncoder(**patch_sizes)
            self.decoder = PatchDecoder(**patch_sizes)

    def resblocks(self) -> list[nn.Module]:
        """The residual blocks of encoder and decoder, in the order in which they run."""
        return [m for m in self.modules() if isinstance(m, Block | PatchBlock)]

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """A new model of size "tiny", "small", "base" or "paper"; `overrides` replace fields.

        Raises:
            UsageError: unknown preset or field, or a value out of range.
        """
        return cls(from_presets(cls.__name__, PRESETS, name, **overrides))

    @classmethod
    def min_parameters(cls, config: DiscreteVAEConfig) -> int:
        """The 3x3 or per-position matrices of the blocks, and the codebook at both ends."""
        c = config
        blocks: int
        ends: int
        if c.stem == "released":
            squares = sum((c.n_hid * 2**group) ** 2 for group in range(c.group_count))
            blocks, ends = (
                2 * c.n_blk_per_group * squares * 9 // 8,
                c.n_hid * 2 ** (c.group_count - 1),
            )
        else:
            blocks, ends = (8 * c.n_blk_per_group + 30) * c.n_hid**2, c.n_init
            blocks += 2 * CHANNELS * c.patch**2 * c.n_hid
        return blocks + c.vocab_size * (ends + c.n_init)

    @property
    def num_tokens(self) -> int:
        """K, the size of the codebook."""
        return self.config.vocab_size

    @property
    def factor(self) -> int:
        """Pixels a token covers along each side."""
        return self.config.factor

    def grid(self, image_size: int) -> tuple[int, int]:
        """(rows, columns) of tokens of a square picture of `image_size` pixels."""
        image_size = integer("DiscreteVAE", "image_size", image_size)
        if image_size < 1 or image_size % self.factor:
            raise UsageError(
                f"DiscreteVAE: image_size must be a multiple of {self.factor}, got {image_size}"
            )
        return image_size // self.factor, image_size // self.factor

    def codebook(self) -> Tensor:
        """(K, n_init): the decoder's first 1x1 convolution seen as vectors."""
        return self.decoder.codebook_conv().w[:, :, 0, 0].t()

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, K, h, w)."""
        self._check_images(images)
        logits: Tensor = self.encoder(map_pixels(images))
        return logits

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, h, w) int64 tokens, argmax of the logits (paper 2.2)."""
        return self.logits(images).argmax(1)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """(B, h, w) int64 -> (B, 3, H, W) in [0, 1].

        Raises:
            UsageError: tokens are not (B, h, w) integers in [0, K).
        """
        return expected_pixels(self.decoder_maps(tokens)[:, :CHANNELS])

    @torch.no_grad()
    def decoder_maps(self, tokens: Tensor) -> Tensor:
        """(B, h, w) int64 -> (B, 6, H, W): location and ln b of the likelihood.

        The one-hot through the first 1x1 convolution is a table look-up, so none is formed.

        Raises:
            UsageError: as `decode`.
        """
        if tokens.dim() != 3 or tokens.dtype != torch.int64:
            got = f"{tuple(tokens.shape)} {tokens.dtype}"
            raise UsageError(f"DiscreteVAE.decode: tokens must be (B, h, w) int64, got {got}")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.num_tokens:
            got = f"{int(tokens.min())} .. {int(tokens.max())}"
            top = self.num_tokens - 1
            raise UsageError(f"DiscreteVAE.decode: tokens must lie in 0 .. {top}, got {got}")
        codes = nn.functional.embedding(tokens, self.codebook()) + self.decoder.codebook_conv().b
        maps: Tensor = self.decoder.from_codes(codes.permute(0, 3, 1, 2))
        return maps

    @torch.no_grad()
    def reconstruct(self, images: Tensor, batch_size: int = 64) -> tuple[Tensor, Tensor]:
        """Through the tokens and back, some pictures at a time, on the model's device.

        Args:
            images: (N, 3, H, W) in [0, 1], N at least 1.
            batch_size: pictures at a time.

        Returns:
            The reconstructions, (N, 3, H, W) float32 in [0, 1], and the (N, h, w) int64 tokens,
            both on the CPU.
        """
        device = self.codebook().device
        tokens = [self.encode(part.to(device)) for part in images.split(batch_size)]
        decoded = [self.decode(part).float().cpu() for part in tokens]
        return torch.cat(decoded), torch.cat(tokens).cpu()

    def forward(
        self,
        images: Tensor,
        *,
        tau: float,
        kl_weight: float,
        seed: int | Tensor | None = None,
        first: int = 0,
    ) -> DVAEOutput:
        """The evidence lower bound of stage 1 (paper Eq. 1 and A.2).

        Args:
            images: (B, 3, H, W) in [0, 1], sides divisible by `factor`.
            tau: temperature of the relaxation, positive.
            kl_weight: beta in the paper's units (6.6 there).
            seed: of the Gumbel noise; None draws one from torch's generator.
            first: number of images before these in a larger batch, whose noise they then get.
        """
        with self._precision(images):
            logits = self.logits(images)
            before = first * logits.shape[2] * logits.shape[3]
            relaxed = dalle_ext.gumbel_softmax(logits, tau, dim=1, seed=seed, first_row=before)
            maps = self.decoder(relaxed.sample)
        mu, nll = self.likelihood(images, maps)
        positions = relaxed.kl.shape[1] * relaxed.kl.shape[2]
        values = images.shape[1] * images.shape[2] * images.shape[3]
        kl = relaxed.kl.mean()
        loss = nll + kl_weight * kl * positions / values
        return DVAEOutput(loss, nll, kl, relaxed.index, mu, logits.detach().argmax(1))

    def autoencode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(mu, nll) with the encoder's features straight into the decoder: no codes at all.

        The warm start of the toy recipes (not in the paper); patch stem only, where features and
        codebook vectors have the same width.
        """
        self._check_images(images)
        with self._precision(images):
            codes = self.encoder.features(map_pixels(images))
            maps = self.decoder.from_codes(codes)
        return self.likelihood(images, maps)

    def vector_quantized(self, images: Tensor) -> VectorQuantized:
        """The pictures through their nearest codes, with straight-through gradients.

        The codebook gets no gradient. For a model whose features and codebook vectors have the same
        width and whose codebook `straight_through.set_codebook` has set.
        """
        self._check_images(images)
        with self._precision(images):
            features = self.encoder.features(map_pixels(images)).float()
            with torch.no_grad():
                codes = self.encoder.logits_conv()(features).argmax(1)
                vectors = nn.functional.embedding(codes, self.codebook()).permute(0, 3, 1, 2)
            maps = self.decoder.from_codes(straight_through(features, vectors))
        commitment = (features - vectors).square().mean()
        mu, nll = self.likelihood(images, maps)
        return VectorQuantized(mu, nll, commitment, codes, features.detach())

    def likelihood(self, images: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
        """(mu, -ln f per value) of `images` under the decoder's six maps."""
        mu, ln_b = maps[:, :CHANNELS], maps[:, CHANNELS:]
        return mu, -logit_laplace_log_prob(map_pixels(images), mu, ln_b).mean()

    def _precision(self, images: Tensor) -> AbstractContextManager[object]:
        return autocast(images.device, self.train_precision if self.training else "fp32")

    def _check_images(self, images: Tensor) -> None:
        fits = images.dim() == 4 and images.shape[1] == CHANNELS and images.is_floating_point()
        if not fits or images.shape[2] % self.factor or images.shape[3] % self.factor:
            raise UsageError(
                f"DiscreteVAE: images must be float (B, {CHANNELS}, H, W) with sides divisible by "
                f"{self.factor}, got {tuple(images.shape)} {images.dtype}"
            )
