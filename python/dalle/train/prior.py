"""Training of the prior (paper 2.2, B.2); the defaults are the paper's numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dalle.averaging import IterateAverage
from dalle.configs import require, require_adamw, to_dict
from dalle.data.augment import center_crop, prior_crop, to_tensor
from dalle.data.pairs import BatchSampler, Pairs, load_or_skip
from dalle.dvae import DiscreteVAE
from dalle.errors import UsageError
from dalle.pictures import rows_of
from dalle.prior import PAD, Prior
from dalle.schedules import PlateauHalving, cosine_ramp, linear_warmup
from dalle.tokenizer import Tokenizer
from dalle.train.loop import step_seed, update

DECAYS = ("plateau", "cosine", "none")
IMAGE_INITS = ("random", "codebook")


@dataclass(frozen=True, kw_only=True)
class PriorTrainConfig:
    """The recipe. Fields down to `bpe_dropout` are the paper's; the rest are named options.

    Attributes:
        batch_size: pairs an update.
        lr, warmup_steps: step size, reached linearly.
        decay: "plateau" halves it when the training loss stalls (see `PlateauHalving`), "cosine"
            takes it to zero at `decay_steps`, "none" holds it.
        plateau_window, plateau_patience, plateau_min_delta, max_halvings: when to halve.
        beta1, beta2, eps, weight_decay: AdamW; only the matrices of the resblocks decay.
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

    def __post_init__(self) -> None:
        for name, known in (
            ("decay", DECAYS),
            ("augment", ("paper", "none")),
            ("image_init", IMAGE_INITS),
        ):
            require("prior train", self, f"one of {', '.join(known)}", known.__contains__, name)
        shares = ("bpe_dropout", "caption_dropout", "token_dropout")
        require("prior train", self, "in [0, 1)", lambda x: 0 <= x < 1, *shares)
        require("prior train", self, "positive", lambda x: x > 0, "batch_size", "lr", "clip_norm")
        require_adamw("prior train", self)
        if self.decay == "cosine" and self.decay_steps < 1:
            raise UsageError(f"prior train: decay_steps must be 1 or more, got {self.decay_steps}")

    def step_size(self, step: int) -> float:
        """Step size of update `step` without the halvings."""
        rate = linear_warmup(step, self.lr, self.warmup_steps)
        return rate * cosine_ramp(step, 1, 0, self.decay_steps) if self.decay == "cosine" else rate


