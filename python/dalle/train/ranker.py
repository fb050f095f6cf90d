"""Trains a `ContrastiveRanker` on the prior's own pairs (symmetric InfoNCE, as CLIP).

Three things make so small a ranker useful for choosing among samples, none of them in the paper,
which takes a ready CLIP:
- Batches hold groups of captions that differ in a word or two, so that the differences between
  samples of one caption (another colour, tone or relation) are what it learns to see.
- Spliced pictures (a rectangle of codes taken from elsewhere) stand as further wrong answers to
  each caption, so that a broken picture scores below a whole one.
- Part of the pictures has gone through the discrete VAE, since that is what samples look like.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dalle.configs import check_numbers, integer, seed_number
from dalle.data.augment import center_crop, to_tensor
from dalle.data.pairs import Pairs, captions_of, fingerprints, load_or_draw, load_or_skip
from dalle.distributed.world import Solo, World
from dalle.dvae.model import DiscreteVAE
from dalle.errors import UsageError
from dalle.pictures import rows_of
from dalle.pretrained import fingerprint
from dalle.ranker.model import ContrastiveRanker
from dalle.train.averaging import IterateAverage
from dalle.train.parts import side_by_side, spread
from dalle.train.schedules import cosine_ramp, linear_warmup
from dalle.train.seeds import step_seed
from dalle.train.splicing import patches, pixels, splice
from dalle.train.update import update

REMEMBERED = 50_000  # items whose codes and reconstruction are kept; of larger sets none are
BLOCK = 32  # items that go through the dVAE at once
POOL = 2048  # captions among which a batch's look-alikes are searched


@dataclass(frozen=True, kw_only=True)
class RankerTrainConfig:
    """How a ranker is trained.

    Args:
        batch_size: captions a batch, a multiple of `group`.
        group: captions that look alike; 1 draws batches without regard to captions.
        num_spliced: spliced pictures a batch, 0 to batch_size; None is half of batch_size.
        reconstructed: share of pictures shown as the dVAE gives them back, 0 to 1.
        learning_rate: peak, after `warmup` updates; ends at 3 % of it.
        warmup: updates.
        weight_decay: AdamW's, on matrices only.
        clip_norm: largest global gradient norm.
        parts: of a batch, computed side by side (`train.parts`); each uses torch's threads.
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
        )
        for name, holds, requirement in requirements:
            if not holds:
                raise UsageError(f"ranker: {name} must be {requirement}, got {getattr(self, name)}")

    @property
    def spliced(self) -> int:
        """How many spliced pictures a batch has."""
        return self.batch_size // 2 if self.num_spliced is None else self.num_spliced


