"""Training of the prior (paper 2.2, B.2)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle.averaging import IterateAverage
from dalle.configs import to_dict
from dalle.data.augment import center_crop, prior_crop, to_tensor
from dalle.data.pairs import BatchSampler, Pairs, load_or_skip
from dalle.dvae import DiscreteVAE
from dalle.errors import UsageError
from dalle.pictures import rows_of
from dalle.precision import ResblockScaler
from dalle.prior import PAD, Prior, PriorOutput
from dalle.schedules import PlateauHalving
from dalle.tokenizer import Tokenizer
from dalle.train.loop import step_seed
from dalle.train.prior_recipe import PriorTrainConfig, init_from_codebook, make_optimizer
from dalle.train.update import update


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
        self.optimizer = make_optimizer(prior, config, seed)
        self.scaler: ResblockScaler | None = None
        if sizes.precision == "fp16-scaled":
            self.scaler = ResblockScaler(prior.resblocks())
            for key, block in prior.resblocks().items():
                block.ends = self.scaler[key]
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
        if c.caption_dropout:
            without = torch.rand(len(text), 1, generator=rng) < c.caption_dropout
            text = text.masked_fill(without.to(self.device), PAD)
        keep = None
        if c.token_dropout:
            keep = (torch.rand(tokens.shape, generator=rng) >= c.token_dropout).to(self.device)

        def forward() -> PriorOutput:
            torch.manual_seed(step_seed(self.seed, step, 4))  # the model's own dropout
            return self.model(text, tokens, keep=keep)  # type: ignore[no-any-return]

        out = forward()
        grad_norm = update(
            self,
            out.loss,
            step,
            lr=c.step_size(step) * self.plateau.factor,
            clip_norm=c.clip_norm,
            scaler=self.scaler,
            forward=forward,
        )
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
            **(self.scaler.metrics() if self.scaler is not None else {}),
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
        """The plateau's bookkeeping and the gradient scales."""
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return {"plateau": self.plateau.state_dict(), "scaler": scaler}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes `state()` back."""
        self.plateau.load_state_dict(state["plateau"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])

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