class PriorTask:
    """Trains a `Prior` on pairs; fits `train.loop.train`.

    Args:
        prior: the model to train.
        tokenizer: of the captions.
        vae: frozen; image tokens are the argmax of its encoder.
        pairs: the data set.
        config: the recipe.
        seed: of batches, crops, dropouts and the start from the codebook.

    Raises:
        UsageError: sizes of prior, tokenizer, dVAE and images that do not fit each other.
        DataError: no picture decodes.
    """

    name = "prior"

    def __init__(
        self,
        prior: Prior,
        tokenizer: Tokenizer,
        vae: DiscreteVAE,
        pairs: Pairs,
        config: PriorTrainConfig,
        *,
        seed: int = 0,
    ) -> None:
        sizes = prior.config
        if sizes.text_vocab < tokenizer.vocab_size:
            want = f"at least the tokenizer's {tokenizer.vocab_size}"
            raise UsageError(f"prior train: text_vocab must be {want}, got {sizes.text_vocab}")
        if sizes.image_vocab != vae.num_tokens:
            want = f"the dVAE's {vae.num_tokens}"
            raise UsageError(f"prior train: image_vocab must be {want}, got {sizes.image_vocab}")
        if sizes.grid[0] != sizes.grid[1]:
            raise UsageError(f"prior train: grid must be square, got {sizes.grid}")
        self.model, self.tokenizer, self.vae, self.pairs = prior, tokenizer, vae.eval(), pairs
        self.config, self.seed = config, seed
        self.image_size = sizes.grid[0] * vae.factor
        self.device = prior.start_of_text.device
        self.tokens: Tensor | None = None
        self.kept = np.arange(len(pairs))
        if config.augment == "none":
            self.tokens, self.kept = self._encode_all()
        if config.image_init == "codebook":
            start = (config.embedding_scale, config.head_scale)
            init_from_codebook(prior, vae.codebook(), *start, seed=seed)
        self.sampler = BatchSampler(len(self.kept), config.batch_size, seed)
        self.plateau = PlateauHalving(
            window=config.plateau_window,
            patience=config.plateau_patience,
            min_delta=config.plateau_min_delta,
            max_halvings=config.max_halvings if config.decay == "plateau" else 0,
        )
        self.optimizer = torch.optim.AdamW(
            parameter_groups(prior, config.weight_decay),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )
        self.average: IterateAverage | None = IterateAverage(
            prior, config.average_decay, config.average_every, warmup=config.average_warmup
        )

    def describe(self) -> dict[str, Any]:
        """What fixes the training: model, recipe, data, seed."""
        data = {"name": self.pairs.name, "pictures": len(self.pairs)}
        model, recipe = to_dict(self.model.config), to_dict(self.config)
        return {"model": model, "train": recipe, "data": data, "seed": self.seed}

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(B, text_len - 1) text and (B, N) image tokens of update `step`."""
        chosen = self.sampler.indices(step)
        if self.tokens is not None:
            items, tokens = self.kept[chosen], self.tokens[torch.from_numpy(chosen)]
        else:
            rng, size = np.random.default_rng(step_seed(self.seed, step, 1)), self.image_size
            images, kept = load_or_skip(self.pairs, chosen, lambda x: prior_crop(x, size, rng))
            items, tokens = np.array(kept), self._encode(images)
        captions = [self.pairs.captions[int(i)] for i in items]
        rate, seed = self.config.bpe_dropout, step_seed(self.seed, step, 2)
        length = self.model.config.text_len - 1
        text = self.tokenizer.encode(captions, length, dropout=rate, seed=seed)
        return text.to(self.device), tokens.to(self.device)

    def train_step(self, step: int) -> dict[str, float | Tensor]:
        """One update; all its randomness comes from (seed, step)."""
        c = self.config
        cut = self.tokenizer.truncated
        text, tokens = self.batch(step)
        cut = self.tokenizer.truncated - cut
        rng = torch.Generator().manual_seed(step_seed(self.seed, step, 3))
        torch.manual_seed(step_seed(self.seed, step, 4))  # the model's own dropout
        if c.caption_dropout:
            without = torch.rand(len(text), 1, generator=rng) < c.caption_dropout
            text = text.masked_fill(without.to(self.device), PAD)
        keep = None
        if c.token_dropout:
            keep = (torch.rand(tokens.shape, generator=rng) >= c.token_dropout).to(self.device)
        out = self.model(text, tokens, keep=keep)
        lr = c.step_size(step) * self.plateau.factor
        grad_norm = update(self, out.loss, step, lr=lr, clip_norm=c.clip_norm)
        if c.decay == "plateau":
            self.plateau.update(float(out.loss.detach()))
        return {
            "loss": out.loss.detach(),
            "text_loss": out.text_loss.detach(),
            "image_loss": out.image_loss.detach(),
            "grad_norm": grad_norm,
            "halvings": self.plateau.halvings,
            "captions_cut": cut / len(text),
            "images": len(text),
        }

    @torch.no_grad()
    def pictures(self, step: int) -> dict[str, Tensor]:
        """Eight training pictures through the dVAE, above samples for their captions."""
        items = self.kept[: min(8, len(self.kept))]
        images = [center_crop(self.pairs.load(int(i)), self.image_size) for i in items]
        captions = [self.pairs.captions[int(i)] for i in items]
        text = self.tokenizer.encode(captions, self.model.config.text_len - 1).to(self.device)
        if self.average is None:
            samples = self.model.generate(text, seed=self.seed)
        else:
            with self.average.applied():
                samples = self.model.generate(text, seed=self.seed)
        seen = self.vae.decode(self._encode(images).view(-1, *self.model.config.grid))
        return {"samples": rows_of(seen, self.vae.decode(samples[:, 0].to(self.device)))}

    def state(self) -> dict[str, Any]:
        """The plateau's bookkeeping."""
        return {"plateau": self.plateau.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes `state()` back."""
        self.plateau.load_state_dict(state["plateau"])

    def _encode(self, images: list[np.ndarray]) -> Tensor:
        """(B, N) tokens of pictures of the right size."""
        return self.vae.encode(to_tensor(images).to(self.device)).flatten(1)

    def _encode_all(self) -> tuple[Tensor, np.ndarray]:
        """Tokens of every picture that decodes, and which those are."""
        tokens: list[Tensor] = []
        kept: list[int] = []
        for part in np.array_split(np.arange(len(self.pairs)), math.ceil(len(self.pairs) / 128)):
            images, found = load_or_skip(
                self.pairs, part, lambda x: center_crop(x, self.image_size)
            )
            tokens.append(self._encode(images).cpu())
            kept += found
        return torch.cat(tokens), np.array(kept)


def parameter_groups(prior: Prior, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices of the resblocks with decay; embeddings, heads, gains and biases without."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in prior.named_parameters():
        decayed = parameter.dim() == 2 and name.startswith("layers.")
        (matrices if decayed else rest).append(parameter)
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]


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
    generator = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(width, codes.shape[1], generator=generator))
    start = codes @ turn.t()
    if isinstance(prior.image_widen, nn.Linear) and isinstance(prior.image_narrow, nn.Linear):
        start = codes
        prior.image_widen.weight.copy_(turn)
        prior.image_narrow.weight.copy_(turn.t())
    prior.image_embedding.weight.copy_(start * embedding_scale)
    prior.image_head.weight.copy_(start * head_scale)
