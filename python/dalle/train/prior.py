"""Training of the prior (paper 2.2, B.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dalle.configs import to_dict
from dalle.data.augment import center_crop, prior_crop, to_tensor
from dalle.data.codes import check_codes, stores_of, tokens_of
from dalle.data.loader import StepLoader
from dalle.data.order import sampler_for
from dalle.data.pairs import (
    DRAWS,
    Pairs,
    describe_pairs,
    draw_caption,
    evenly_spaced,
    leave_out,
    load_or_draw,
    load_or_skip,
)
from dalle.distributed.world import Solo, World
from dalle.dvae.bound import log_likelihood
from dalle.dvae.model import DiscreteVAE
from dalle.errors import DataError, UsageError
from dalle.pictures import rows_of
from dalle.precision import ResblockScaler
from dalle.precision.queued import Values
from dalle.pretrained import fingerprint
from dalle.prior.config import IMAGE_WEIGHT, PAD, TEXT_WEIGHT
from dalle.prior.model import Prior
from dalle.tokenizer import Tokenizer
from dalle.train.accumulate import Accumulated, micro_batches
from dalle.train.averaging import IterateAverage
from dalle.train.fine_tune import frozen, started_from
from dalle.train.held_out import MAX_PICTURES, held_out_pictures
from dalle.train.late import step_values
from dalle.train.parts import run_parts, run_parts_no_grad, sum_parts
from dalle.train.prior_recipe import PriorTrainConfig, init_from_codebook, make_optimizer
from dalle.train.schedules import PlateauHalving
from dalle.train.seeds import start_seed, step_seed
from dalle.train.task import averaged_model, local_batch, require_one_part
from dalle.train.update import update

SHOWN_OF = 4096  # pictures of which some are drawn, where not all are encoded at the start


class Batch(NamedTuple):
    """One process's part of a batch.

    Attributes:
        text: (B, text_len - 1) int64, on the CPU, where its tokens are counted.
        tokens: (B, N) int64.
        keep: (B, N) bool, the image tokens that are inputs; or None for all.
    """

    text: Tensor
    tokens: Tensor
    keep: Tensor | None


class PriorTask:
    """Trains a `Prior` on pairs; fits `train.loop.train`.

    In the place of a pair whose picture cannot be used (broken, or smaller than the crop) another
    is drawn; with `augment` "none", where all are encoded at the start, such pairs leave the set.
    Of a pair's several captions one is drawn each epoch, by (seed, epoch, item).

    Args:
        prior: the model to train, where `parallelize` has put it.
        tokenizer: of the captions.
        vae: frozen; image tokens are the argmax of its encoder.
        pairs: the data set.
        config: the recipe.
        seed: of batches, crops, dropouts and the start from the codebook.
        world: the processes that train together, each with the same arguments; a batch is shared
            out. Only the model's own dropout depends on how many there are.
        validation: the held-out part, for `evaluate`.
        workers: processes that read pictures ahead of time; 0 reads them in this one.

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
        world: World | None = None,
        validation: Pairs | None = None,
        workers: int = 0,
    ) -> None:
        self.validation = validation
        self.model, self.tokenizer, self.vae, self.pairs = prior, tokenizer, vae.eval(), pairs
        self.config, self.seed, self.device = config, seed, prior.start_of_text.device
        self.world: World = world or Solo(self.device)
        distributed = self.world.size > 1
        self.data = describe_pairs(pairs)
        now = {"tokenizer": tokenizer.fingerprint(), "vae": fingerprint(vae)}
        prior.trained_on = {**started_from(prior), **now}
        self.world.require_same(self.describe())
        require_one_part("prior train", config.parts, self.world)
        if config.optimizer == "muon" and distributed:
            raise UsageError(
                "prior train: optimizer must be adamw or adamw16 on many processes, got muon"
            )
        sizes = prior.config
        if config.parts > 1 and (sizes.dropout or sizes.precision == "fp16-scaled"):
            got = f"{config.parts} with dropout {sizes.dropout}, precision {sizes.precision}"
            want = "1 with dropout or scaled gradients, which threads would share"
            raise UsageError(f"prior train: parts must be {want}, got {got}")
        if sizes.text_vocab < tokenizer.vocab_size:
            want = f"at least the tokenizer's {tokenizer.vocab_size}"
            raise UsageError(f"prior train: text_vocab must be {want}, got {sizes.text_vocab}")
        if sizes.image_vocab != vae.num_tokens:
            want = f"the dVAE's {vae.num_tokens}"
            raise UsageError(f"prior train: image_vocab must be {want}, got {sizes.image_vocab}")
        if sizes.grid[0] != sizes.grid[1]:
            raise UsageError(f"prior train: grid must be square, got {sizes.grid}")
        self.image_size = sizes.grid[0] * vae.factor
        self.stores = stores_of(pairs)
        check_codes("prior train", self.stores, now["vae"], sizes.grid, self.image_size)
        self.tokens: Tensor | None = None
        self.usable = np.arange(min(len(pairs), SHOWN_OF))
        if config.augment == "none" and not self.stores:
            self.tokens, self.usable = self._encode_all()
        if config.image_init == "codebook":
            start = (config.embedding_scale, config.head_scale)
            init_from_codebook(prior, vae.codebook(), *start, seed=start_seed(seed, "rotation"))
        usable = None if self.tokens is None else self.usable
        self.sampler = sampler_for(pairs, config.total_batch, seed, usable)
        on_gpu = self.device.type == "cuda"
        self.loader = StepLoader("prior train", self.load, pairs, workers=workers, pin=on_gpu)
        self.plateau = PlateauHalving(
            window=config.plateau_window,
            patience=config.plateau_patience,
            min_delta=config.plateau_min_delta,
            max_halvings=config.max_halvings if config.decay == "plateau" else 0,
        )
        if distributed and sizes.half_weights:
            raise UsageError(
                "prior train: half_weights must be off on many processes, where a gathered block "
                "has one dtype, got True"
            )
        self.world.part(config.total_batch)
        self.optimizer = make_optimizer(prior, config, seed)
        self.scaler: ResblockScaler | None = None
        if sizes.precision == "fp16-scaled":
            self.scaler = ResblockScaler(prior.resblocks())
            for key, block in prior.resblocks().items():
                block.ends = self.scaler[key]
            self.world.use_scaler(self.scaler)
        self.average: IterateAverage | None = IterateAverage(
            prior, config.average_decay, config.average_every, warmup=config.average_warmup
        )

    def describe(self) -> dict[str, Any]:
        """What fixes the training: model, recipe, data, seed."""
        model = {**self.model.trained_on, **frozen(self.model)}
        fixed = {**model, "data": self.data, "seed": self.seed}
        return {**fixed, "model": to_dict(self.model.config), "train": to_dict(self.config)}

    def batch(self, step: int) -> Batch:
        """This process's part of the batch of update `step`, a pure function of the seed."""
        c, indices = self.config, self.sampler.indices(step)
        part = self.world.part(len(indices))
        local = indices[part]
        positions = np.arange(part.start, part.stop)
        if self.tokens is not None:
            items, tokens = self.usable[local], self.tokens[torch.from_numpy(local)]
        else:
            read, drawn = self.loader.get(step)
            items = drawn.numpy()
            tokens = read if self.stores else self._encode(read.numpy())
        epochs = self.sampler.epochs(step)[part]
        places = zip(items, positions, epochs, tokens, strict=True)
        text = self.tokenizer.encode(
            [self._caption(step, int(i), int(at), int(epoch), row) for i, at, epoch, row in places],
            self.model.config.text_len - 1,
            dropout=c.bpe_dropout,
            seed=step_seed(self.seed, step, 2),
            positions=positions.tolist(),
        )
        draw = torch.Generator().manual_seed(step_seed(self.seed, step, 3))
        rows, keep = torch.from_numpy(positions), None
        if c.caption_dropout:
            dropped = (
                torch.rand(len(indices), 1, generator=draw, dtype=torch.float32, device="cpu")[rows]
                < c.caption_dropout
            )
            text = text.masked_fill(dropped, PAD)
        if c.token_dropout:
            mask = (
                torch.rand(
                    len(indices),
                    tokens.shape[1],
                    generator=draw,
                    dtype=torch.float32,
                    device="cpu",
                )[rows]
                >= c.token_dropout
            )
            keep = mask.to(self.device)
        return Batch(text, tokens.to(self.device), keep)

    def _caption(self, step: int, item: int, position: int, epoch: int, codes: Tensor) -> str:
        """The caption of an item whose tokens are `codes`.

        Where it cannot be read any more (its shard has gone), another item is drawn, whose tokens
        replace `codes`; where pictures are read at each update, this one just was, and the caption
        is dropped.

        Raises:
            DataError: none of those drawn can be read.
        """
        draws = None
        for _ in range(DRAWS):
            try:
                seed = partial(step_seed, self.seed, epoch, 6, item)
                return draw_caption(self.pairs, item, seed)
            except DataError as error:
                leave_out(self.pairs, item, error)
                problem = error
            if self.tokens is None:
                return ""
            draws = draws or np.random.default_rng(step_seed(self.seed, step, 5, position))
            row = int(draws.integers(len(self.usable)))
            item = int(self.usable[row])
            codes.copy_(self.tokens[row])
        raise problem

    def load(self, step: int) -> tuple[Tensor, Tensor]:
        """The crops of `batch`, (B, S, S, 3) uint8 on the CPU, or of codes the tokens, (B, N)
        int64; and their items (B,)."""
        indices = self.sampler.indices(step)
        part = self.world.part(len(indices))
        if self.stores:
            chosen = [0] * len(indices[part])
            if self.config.augment == "paper":
                places = range(part.start, part.stop)
                chosen = [step_seed(self.seed, step, 7, place) % 2**32 for place in places]
            tokens = tokens_of(self.pairs, indices[part], chosen)
            return tokens, torch.from_numpy(indices[part])

        def crop(image: np.ndarray, position: int) -> np.ndarray:
            rng = np.random.default_rng(step_seed(self.seed, step, 1, part.start + position))
            return prior_crop(image, self.image_size, rng)

        def draws(position: int) -> int:
            return step_seed(self.seed, step, 5, part.start + position)

        crops, items = load_or_draw(self.pairs, indices[part], draws, crop)
        return torch.from_numpy(np.stack(crops)), torch.from_numpy(items)

    def train_step(self, step: int) -> Values:
        """One update; all its randomness comes from (seed, step)."""
        c = self.config
        cut, waited = self.tokenizer.truncated, self.loader.seconds
        batch = local_batch(self.world, partial(self.batch, step), self._empty_batch)
        cut, targets = self.tokenizer.truncated - cut, self._text_targets(batch.text)
        text = batch.text.to(self.device)

        text_weight = cache(self.world.weight_async(targets))
        done: list[list[Tensor]] = []

        def run(rows: slice) -> Tensor:
            # Seeds the model's own dropout.
            first = (rows.start,) if rows.start else ()
            torch.manual_seed(step_seed(self.seed, step, 4, self.world.rank, *first))
            text_loss, image_loss = self._losses(batch, text, rows, targets)
            losses = [text_loss * text_weight(), image_loss * self.world.weight(c.total_batch)]
            done.append([loss.detach() for loss in losses])
            return TEXT_WEIGHT * losses[0] + IMAGE_WEIGHT * losses[1]

        rows = micro_batches(len(text), c.total_batch, c.accumulate, self.world.size)
        grad_norm = update(
            self,
            Accumulated(run, rows) if len(rows) > 1 else run(rows[0]),
            step,
            lr=lambda: c.step_size(step) * self.plateau.factor,
            clip_norm=c.clip_norm,
            scaler=self.scaler,
            forward=lambda: [run(part) for part in rows],
        )
        text_loss, image_loss = sum_parts(done[: len(rows)])
        values: dict[str, float | Tensor] = {
            "loss": TEXT_WEIGHT * text_loss + IMAGE_WEIGHT * image_loss,
            "text_loss": text_loss,
            "image_loss": image_loss,
            "grad_norm": grad_norm,
            "halvings": self.plateau.halvings,
            "captions_cut": self.world.weight(c.total_batch) * cut / len(text),
            **({"data_wait": self.loader.seconds - waited} if self.tokens is None else {}),
            "images": len(text),
            **(self.scaler.metrics() if self.scaler is not None else {}),
        }
        after = self.plateau.update if c.decay == "plateau" else None
        return step_values(self, values, after=after)

    @torch.no_grad()
    def pictures(self, step: int) -> dict[str, Tensor]:
        """`samples` of the averaged weights."""
        with averaged_model(self) as model:
            if model is None:
                return {}
            assert isinstance(model, Prior)
            return {"samples": self.samples(model.to(self.device))}

    @torch.no_grad()
    def samples(self, model: Prior, *, temperature: float = 1.0) -> Tensor:
        """Eight training pictures through the dVAE, above samples of `model` for their captions:
        one picture (3, 2 S, 8 S) in [0, 1]."""
        size = self.image_size
        if self.stores:
            positions = list(range(min(8, len(self.usable))))
            tokens = tokens_of(self.pairs, positions, [0] * len(positions)).to(self.device)
        else:
            images, positions = load_or_skip(
                self.pairs, self.usable, lambda x, _: center_crop(x, size), limit=8
            )
            tokens = self._encode(images)
        captions = [self.pairs.captions[int(i)] for i in self.usable[positions]]
        text = self.tokenizer.encode(captions, self.model.config.text_len - 1).to(self.device)
        samples = model.generate(text, seed=self.seed, temperature=temperature)
        originals = self.vae.decode(tokens.view(-1, *self.model.config.grid))
        return rows_of(originals, self.vae.decode(samples[:, 0].to(self.device)))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Scores of the held-out pairs, in nats a token: "loss", "text_loss", "image_loss"; "elb"
        is the bound of caption and picture together, the mean in nats a pair: the likelihood of the
        picture by its tokens, and that of text and tokens by the prior. A code store has no
        pictures, and no "elb"."""
        if self.validation is None:
            return {}
        assert isinstance(model, Prior)
        prior = model.to(self.device)
        text, tokens = (x.to(self.device) for x in self._held_out[:2])

        def losses(rows: slice) -> tuple[Tensor, ...]:
            output = prior(text[rows], tokens[rows])
            share, targets = (rows.stop - rows.start) / len(text), self._text_targets(text[rows])
            return targets * output.text_loss, share * output.image_loss

        outputs = run_parts_no_grad(losses, len(text), max(self.config.parts, len(text) // 16))
        text_sum, image_loss = (float(total) for total in sum_parts(outputs))
        text_loss = text_sum / max(1, self._text_targets(text))
        loss = TEXT_WEIGHT * text_loss + IMAGE_WEIGHT * image_loss
        scores = {"loss": loss, "text_loss": text_loss, "image_loss": image_loss}
        if not self.stores:
            nats = text_sum / len(text) + image_loss * tokens.shape[1]
            scores["elb"] = self._held_out[2] - nats
        return scores

    @cached_property
    def _held_out(self) -> tuple[Tensor, Tensor, float]:
        """Text and tokens of the held-out pairs, and the mean `log_likelihood` of the pictures."""
        assert self.validation is not None
        crops: list[np.ndarray] = []
        if self.stores:
            items = evenly_spaced(len(self.validation), MAX_PICTURES).tolist()
        else:
            crops, items = held_out_pictures(self.validation, self.image_size)
        captions = [self.validation.captions[i] for i in items]
        text = self.tokenizer.encode(captions, self.model.config.text_len - 1)
        if self.stores:
            return text, tokens_of(self.validation, items, [0] * len(items)), 0.0
        pieces = [crops[i : i + 128] for i in range(0, len(crops), 128)]
        tokens = [self._encode(piece).cpu() for piece in pieces]
        grid, total = self.model.config.grid, 0.0
        for piece, codes in zip(pieces, tokens, strict=True):
            images = to_tensor(piece).to(self.device)
            codes = codes.to(self.device).view(-1, *grid)
            total += float(log_likelihood(self.vae, images, codes).double().sum())
        return text, torch.cat(tokens), total / len(crops)

    def state(self) -> dict[str, Any]:
        """The plateau's bookkeeping and the gradient scales."""
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return {"plateau": self.plateau.state_dict(), "scaler": scaler}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores `state()`."""
        self.plateau.load_state_dict(state["plateau"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])

    def _empty_batch(self) -> Batch:
        part, sizes = self.world.part(self.config.total_batch), self.model.config
        count = part.stop - part.start
        text = torch.full((count, sizes.text_len - 1), PAD, device="cpu", dtype=torch.int64)
        tokens = torch.zeros(count, sizes.num_image_tokens, dtype=torch.int64, device=self.device)
        return Batch(text, tokens, None)

    def _losses(self, batch: Batch, on_device: Tensor, rows: slice, targets: int) -> list[Tensor]:
        """Text and image loss of some rows: their shares of the means over this process's batch,
        whose text, there `on_device`, has `targets` tokens that count."""

        def run(part: slice) -> tuple[Tensor, ...]:
            part = slice(rows.start + part.start, rows.start + part.stop)
            keep, text = None if batch.keep is None else batch.keep[part], batch.text[part]
            out = self.model(on_device[part], batch.tokens[part], keep=keep)
            share = self._text_targets(text) / max(1, targets)
            return out.text_loss * share, out.image_loss * (len(text) / len(batch.text))

        size = rows.stop - rows.start
        return sum_parts(run_parts(run, size, self.config.parts, self.model))

    def _text_targets(self, text: Tensor) -> int:
        padded = self.model.config.text_targets == "padded"
        return text.numel() if padded else int((text != PAD).sum())

    def _encode(self, images: Sequence[np.ndarray] | np.ndarray) -> Tensor:
        """(B, N) tokens of pictures of the right size."""
        stacked, vae = to_tensor(images).to(self.device), self.vae
        outputs = run_parts_no_grad(
            lambda rows: (vae.encode(stacked[rows]),), len(images), self.config.parts
        )
        return torch.cat([tokens for (tokens,) in outputs]).flatten(1)

    def _encode_all(self) -> tuple[Tensor, np.ndarray]:
        """Tokens of all pictures that decode, and their indices; each process encodes a share."""
        local_items = np.array_split(np.arange(len(self.pairs)), self.world.size)[self.world.rank]
        size, encoded, usable = self.image_size, [], []
        for part in np.array_split(local_items, math.ceil(len(local_items) / 128) or 1):
            images, positions = load_or_skip(
                self.pairs, part, lambda x, _: center_crop(x, size), require_any=False
            )
            if positions:
                encoded.append(self._encode(images).cpu())
            usable += part[positions].tolist()
        tokens = torch.cat(encoded) if encoded else torch.empty(0, dtype=torch.int64, device="cpu")
        gathered = self.world.gather((tokens.numpy(), usable))
        usable = [i for _, items in gathered for i in items]
        tokens = torch.cat([torch.from_numpy(t) for t, _ in gathered if len(t)] or [tokens])
        if not usable:
            raise DataError(f"{self.pairs.name}: a picture must be usable, got none that is")
        return tokens, np.array(usable)