def contrastive_loss(
    logits: torch.Tensor, same: torch.Tensor, spliced: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean of the two cross entropies of InfoNCE: caption to picture, picture to caption.

    Args:
        logits: (B, B), row = caption, column = picture; partners on the diagonal.
        same: (B, B) bool, True where two rows share a caption or a picture: no wrong answers to
            each other.
        spliced: (B, M) captions against broken pictures, which are wrong answers to every caption.
    """
    size = len(logits)
    partner = torch.arange(size, device=logits.device, dtype=torch.int64)
    twin = same & ~torch.eye(size, dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(twin, -1e4)
    rows = logits if spliced is None else torch.cat([logits, spliced], 1)
    return (F.cross_entropy(rows, partner) + F.cross_entropy(logits.T, partner)) / 2


class Bags(NamedTuple):
    """Captions as bags of tokens, rare ones heavier: what makes two of them look alike.

    Attributes:
        tokens: (N, L) int64, padded with 0.
        weights: (N, L), each row of length 1; 0 at padding and where a token comes again.
        vocab_size: V.
    """

    tokens: torch.Tensor
    weights: torch.Tensor
    vocab_size: int

    def dense(self, items: torch.Tensor) -> torch.Tensor:
        """(M,) indices -> (M, V)."""
        rows = torch.zeros(len(items), self.vocab_size, dtype=torch.float32, device="cpu")
        return rows.scatter_add_(1, self.tokens[items], self.weights[items])

    def products(self, items: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """(M,) and (P,) indices -> (M, P): `dense(items) @ dense(others).T`, from P L numbers."""
        return F.embedding_bag(
            self.tokens[others],
            self.dense(items).T.contiguous(),
            per_sample_weights=self.weights[others],
            mode="sum",
        ).T


def bags_of(text: torch.Tensor, vocab_size: int) -> Bags:
    """Bags of (N, L) ids padded with -1."""
    tokens = text.sort(1).values
    counted = (tokens >= 0).float()
    counted[:, 1:] *= tokens[:, 1:] != tokens[:, :-1]
    tokens = tokens.clamp_min(0)
    share = torch.zeros(vocab_size, dtype=torch.float32, device="cpu").index_add_(
        0, tokens.flatten(), counted.flatten()
    )
    rarity = -(share / max(len(text), 1)).clamp_min(1 / max(len(text), 1)).log()
    return Bags(tokens, F.normalize(counted * rarity.clamp_min(0.05)[tokens], dim=1), vocab_size)


def pool_size(count: int) -> int:
    """Of `count` pairs, how many are looked through for look-alikes in a step."""
    return min(POOL, 4 * count)


def look_alikes(
    bags: Bags, caption_ids: torch.Tensor, size: int, group: int, rng: torch.Generator
) -> torch.Tensor:
    """Draws a batch in groups: one item at random, then those nearest to it in words.

    Neighbours come from a random pool with a little noise, so that groups differ from step to step;
    never one with the very same caption.

    Args:
        bags: of N captions.
        caption_ids: (N,) equal where captions are.
        size: batch size, a multiple of `group`.
        group: items a group.
        rng: source of all choices.

    Returns:
        (size,) int64 indices.
    """
    size, group = integer("ranker", "size", size, 1), integer("ranker", "group", group, 1)
    count = len(caption_ids)
    first = torch.randint(count, (size // group,), generator=rng, dtype=torch.int64, device="cpu")
    if group == 1:
        return first
    pool = torch.randint(count, (pool_size(count),), generator=rng, dtype=torch.int64, device="cpu")
    near = bags.products(first, pool)
    near += torch.rand(near.shape, generator=rng, dtype=torch.float32, device="cpu") * 0.05
    near[caption_ids[first][:, None] == caption_ids[pool][None]] -= 2.0
    others = pool[near.topk(group - 1, dim=1).indices]
    return torch.cat([first[:, None], others], 1).flatten()


class RankerTask:
    """What `dalle.train.loop.train` trains: see the module's first lines.

    Args:
        ranker: the model.
        pairs: pictures with captions.
        config: hyper-parameters.
        vae: gives reconstructions; without one, pictures are spliced as they are.
        steps: updates in all; the step size falls along half a cosine over them.
        seed: of batches, splices and choices.

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
    ) -> None:
        self.model: nn.Module = ranker
        self.world: World = Solo()
        self.steps = integer("ranker", "steps", steps, 1)
        self.ranker, self.pairs, self.config = ranker, pairs, config
        self.seed = seed_number("ranker", seed)
        self.vae = vae.eval().requires_grad_(False) if vae is not None else None
        self.given = {
            "tokenizer": ranker.tokenizer.fingerprint(),
            "vae": None if vae is None else fingerprint(vae),
            "data": {"pairs": len(pairs), **fingerprints(pairs)},
        }
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        captions = list(pairs.captions)  # the first of each item, then the others of some
        self.rows: dict[int, list[int]] = {}  # of the items with several captions
        for item in getattr(pairs, "several", {}):
            _, *others = captions_of(pairs, item)
            self.rows[item] = [item, *range(len(captions), len(captions) + len(others))]
            captions += others
        self.text = ranker.tokenizer.encode(captions, ranker.config.text_len)
        _, ids = torch.unique(self.text, dim=0, return_inverse=True)
        self.caption_ids = ids
        if len(ids[: len(pairs)].unique()) < 2:
            raise UsageError("ranker: pairs must hold two different captions, got fewer")
        most = pool_size(len(pairs)) + 1
        if config.group > most:
            raise UsageError(
                f"ranker: group must be at most {most} for {len(pairs)} pairs, got {config.group}"
            )
        self.bags = bags_of(self.text, ranker.config.vocab_size)
        matrices = [p for p in ranker.parameters() if p.dim() > 1]
        rest = [p for p in ranker.parameters() if p.dim() <= 1]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": rest, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.98),
        )

    def describe(self) -> dict[str, Any]:
        return {
            **self.given,
            "ranker": asdict(self.ranker.config),
            "train": {**asdict(self.config), "steps": self.steps},
            "seed": self.seed,
        }

    def views(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A step's batch: indices (B,), pictures (B, 3, H, W), spliced pictures (M, 3, H, W)."""
        rng = torch.Generator().manual_seed(step_seed(self.seed, step))
        wanted = look_alikes(
            self.bags,
            self.caption_ids[: len(self.pairs)],
            self.config.batch_size,
            self.config.group,
            rng,
        )
        size = self.ranker.config.image_size
        found, items = load_or_draw(
            self.pairs,
            wanted.numpy(),
            lambda place: step_seed(self.seed, step, 1, place),
            lambda image, _: center_crop(image, size),
        )
        kept = items.tolist()
        device = self.ranker.log_scale.device
        images = to_tensor(found).to(device)
        # Pictures of one group stand side by side; taking from elsewhere makes worse mistakes.
        order = torch.randperm(len(images), generator=rng, dtype=torch.int64, device="cpu")[
            : self.config.spliced
        ]
        with torch.no_grad():
            if self.vae is None:
                spliced = patches(images[order], self.ranker.config.grid)
                spliced = pixels(splice(spliced, rng))
            else:
                tokens, again = self._through_vae(kept, images)
                spliced = self._decode(splice(tokens[order], rng))
                shown = (
                    torch.rand(len(images), generator=rng, dtype=torch.float32, device="cpu")
                    < self.config.reconstructed
                )
                images = torch.where(shown.to(device)[:, None, None, None], again, images)
        return torch.tensor(kept, dtype=torch.int64, device="cpu"), images, spliced

    def caption_rows(self, items: torch.Tensor, step: int) -> torch.Tensor:
        """(B,) which row of `text` stands for each item: of several captions one is drawn."""
        rows = items.clone()
        for place, item in enumerate(items.tolist()):
            own = self.rows.get(item)
            if own:
                draw = np.random.default_rng(step_seed(self.seed, step, 2, place))
                rows[place] = own[int(draw.integers(len(own)))]
        return rows

    def _through_vae(
        self, items: list[int], images: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (B, h, w) and reconstructions (B, 3, H, W) of 8 bits a value.

        Remembered by item, and made in blocks that depend on nothing but the item: the last bits of
        a code's logits may hang on the size of the batch, and a resumed run has seen other items.
        """
        if len(self.pairs) > REMEMBERED:
            codes, back = self._round_trip(images)
            return codes, back.float() / 255
        size = self.ranker.config.image_size
        for block in sorted({item // BLOCK for item in items if item not in self.seen}):
            inside = range(block * BLOCK, min((block + 1) * BLOCK, len(self.pairs)))
            found, places = load_or_skip(
                self.pairs, inside, lambda im, _: center_crop(im, size), some=False
            )
            if found:
                made = self._round_trip(to_tensor(found).to(images.device))
                for place, code, again in zip(places, *made, strict=True):
                    self.seen[inside[place]] = code, again
        for row, item in enumerate(items):
            if item not in self.seen:  # its file has gone since `images` was read
                codes, back = self._round_trip(images[row : row + 1])
                self.seen[item] = codes[0], back[0]
        pairs = [self.seen[item] for item in items]
        codes = torch.stack([code for code, _ in pairs])
        return codes, torch.stack([back for _, back in pairs]).float() / 255

    def _round_trip(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (B, h, w) of pictures, and what the decoder makes of them, (B, 3, H, W) uint8."""
        assert self.vae is not None
        vae = self.vae

        def run(place: slice) -> tuple[torch.Tensor, ...]:
            codes = vae.encode(images[place])
            return codes, (vae.decode(codes).clamp(0, 1) * 255).round().to(torch.uint8)

        found = spread(run, len(images), self.config.parts)
        codes, back = (torch.cat(each) for each in zip(*found, strict=True))
        return codes, back

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        assert self.vae is not None
        vae = self.vae
        found = spread(lambda place: (vae.decode(codes[place]),), len(codes), self.config.parts)
        return torch.cat([images for (images,) in found])

    def train_step(self, step: int) -> Mapping[str, float | torch.Tensor]:
        items, images, spliced = self.views(step)
        device = images.device
        rows, count = self.caption_rows(items, step), len(items)
        text = self.text[rows].to(device)

        def towers(place: slice) -> tuple[torch.Tensor, ...]:
            start, stop = (end * len(spliced) // count for end in (place.start, place.stop))
            seen = self.ranker.encode_images(torch.cat([images[place], spliced[start:stop]]))
            own = place.stop - place.start
            return self.ranker.encode_text(text[place]), seen[:own], seen[own:]

        found = side_by_side(towers, count, self.config.parts, self.ranker)
        words, own, broken = (torch.cat(each) for each in zip(*found, strict=True))
        logits = self.ranker.scale * words @ torch.cat([own, broken]).T
        ids, pictures = self.caption_ids[rows].to(device), items.to(device)
        same = (ids[:, None] == ids[None]) | (pictures[:, None] == pictures[None])
        wrong = logits[:, count:] if len(spliced) else None
        loss = contrastive_loss(logits[:, :count], same, wrong)
        with torch.no_grad():
            best = logits.argmax(1)
            right = same.gather(1, best.clamp_max(count - 1)[:, None])[:, 0] & (best < count)
        peak = linear_warmup(step, self.config.learning_rate, self.config.warmup)
        lr = peak * cosine_ramp(step, 1.0, 0.03, self.steps)
        norm = update(self, loss, step, lr=lr, clip_norm=self.config.clip_norm)
        return {
            "loss": loss.detach(),
            "accuracy": right.float().mean(),
            "scale": self.ranker.scale.detach(),
            "grad_norm": norm,
            "images": float(count),
        }

    def pictures(self, step: int) -> dict[str, torch.Tensor]:
        """Pictures of the step's batch above spliced ones: what it is taught to tell apart."""
        _, images, spliced = self.views(step)
        rows = [part[:8] for part in (images, spliced) if len(part)]
        width = min(len(row) for row in rows)
        return {"views": rows_of(*[row[:width] for row in rows])}

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        return None
