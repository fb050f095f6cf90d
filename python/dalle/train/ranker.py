"""Trains a `ContrastiveRanker` on the prior's own pairs (symmetric InfoNCE, as CLIP).

Three things make so small a ranker useful for choosing among samples, none of them in the paper,
which takes a ready CLIP:
- Batches hold groups of captions that differ in a word or two, so that the differences between
  samples of one caption (another colour, tone or relation) are what it learns to see.
- Spliced pictures (a rectangle of codes taken from elsewhere) are further negatives of every
  caption, so that a broken picture scores below an intact one.
- Part of the pictures has gone through the discrete VAE, since that is what samples look like.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dalle.configs import Named, check_numbers, integer, seed_number
from dalle.data.augment import center_crop, to_tensor
from dalle.data.codes import stores_of, tokens_of
from dalle.data.loader import StepLoader
from dalle.data.pairs import Pairs, captions_of, describe_pairs, load_or_draw, load_or_skip
from dalle.distributed.world import Solo, World
from dalle.dvae.model import DiscreteVAE
from dalle.errors import UsageError
from dalle.pictures import rows_of
from dalle.pretrained import fingerprint
from dalle.ranker.model import ContrastiveRanker
from dalle.train.accumulate import Accumulated, micro_batches
from dalle.train.averaging import IterateAverage
from dalle.train.fine_tune import frozen, started_from
from dalle.train.held_out import held_out_pictures
from dalle.train.parts import run_parts, run_parts_no_grad
from dalle.train.read_captions import ReadCaptions, are_many, ids_of
from dalle.train.schedules import cosine_ramp, linear_warmup
from dalle.train.seeds import step_seed
from dalle.train.similar_captions import caption_vectors, draw_similar, parts_by_weight, pool_size
from dalle.train.splicing import patches, pixels, splice
from dalle.train.task import with_precision
from dalle.train.update import update

Towers = Callable[[slice], tuple[torch.Tensor, ...]]
MAX_CACHED = 50_000  # items: larger sets have their codes and reconstructions computed every time
BLOCK = 32  # items that go through the dVAE at once


@dataclass(frozen=True, kw_only=True)
class RankerTrainConfig(Named):
    """How a ranker is trained.

    Args:
        batch_size: captions a batch, a multiple of `group`.
        group: similar captions drawn together; 1 draws batches without regard to captions.
        num_spliced: spliced pictures a batch, 0 to batch_size; None is half of batch_size.
        reconstructed: share of pictures shown as the dVAE gives them back, 0 to 1.
        learning_rate: peak, after `warmup` updates; ends at 3 % of it.
        warmup: updates.
        weight_decay: AdamW's, on matrices only.
        clip_norm: largest global gradient norm.
        parts: into which a batch is cut, run at the same time (`train.parts`).
        accumulate: batches of `batch_size` that make one, in which every picture is a negative of
            every caption; the towers run on one after the other, twice (Gao et al. 2021).
    """

    batch_size: int = 96
    group: int = 4
    num_spliced: int | None = None
    reconstructed: float = 0.75
    learning_rate: float = 1.5e-3
    warmup: int = 50
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    parts: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        check_numbers("ranker", self)
        requirements = (
            ("group", self.group >= 1, "at least 1"),
            (
                "batch_size",
                self.batch_size >= 2 and self.batch_size % max(self.group, 1) == 0,
                f"at least 2 and a multiple of group = {self.group}",
            ),
            ("num_spliced", 0 <= self.spliced <= self.batch_size, "0 to batch_size"),
            ("reconstructed", 0 <= self.reconstructed <= 1, "0 to 1"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "above 0 and finite"),
            ("clip_norm", self.clip_norm > 0, "above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more and finite"),
            ("warmup", self.warmup >= 0, "0 or more"),
            ("parts", self.parts >= 1, "at least 1"),
            ("accumulate", self.accumulate >= 1, "at least 1"),
        )
        for name, holds, requirement in requirements:
            if not holds:
                raise UsageError(f"ranker: {name} must be {requirement}, got {getattr(self, name)}")

    @property
    def spliced(self) -> int:
        """How many spliced pictures a batch has."""
        return self.batch_size // 2 if self.num_spliced is None else self.num_spliced

    @property
    def total_batch(self) -> int:
        """Captions an update, over all micro-batches."""
        return self.batch_size * self.accumulate


def contrastive_loss(
    logits: torch.Tensor, same: torch.Tensor, spliced: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean of the two cross entropies of InfoNCE: caption to picture, picture to caption.

    Args:
        logits: (B, B), row = caption, column = picture; matching pairs on the diagonal.
        same: (B, B) bool, True where two rows share a caption or a picture and are no negatives
            of each other.
        spliced: (B, M) captions against spliced pictures, which are negatives of every caption.
    """
    size = len(logits)
    labels = torch.arange(size, device=logits.device, dtype=torch.int64)
    duplicate = same & ~torch.eye(size, dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(duplicate, -1e4)
    rows = logits if spliced is None else torch.cat([logits, spliced], 1)
    return (F.cross_entropy(rows, labels) + F.cross_entropy(logits.T, labels)) / 2


class RankerTask:
    """Trains a `ContrastiveRanker` (see the module's first lines); fits `train.loop.train`.

    Args:
        ranker: the model.
        pairs: pictures with captions; of codes `DecodedPairs`, whose pictures are as `vae` gives
            them back, and whose tokens are there.
        config: hyper-parameters.
        vae: gives reconstructions; without one, pictures are spliced as they are.
        steps: updates in all; the step size falls along half a cosine over them.
        seed: of batches, splices and choices.
        validation: the held-out part, for `evaluate`.
        workers: processes that read pictures ahead of time; 0 reads them in this one.

    Raises:
        UsageError: no steps, fewer than two different captions, or pairs for a group.
    """

    name = "ranker"
    average: IterateAverage | None = None

    def __init__(
        self,
        ranker: ContrastiveRanker,
        pairs: Pairs,
        config: RankerTrainConfig,
        vae: DiscreteVAE | None = None,
        *,
        steps: int,
        seed: int = 0,
        validation: Pairs | None = None,
        workers: int = 0,
    ) -> None:
        self.model: nn.Module = ranker
        self.validation = validation
        self.world: World = Solo()
        self.steps = integer("ranker", "steps", steps, 1)
        self.ranker, self.pairs, self.config = ranker, pairs, config
        self.stores = stores_of(pairs)
        self.seed = seed_number("ranker", seed)
        on_gpu = ranker.log_scale.device.type == "cuda"
        self.loader = StepLoader("ranker train", self.load, pairs, workers=workers, pin=on_gpu)
        self.vae = vae.eval().requires_grad_(False) if vae is not None else None
        self.inputs = {
            "tokenizer": ranker.tokenizer.fingerprint(),
            "vae": None if vae is None else fingerprint(vae),
            "data": describe_pairs(pairs),
        }
        self.vae_cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.rows: dict[int, list[int]] = {}  # rows of `text`, where an item has several
        self.read: ReadCaptions | None = None  # in place of all that are kept
        if are_many(pairs):
            self.read = ReadCaptions(pairs, self._encode_text, ranker.config.vocab_size)
        else:
            self._keep_captions()
        self.parts = parts_by_weight(pairs, config.total_batch, config.group, self.seed)
        fewest = len(pairs) if self.parts is None else min(self.parts.sizes)
        max_group = pool_size(fewest) + 1
        if config.group > max_group:
            raise UsageError(
                f"ranker: group must be at most {max_group} for {fewest} pairs, got {config.group}"
            )
        trained = [p for p in ranker.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.dim() > 1]
        rest = [p for p in trained if p.dim() <= 1]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": rest, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            # There a flag on the device skips an update.
            fused=ranker.log_scale.device.type == "cuda",
        )

    def _encode_text(self, captions: Sequence[str]) -> torch.Tensor:
        return self.ranker.tokenizer.encode(captions, self.ranker.config.text_len)

    def _keep_captions(self) -> None:
        captions = list(self.pairs.captions)  # the first of each item, then all further ones
        for item in getattr(self.pairs, "several", {}):
            _, *more = captions_of(self.pairs, item)
            self.rows[item] = [item, *range(len(captions), len(captions) + len(more))]
            captions += more
        self.text = self._encode_text(captions)
        self.caption_ids = ids_of(self.text)
        if len(self.caption_ids[: len(self.pairs)].unique()) < 2:
            raise UsageError("ranker: pairs must hold two different captions, got fewer")
        self.caption_vectors = caption_vectors(self.text, self.ranker.config.vocab_size)

    def describe(self) -> dict[str, Any]:
        return {
            **self.inputs,
            **started_from(self.ranker),
            **frozen(self.ranker),
            "ranker": asdict(self.ranker.config),
            "train": {**with_precision(self.config, self.model), "steps": self.steps},
            "seed": self.seed,
        }

    def views(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A step's batch: indices (B,), pictures (B, 3, H, W), spliced pictures (M, 3, H, W)."""
        return self._views(*self.loader.get(step))

    def load(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Crops (B, H, W, 3) uint8 and items (B,) of a step's batch, and the generator's state
        after they were drawn; on the CPU."""
        rng = torch.Generator().manual_seed(step_seed(self.seed, step))
        sizes = self.config.total_batch, self.config.group
        parts = None if self.parts is None else self.parts.at(step)
        if self.read is None:
            ids = self.caption_ids[: len(self.pairs)]
            drawn = draw_similar(self.caption_vectors, ids, *sizes, rng, parts)
        else:
            drawn = self.read.draw(*sizes, rng, parts)
        size = self.ranker.config.image_size
        crops, items = load_or_draw(
            self.pairs,
            drawn.numpy(),
            lambda position: step_seed(self.seed, step, 1, position),
            lambda image, _: center_crop(image, size),
        )
        return torch.from_numpy(np.stack(crops)), torch.from_numpy(items), rng.get_state()

    def _views(
        self, crops: torch.Tensor, items: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rng = torch.Generator().set_state(state)
        item_ids = items.tolist()
        device = self.ranker.log_scale.device
        images = to_tensor(crops.numpy()).to(device)
        # Shuffled, since pictures of one group are neighbours, whose parts would hardly differ.
        order = torch.randperm(len(images), generator=rng, dtype=torch.int64, device="cpu")[
            : self.config.spliced * self.config.accumulate
        ]
        with torch.no_grad():
            if self.vae is None:
                spliced = patches(images[order], self.ranker.config.grid)
                spliced = pixels(splice(spliced, rng))
            else:
                tokens, decoded = self._cached_round_trip(item_ids, images)
                spliced = self._decode(splice(tokens[order], rng))
                replaced = (
                    torch.rand(len(images), generator=rng, dtype=torch.float32, device="cpu")
                    < self.config.reconstructed
                )
                images = torch.where(replaced.to(device)[:, None, None, None], decoded, images)
        return items, images, spliced

    def caption_rows(self, items: torch.Tensor, step: int) -> torch.Tensor:
        """(B,) row of `text` for each item; of several captions one is drawn each epoch, that is as
        often as the batches so far have as many items as the set, or as its part of a mixture."""
        rows = items.clone()
        for position, item in enumerate(items.tolist()):
            choices = self.rows.get(item)
            if choices:
                epoch = self._epoch(step, item)
                draw = np.random.default_rng(step_seed(self.seed, epoch, 2, item))
                rows[position] = choices[int(draw.integers(len(choices)))]
        return rows

    def _epoch(self, step: int, item: int) -> int:
        if self.parts is not None:
            return self.parts.epoch(step, item)
        return step * self.config.total_batch // len(self.pairs)

    def _text_of(self, items: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Captions of items, (B, L) ids, and (B,) numbers that are equal where they are."""
        if self.read is None:
            rows = self.caption_rows(items, step)
            return self.text[rows], self.caption_ids[rows]
        epochs = [self._epoch(step, item) for item in items.tolist()]
        text = self.read.text(items.tolist(), self.seed, epochs)
        return text, ids_of(text)

    def _cached_round_trip(
        self, items: list[int], images: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (B, h, w) and reconstructions (B, 3, H, W) of 8 bits a value.

        Cached by item, and computed in blocks that depend on the item alone: the last bits of
        logits may depend on the batch size, and a resumed run has computed other items before.
        """
        if self.stores:
            codes = tokens_of(self.pairs, items, [0] * len(items))
            return codes.view(-1, *self.stores[0].grid).to(images.device), images
        if len(self.pairs) > MAX_CACHED:
            codes, decoded = self._round_trip(images)
            return codes, decoded.float() / 255
        size = self.ranker.config.image_size
        for block in sorted({item // BLOCK for item in items if item not in self.vae_cache}):
            members = range(block * BLOCK, min((block + 1) * BLOCK, len(self.pairs)))
            crops, positions = load_or_skip(
                self.pairs, members, lambda im, _: center_crop(im, size), require_any=False
            )
            if crops:
                results = self._round_trip(to_tensor(crops).to(images.device))
                for position, code, reconstruction in zip(positions, *results, strict=True):
                    self.vae_cache[members[position]] = code, reconstruction
        for row, item in enumerate(items):
            if item not in self.vae_cache:  # its file has gone since `images` was read
                codes, decoded = self._round_trip(images[row : row + 1])
                self.vae_cache[item] = codes[0], decoded[0]
        pairs = [self.vae_cache[item] for item in items]
        codes = torch.stack([code for code, _ in pairs])
        return codes, torch.stack([decoded for _, decoded in pairs]).float() / 255

    def _round_trip(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (B, h, w) of pictures, and what the decoder makes of them, (B, 3, H, W) uint8."""
        assert self.vae is not None
        vae = self.vae

        def run(rows: slice) -> tuple[torch.Tensor, ...]:
            codes = vae.encode(images[rows])
            return codes, (vae.decode(codes).clamp(0, 1) * 255).round().to(torch.uint8)

        outputs = run_parts_no_grad(run, len(images), self.config.parts)
        codes, decoded = (torch.cat(tensors) for tensors in zip(*outputs, strict=True))
        return codes, decoded

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        assert self.vae is not None
        vae = self.vae
        outputs = run_parts_no_grad(
            lambda rows: (vae.decode(codes[rows]),), len(codes), self.config.parts
        )
        return torch.cat([images for (images,) in outputs])

    def train_step(self, step: int) -> Mapping[str, float | torch.Tensor]:
        waited = self.loader.seconds
        items, images, spliced = self.views(step)
        waited = self.loader.seconds - waited
        device = images.device
        text, ids = (x.to(device) for x in self._text_of(items, step))
        count = len(items)

        def towers(rows: slice) -> tuple[torch.Tensor, ...]:
            start, stop = (end * len(spliced) // count for end in (rows.start, rows.stop))
            features = self.ranker.encode_images(torch.cat([images[rows], spliced[start:stop]]))
            size = rows.stop - rows.start
            return self.ranker.encode_text(text[rows]), features[:size], features[size:]

        batches = micro_batches(count, count, self.config.accumulate, 1)
        features = self._features(towers, batches)
        text_features, image_features, spliced_features = features
        logits = self.ranker.scale * text_features @ torch.cat([image_features, spliced_features]).T
        pictures = items.to(device)
        same = (ids[:, None] == ids[None]) | (pictures[:, None] == pictures[None])
        negatives = logits[:, count:] if len(spliced) else None
        loss = contrastive_loss(logits[:, :count], same, negatives)
        with torch.no_grad():
            best = logits.argmax(1)
            correct = same.gather(1, best.clamp_max(count - 1)[:, None])[:, 0] & (best < count)
        peak = linear_warmup(step, self.config.learning_rate, self.config.warmup)
        lr = peak * cosine_ramp(step, 1.0, 0.03, self.steps)
        total: torch.Tensor | Accumulated = loss
        if len(batches) > 1:
            total = self._accumulate(loss, features, towers, batches)
        norm = update(self, total, step, lr=lr, clip_norm=self.config.clip_norm)
        return {
            "loss": loss.detach(),
            "accuracy": correct.float().mean(),
            "scale": self.ranker.scale.detach(),
            "grad_norm": norm,
            "data_wait": waited,
            "images": float(count),
        }

    def _features(self, towers: Towers, batches: Sequence[slice]) -> list[torch.Tensor]:
        """What the towers give for a batch; of several micro-batches, without their graphs."""
        if len(batches) == 1:
            outputs = run_parts(towers, batches[0].stop, self.config.parts, self.ranker)
            return [torch.cat(tensors) for tensors in zip(*outputs, strict=True)]
        made = []
        for rows in batches:
            with torch.no_grad():
                made += self._of_rows(towers, rows)
        return [torch.cat(tensors).requires_grad_() for tensors in zip(*made, strict=True)]

    def _of_rows(self, towers: Towers, rows: slice) -> list[tuple[torch.Tensor, ...]]:
        def part(inner: slice) -> tuple[torch.Tensor, ...]:
            return towers(slice(rows.start + inner.start, rows.start + inner.stop))

        return run_parts(part, rows.stop - rows.start, self.config.parts, self.ranker)

    def _accumulate(
        self,
        loss: torch.Tensor,
        features: Sequence[torch.Tensor],
        towers: Towers,
        batches: list[slice],
    ) -> Accumulated:
        """The gradient of a loss of all features, taken into the towers a micro-batch at a time."""
        scale = self.ranker.log_scale
        leaves = [*features, *([scale] if scale.requires_grad else [])]
        gradients = torch.autograd.grad(loss, leaves)
        count, sizes = len(features[0]), [len(f) for f in features]

        def run(rows: slice) -> torch.Tensor:
            made = [torch.cat(t) for t in zip(*self._of_rows(towers, rows), strict=True)]
            ends = [(rows.start * n // count, rows.stop * n // count) for n in sizes]
            total = sum(
                (ours * whole[begin:end]).sum()
                for ours, whole, (begin, end) in zip(made, gradients, ends, strict=False)
            )
            if scale.requires_grad and not rows.start:
                total = total + scale * gradients[-1]
            assert isinstance(total, torch.Tensor)
            return total

        return Accumulated(run, batches, lambda: loss.detach())

    def pictures(self, step: int) -> dict[str, torch.Tensor]:
        """Pictures of the step's batch above spliced ones."""
        _, images, spliced = self._views(*self.load(step))
        rows = [part[:8] for part in (images, spliced) if len(part)]
        width = min(len(row) for row in rows)
        return {"views": rows_of(*[row[:width] for row in rows])}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Scores of the held-out pairs: "accuracy", the share of captions that find their own
        picture, or one of the same caption, among all; "loss", their cross entropy; "choices", the
        number of pictures."""
        if self.validation is None:
            return {}
        assert isinstance(model, ContrastiveRanker)
        crops, captions = self._held_out
        images = to_tensor(crops).to(model.log_scale.device)
        outputs = run_parts_no_grad(
            lambda rows: (model.encode_images(images[rows]),),
            len(images),
            max(self.config.parts, len(images) // 64),
        )
        text = model.tokenizer.encode(captions, model.config.text_len).to(images.device)
        pictures = torch.cat([features for (features,) in outputs])
        logits = model.scale * model.encode_text(text) @ pictures.T
        partner = torch.arange(len(logits), device=logits.device, dtype=torch.int64)
        _, ids = torch.unique(text, dim=0, return_inverse=True)
        right = ids[logits.argmax(1)] == ids
        return {
            "loss": float(F.cross_entropy(logits, partner)),
            "accuracy": float(right.float().mean()),
            "choices": float(len(logits)),
        }

    @cached_property
    def _held_out(self) -> tuple[list[np.ndarray], list[str]]:
        assert self.validation is not None
        crops, items = held_out_pictures(self.validation, self.ranker.config.image_size)
        return crops, [self.validation.captions[i] for i in items]

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        return None
