"""The recipe of the prior's training (paper B.2), and the optimizer that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dalle_ext
from dalle.configs import Named, check_numbers, require, require_adamw, seed_number
from dalle.dtensor import fill_
from dalle.errors import UsageError
from dalle.prior.blocks import AttentionBlock
from dalle.prior.model import Prior
from dalle.train.muon import MuonAdamW
from dalle.train.schedules import cosine_ramp, linear_warmup

DECAYS = ("plateau", "cosine", "none")
IMAGE_INITS = ("random", "codebook")
OPTIMIZERS = ("auto", "adamw", "adamw16", "muon")


@dataclass(frozen=True, kw_only=True)
class PriorTrainConfig(Named):
    """The recipe. Fields down to `bpe_dropout` are the paper's; the rest are named options.

    Attributes:
        batch_size: pairs an update.
        lr, warmup_steps: step size, reached linearly.
        decay: "plateau" halves it when the training loss stalls (see `PlateauHalving`), "cosine"
            takes it to zero at `decay_steps`, "none" holds it.
        plateau_window, plateau_patience, plateau_min_delta, max_halvings: when to halve.
        beta1, beta2, eps, weight_decay: AdamW; only the matrices of the resblocks decay.
        optimizer: "adamw" (torch, fp32 moments), "adamw16" (`dalle_ext.AdamW16`: 16-bit moments of
            the resblocks' matrices, fp32 of the rest), "auto": adamw where the model is fp32;
            "muon": `train.muon` for the resblocks' matrices, adamw for the rest, on one process.
        muon_scale: step size of Muon's matrices in units of lr.
        stochastic_rounding: of 16-bit weights in adamw16 (its moments always are).
        clip_norm: largest global gradient norm.
        average_decay, average_every: iterate averaging.
        augment: "paper" crops as in listing 2 at every step; "none" encodes each image once.
        bpe_dropout: share of merges skipped while training.
        decay_steps: length of the cosine, warm-up included.
        average_warmup: whether the averaging decay grows from 0.1, for short runs.
        caption_dropout: share of captions replaced by padding, for guidance.
        token_dropout: image tokens missing from the input, against copying from memory.
        image_init: "codebook" starts image embedding and head from the dVAE's codebook, so that
            similar codes share what is learned; "random" is the paper's.
        embedding_scale, head_scale: size of that start; a code has norm 1 on average.
        parts: into which a batch is cut, run at the same time (`train.parts`).
        accumulate: batches of `batch_size` whose gradients make one update, computed one after
            the other: what one batch so many times as large gives, in less memory.
    """

    batch_size: int = 1024
    lr: float = 4.5e-4
    warmup_steps: int = 5000
    decay: str = "plateau"
    plateau_window: int = 1000
    plateau_patience: int = 5
    plateau_min_delta: float = 1e-3
    max_halvings: int = 5
    beta1: float = 0.9
    beta2: float = 0.96
    eps: float = 1e-8
    weight_decay: float = 4.5e-2
    optimizer: str = "auto"
    muon_scale: float = 5.0
    stochastic_rounding: bool = False
    clip_norm: float = 4.0
    average_decay: float = 0.99
    average_every: int = 25
    augment: str = "paper"
    bpe_dropout: float = 0.1
    decay_steps: int = 0
    average_warmup: bool = False
    caption_dropout: float = 0.0
    token_dropout: float = 0.0
    image_init: str = "random"
    embedding_scale: float = 0.5
    head_scale: float = 1.0
    parts: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        for name, choices in (
            ("decay", DECAYS),
            ("augment", ("paper", "none")),
            ("image_init", IMAGE_INITS),
            ("optimizer", OPTIMIZERS),
        ):
            require("prior train", self, f"one of {', '.join(choices)}", choices.__contains__, name)
        shares = ("bpe_dropout", "caption_dropout", "token_dropout")
        require("prior train", self, "in [0, 1)", lambda x: 0 <= x < 1, *shares)
        require(
            "prior train",
            self,
            "positive",
            lambda x: x > 0,
            "batch_size",
            "lr",
            "clip_norm",
            "muon_scale",
        )
        counts = ("plateau_window", "plateau_patience", "average_every", "parts", "accumulate")
        require("prior train", self, "1 or more", lambda x: x >= 1, *counts)
        rest = ("plateau_min_delta", "max_halvings", "embedding_scale", "head_scale")
        lengths = ("warmup_steps", "decay_steps")
        require("prior train", self, "0 or more", lambda x: x >= 0, *lengths, *rest)
        require("prior train", self, "in [0, 1)", lambda x: 0 <= x < 1, "average_decay")
        require_adamw("prior train", self)
        check_numbers("prior train", self)
        if self.decay == "cosine" and self.decay_steps < 1:
            raise UsageError(f"prior train: decay_steps must be 1 or more, got {self.decay_steps}")

    @property
    def total_batch(self) -> int:
        """Pairs an update, over all micro-batches."""
        return self.batch_size * self.accumulate

    def step_size(self, step: int) -> float:
        """Step size of update `step` without the halvings."""
        rate = linear_warmup(step, self.lr, self.warmup_steps)
        return rate * cosine_ramp(step, 1, 0, self.decay_steps) if self.decay == "cosine" else rate


def parameter_groups(prior: Prior, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices of the resblocks with decay; embeddings, heads, gains and biases without; nothing
    that is frozen."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in prior.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.dim() == 2 and name.startswith("layers.")
        (matrices if decayed else rest).append(parameter)
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]


def muon_groups(prior: Prior, weight_decay: float) -> list[dict[str, Any]]:
    """As `parameter_groups`, with the stacked query, key and value matrices in their own group."""
    stacked = {block.qkv.weight for block in prior.modules() if isinstance(block, AttentionBlock)}
    matrices, rest = parameter_groups(prior, weight_decay)
    single = [p for p in matrices["params"] if p not in stacked]
    threefold = [p for p in matrices["params"] if p in stacked]
    return [
        {**matrices, "params": single, "muon": 1},
        {**matrices, "params": threefold, "muon": 3},
        rest,
    ]


def make_optimizer(prior: Prior, config: PriorTrainConfig, seed: int) -> torch.optim.Optimizer:
    """AdamW, `dalle_ext.AdamW16` or Muon, as the recipe and the model's precision say.

    Args:
        prior: whose parameters are updated.
        config: the recipe.
        seed: of stochastic rounding.

    Raises:
        UsageError: 16-bit weights or stochastic rounding without adamw16.
    """
    name, sizes = config.optimizer, prior.config
    if name == "auto":
        name = "adamw" if sizes.precision == "fp32" else "adamw16"
    groups = parameter_groups(prior, config.weight_decay)
    numbers: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
    }
    if name == "adamw16":
        groups[1]["fp32_moments"] = True
        groups = [group for group in groups if group["params"]]
        rounding = config.stochastic_rounding
        return dalle_ext.AdamW16(groups, **numbers, stochastic_rounding=rounding, seed=seed)
    if sizes.half_weights or config.stochastic_rounding:
        option = "half_weights" if sizes.half_weights else "stochastic_rounding"
        raise UsageError(f"prior train: optimizer must be adamw16 for {option}, got {name}")
    if name == "muon":
        groups = muon_groups(prior, config.weight_decay)
        scale, parts = config.muon_scale, config.parts
        return MuonAdamW(groups, **numbers, muon_scale=scale, parts=parts, fused=True)
    return torch.optim.AdamW(groups, **numbers, fused=True)


@torch.no_grad()
def init_from_codebook(
    prior: Prior, codebook: Tensor, embedding_scale: float, head_scale: float, *, seed: int
) -> None:
    """Starts image embedding and image head as a random rotation of the dVAE's codebook.

    The codes are centred, scaled to a mean square norm of 1 and mapped into d dimensions by a
    matrix with orthonormal columns, so that distances between codes stay.

    Args:
        prior: changed in place.
        codebook: (K, C) with C at most d.
        embedding_scale, head_scale: factors on the embedding and on the head's weight.
        seed: of the map.
    """
    width, rank = prior.config.d_model, prior.config.image_rank
    if codebook.shape[1] > width or rank not in (0, codebook.shape[1]):
        want = f"image_rank {rank}" if rank else f"at most d_model {width}"
        raise UsageError(f"prior train: codebook width must be {want}, got {codebook.shape[1]}")
    codes = codebook.detach().float().cpu()
    codes = codes - codes.mean(0)
    codes = codes / codes.square().sum(1).mean().sqrt().clamp_min(1e-12)
    generator = torch.Generator().manual_seed(seed_number("init_from_codebook", seed))
    rotation, _ = torch.linalg.qr(
        torch.randn(width, codes.shape[1], generator=generator, dtype=torch.float32, device="cpu")
    )
    start = codes @ rotation.t()
    if isinstance(prior.image_widen, nn.Linear) and isinstance(prior.image_narrow, nn.Linear):
        start = codes
        fill_(prior.image_widen.weight, rotation)
        fill_(prior.image_narrow.weight, rotation.t())
    fill_(prior.image_embedding.weight, start * embedding_scale)
    fill_(prior.image_head.weight, start * head_scale)
