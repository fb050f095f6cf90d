"""Training of the discrete VAE (paper A.2); the defaults are the paper's numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dalle.configs import Named, check_numbers, integer, integers, require, require_adamw
from dalle.console import say
from dalle.data.augment import center_crop, dvae_crop, to_tensor
from dalle.data.loader import StepLoader
from dalle.data.order import sampler_for
from dalle.data.pairs import Pairs, describe_pairs, load_or_draw, load_or_skip
from dalle.distributed.world import Solo, World
from dalle.dvae.bound import log_likelihood, lower_bound
from dalle.dvae.codebook import codebook_health, init_codebook
from dalle.dvae.likelihood import expected_pixels, map_pixels, psnr, set_psnr
from dalle.dvae.model import DiscreteVAE
from dalle.dvae.picture_size import remember_size
from dalle.dvae.straight_through import (
    QUANTIZERS,
    MovingCodebook,
    codebook_parameters,
    freeze_codebook,
    require_same_width,
    takes_nearest,
)
from dalle.errors import DataError, UsageError
from dalle.precision.queued import HostCopy, Values
from dalle.train.accumulate import Accumulated, micro_batches
from dalle.train.averaging import IterateAverage
from dalle.train.fine_tune import frozen, started_from
from dalle.train.held_out import held_out_pictures
from dalle.train.late import settle, step_values
from dalle.train.parts import run_parts, run_parts_no_grad, sum_parts
from dalle.train.schedules import cosine_ramp
from dalle.train.seeds import start_seed, step_seed
from dalle.train.task import averaged_model, described, full_model, local_batch, require_one_part
from dalle.train.update import update

COLLAPSED = "the codebook has collapsed: {words}; " + (
    "lower the step size or the KL weight, let the temperature fall more slowly, or warm start"
)
OF_RAMPS = ("tau_start", "tau_end", "tau_steps", "kl_weight", "kl_steps")
RELAXATION_OPTIONS = (*OF_RAMPS, "codebook_sharpness")
VECTOR_OPTIONS = ("quantizer", "commitment_weight", "codebook_decay")


@dataclass(frozen=True, kw_only=True)
class DvaeTrainConfig(Named):
    """The recipe. Fields down to `augment` are the paper's; the rest are named options beside it.

    Attributes:
        image_size: side in pixels of the training pictures.
        batch_size: pictures an update.
        tau_start, tau_end, tau_steps: temperature of the relaxation, a cosine ramp.
        kl_weight, kl_steps: beta in the paper's units, reached by a cosine ramp from 0.
        lr_start, lr_end, lr_steps: step size, a cosine ramp.
        beta1, beta2, eps, weight_decay: AdamW.
        average_decay: of the iterate averaging, at each update.
        augment: "paper" (listing 1), or "none": pictures are cropped to the centre and resized.
        distortion: "logit_laplace" (A.3), or "mse": mse_weight times the mean squared error of the
            mapped pixels in place of -ln f; ln b is then not trained.
        mse_weight: see `distortion`.
        average_warmup: whether the averaging decay grows from 0.1, for short runs.
        warm_start_steps: updates as a continuous autoencoder before the codebook exists; needs the
            patch stem. The ramps then count from the end of the warm start.
        warm_start_lr: step size of these updates, falling to a tenth along a cosine.
        codebook_sharpness, codebook_iterations, codebook_points: see `codebook.init_codebook`.
        codebook_images: pictures whose features are clustered.
        health_every: updates over which codes are counted; with straight-through, codes that took
            no position in them are revived.
        quantizer: "gumbel", or "straight-through": the nearest codes, a codebook of moving averages
            (`dvae.straight_through`). Temperature, KL weight and sharpness then have no effect, and
            without a warm start k-means comes before the first update.
        commitment_weight: of the mean of (feature - codebook vector)^2, with straight-through.
        codebook_decay: of the moving averages of the codebook, at each update; straight-through.
        parts: into which a batch is cut, run at the same time (`train.parts`).
        accumulate: batches of `batch_size` whose gradients make one update, computed one after
            the other: what one batch so many times as large gives, in less memory.
    """

    image_size: int = 256
    batch_size: int = 512
    tau_start: float = 1.0
    tau_end: float = 1 / 16
    tau_steps: int = 150_000
    kl_weight: float = 6.6
    kl_steps: int = 5_000
    lr_start: float = 1e-4
    lr_end: float = 1.25e-6
    lr_steps: int = 1_200_000
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-4
    average_decay: float = 0.999
    augment: str = "paper"
    distortion: str = "logit_laplace"
    mse_weight: float = 10.0
    average_warmup: bool = False
    warm_start_steps: int = 0
    warm_start_lr: float = 2e-3
    codebook_sharpness: float = 4.0
    codebook_iterations: int = 8
    codebook_points: int = 40_000
    codebook_images: int = 2048
    health_every: int = 100
    quantizer: str = "gumbel"
    commitment_weight: float = 0.25
    codebook_decay: float = 0.99
    parts: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        for name, choices in (
            ("augment", ("paper", "none")),
            ("distortion", ("logit_laplace", "mse")),
            ("quantizer", QUANTIZERS),
        ):
            require("dvae train", self, f"one of {', '.join(choices)}", choices.__contains__, name)
        sizes = ("image_size", "batch_size", "health_every", "tau_start", "tau_end", "lr_start")
        of_codes = ("codebook_sharpness", "codebook_iterations", "codebook_points")
        more = (*of_codes, "codebook_images", "parts", "accumulate", "mse_weight", "warm_start_lr")
        require("dvae train", self, "positive", lambda x: x > 0, *sizes, *more)
        lengths = ("tau_steps", "kl_steps", "lr_steps", "warm_start_steps")
        require("dvae train", self, "0 or more", lambda x: x >= 0, *lengths, "kl_weight", "lr_end")
        require("dvae train", self, "0 or more", lambda x: x >= 0, "commitment_weight")
        decays = ("average_decay", "codebook_decay")
        require("dvae train", self, "in [0, 1)", lambda x: 0 <= x < 1, *decays)
        require_adamw("dvae train", self)
        check_numbers("dvae train", self)

    @property
    def total_batch(self) -> int:
        """Pictures an update, over all micro-batches."""
        return self.batch_size * self.accumulate


class DvaeTask:
    """Trains a `DiscreteVAE` on the pictures of a data set; fits `train.loop.train`.

    In the place of a picture that cannot be used (broken, or smaller than the crop) another is
    drawn.

    Args:
        vae: the model to train, where `parallelize` has put it.
        pairs: pictures; their captions are not used.
        config: the recipe.
        seed: of the batches, crops, noise and the codebook.
        world: the processes that train together, each with the same arguments; a batch is shared
            out. The losses do not depend on how many there are.
        validation: the held-out part, for `evaluate`.
        workers: processes that read pictures ahead of time; 0 reads them in this one.

    Raises:
        UsageError: sizes that do not fit, or a warm start without the patch stem.
        DataError: too few pictures to make a codebook of after the warm start.
    """

    name = "dvae"

    def __init__(
        self,
        vae: DiscreteVAE,
        pairs: Pairs,
        config: DvaeTrainConfig,
        *,
        seed: int = 0,
        world: World | None = None,
        validation: Pairs | None = None,
        workers: int = 0,
    ) -> None:
        self.model, self.pairs, self.config, self.seed = vae, pairs, config, seed
        remember_size(vae, config.image_size)
        self.validation = validation
        self.device = next(vae.parameters()).device
        self.world: World = world or Solo(self.device)
        self.straight_through = config.quantizer == "straight-through"
        if self.straight_through:
            require_same_width("dvae train", vae.config)
            freeze_codebook(vae)
        self.data = describe_pairs(pairs)
        self.world.require_same(self.describe())
        require_one_part("dvae train", config.parts, self.world)
        rows, columns = vae.grid(config.image_size)
        if config.warm_start_steps and vae.config.stem != "patch":
            raise UsageError(
                f"dvae train: stem must be 'patch' for a warm start, got {vae.config.stem!r}"
            )
        # A codebook of k-means; not where a model that takes the nearest code is trained further.
        self.starts_codebook = config.warm_start_steps > 0 or (
            self.straight_through and not (started_from(vae) and takes_nearest(vae))
        )
        if self.starts_codebook:
            with self.world.raise_on_all():
                self._check_codebook()
        self.world.part(config.total_batch)
        self.sampler = sampler_for(pairs, config.total_batch, seed)
        on_gpu = self.device.type == "cuda"
        self.loader = StepLoader("dvae train", self.load, pairs, workers=workers, pin=on_gpu)
        self.optimizer = torch.optim.AdamW(
            [p for p in vae.parameters() if p.requires_grad],
            lr=config.lr_start,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.average: IterateAverage | None = self._new_average()
        self.codebook: MovingCodebook | None = None
        if self.straight_through:
            self.codebook = MovingCodebook(
                vae, config.codebook_decay, self.world.device, self.world.queue_sum_
            )
            self.codebook.reset(config.total_batch * rows * columns)
        self.counts = torch.zeros(vae.num_tokens, dtype=torch.int64, device="cpu")
        self.tokens_counted = 0
        self.health: dict[str, float] = {}

    def describe(self) -> dict[str, Any]:
        """What fixes the training: model, recipe, data, seed."""
        start = {**started_from(self.model), **frozen(self.model)}
        fixed = {**described(self.model, self.config), **start}
        if not self.straight_through:  # as before there was a choice
            fixed["train"] = {k: v for k, v in fixed["train"].items() if k not in VECTOR_OPTIONS}
        return {**fixed, "data": self.data, "seed": self.seed}

    def images(self, items: np.ndarray, limit: int) -> Tensor:
        """The first `limit` usable pictures among `items`, sorted by index, cropped to the centre:
        (B, 3, S, S) in [0, 1]."""
        size = self.config.image_size
        crops, positions = load_or_skip(
            self.pairs, items, lambda image, _: center_crop(image, size), limit=limit
        )
        return to_tensor([crops[i] for i in np.argsort(items[positions])]).to(self.device)

    def _check_codebook(self) -> None:
        """Whether the pictures give as many points as k-means needs, before the warm start."""
        c, codes = self.config, self.model.num_tokens
        points = math.prod(self.model.grid(c.image_size))
        num_images = math.ceil(codes / points)
        for name, minimum in (("codebook_points", codes), ("codebook_images", num_images)):
            if getattr(c, name) < minimum:
                raise UsageError(
                    f"dvae train: {name} must be at least {minimum} for {codes} codes, "
                    f"got {getattr(c, name)}"
                )
        crops, _ = load_or_skip(
            self.pairs,
            range(len(self.pairs)),
            lambda image, _: center_crop(image, c.image_size),
            require_any=False,
            limit=num_images,
        )
        if len(crops) < num_images:
            raise DataError(
                f"dvae train: data must hold at least {num_images} pictures that can be used for a "
                f"codebook of {codes} codes ({points} points a picture), got {len(crops)}"
            )

    def batch(self, step: int) -> Tensor:
        """This process's part of update `step`, (B, 3, S, S) in [0, 1]; crops by position."""
        return to_tensor(self.loader.get(step).numpy()).to(self.device)

    def load(self, step: int) -> Tensor:
        """The crops of `batch`, (B, S, S, 3) uint8 on the CPU."""
        part, size = self.part(), self.config.image_size

        def crop(image: np.ndarray, position: int) -> np.ndarray:
            if self.config.augment == "none":
                return center_crop(image, size)
            seed = step_seed(self.seed, step, 1, part.start + position)
            return dvae_crop(image, size, np.random.default_rng(seed))

        crops, _ = load_or_draw(
            self.pairs,
            self.sampler.indices(step)[part],
            lambda position: step_seed(self.seed, step, 4, part.start + position),
            crop,
        )
        return torch.from_numpy(np.stack(crops))

    def _empty_batch(self) -> Tensor:
        part, side = self.part(), self.config.image_size
        return torch.zeros(
            part.stop - part.start, 3, side, side, device=self.device, dtype=torch.float32
        )

    def part(self) -> slice:
        """The slice of a batch that is this process's."""
        return self.world.part(self.config.total_batch)

    def train_step(self, step: int) -> Values:
        """One update; before the codebook exists the codes are continuous."""
        c = self.config
        waited = self.loader.seconds
        images = local_batch(self.world, partial(self.batch, step), self._empty_batch)
        waited = self.loader.seconds - waited
        share = self.world.weight(c.total_batch)
        if step < c.warm_start_steps:

            def autoencode(rows: slice) -> tuple[Tensor, ...]:
                part = images[rows]
                mu, loss = self.model.autoencode(part)
                if c.distortion == "mse":
                    loss = self._mse(part, mu)
                weight = len(part) / len(images)
                return weight * loss, weight * self._psnr(part, mu)

            total, outputs = self._accumulate(autoencode, len(images), share)
            lr = cosine_ramp(step, c.warm_start_lr, c.warm_start_lr / 10, c.warm_start_steps)
            repeat_forward = partial(self.model.autoencode, images)
            grad_norm = update(self, total, step, lr=lr, forward=repeat_forward)
            loss, quality = sum_parts(outputs)
            means = {"loss": loss, "psnr": quality}
            others = {"grad_norm": grad_norm, "data_wait": waited, "images": len(images)}
            return self._global_means(share, means, others)
        if step == c.warm_start_steps and self.starts_codebook:
            settle(self)  # the average of the steps so far ends here
            self._make_codebook()
        ramp_step = step - c.warm_start_steps
        lr = cosine_ramp(ramp_step, c.lr_start, c.lr_end, c.lr_steps)
        if self.codebook is not None:
            return self._vector_step(self.codebook, step, images, lr, waited)
        tau = cosine_ramp(ramp_step, c.tau_start, c.tau_end, c.tau_steps)
        kl_weight = cosine_ramp(ramp_step, 0.0, c.kl_weight, c.kl_steps)
        seed, first = step_seed(self.seed, step, 2), self.part().start
        forward = partial(self.model, tau=tau, kl_weight=kl_weight, seed=seed)

        def relax(rows: slice) -> tuple[Tensor, ...]:
            part = images[rows]
            out = forward(part, first=first + rows.start)
            loss = out.loss
            if c.distortion == "mse":
                loss = self._mse(part, out.mu)
                if kl_weight:  # otherwise backward would compute with zeros
                    loss = loss + (out.loss - out.nll)
            losses = (loss, out.nll.detach(), out.kl.detach(), self._psnr(part, out.mu))
            return *(len(part) / len(images) * x for x in losses), out.codes

        total, outputs = self._accumulate(relax, len(images), share)
        repeat_forward = partial(forward, images, first=first)
        grad_norm = update(self, total, step, lr=lr, forward=repeat_forward)
        loss, nll, kl, quality = sum_parts([part[:-1] for part in outputs])
        codes = HostCopy({"codes": torch.cat([part[-1] for part in outputs])})
        means = {"loss": loss, "nll": nll, "kl": kl, "psnr": quality}
        shared = {"tau": tau, "kl_weight": kl_weight, "grad_norm": grad_norm, "data_wait": waited}
        more = partial(self._count, codes, step)
        return self._global_means(share, means, {**shared, "images": len(images)}, more)

    def _vector_step(
        self, codebook: MovingCodebook, step: int, images: Tensor, lr: float, waited: float
    ) -> Values:
        """One update of nearest codes with straight-through gradients, then of the codebook."""
        c, share = self.config, self.world.weight(self.config.total_batch)

        def quantize(rows: slice) -> tuple[Tensor, ...]:
            part = images[rows]
            out = self.model.vector_quantized(part)
            loss = self._mse(part, out.mu) if c.distortion == "mse" else out.nll
            loss = loss + c.commitment_weight * out.commitment
            losses = (loss, out.nll.detach(), out.commitment.detach(), self._psnr(part, out.mu))
            return *(len(part) / len(images) * x for x in losses), out.codes, out.features

        total, outputs = self._accumulate(quantize, len(images), share)
        repeat_forward = partial(self.model.vector_quantized, images)
        grad_norm = update(self, total, step, lr=lr, forward=repeat_forward)
        settle(self)  # the counts are then those of the steps before
        loss, nll, commitment, quality = sum_parts([part[:-2] for part in outputs])
        codes, features = (torch.cat([part[i] for part in outputs]) for i in (-2, -1))
        window_ends = (step + 1) % c.health_every == 0
        whole_window = window_ends and step + 1 - c.warm_start_steps >= c.health_every
        points = codes[0].numel()
        revived = codebook.update(
            features.permute(0, 2, 3, 1).flatten(0, 2),
            codes.flatten(),
            grad_norm,
            window=self.counts if whole_window else None,
            first=self.part().start * points,
            total=c.total_batch * points,
            seed=step_seed(self.seed, step, 5),
        )
        more = partial(self._count, HostCopy({"codes": codes, "revived": revived}), step)
        means = {"loss": loss, "nll": nll, "commitment": commitment, "psnr": quality}
        others = {"grad_norm": grad_norm, "data_wait": waited, "images": len(images)}
        return self._global_means(share, means, others, more)

    def _accumulate(
        self, run: Callable[[slice], tuple[Tensor, ...]], size: int, share: float
    ) -> tuple[Tensor | Accumulated, list[tuple[Tensor, ...]]]:
        """The loss for `update`, the first of what `run` gives; and a list that has all that it
        gave, part by part, once the update is done."""
        c = self.config
        outputs: list[tuple[Tensor, ...]] = []

        def micro_batch(rows: slice) -> Tensor:
            def part(inner: slice) -> tuple[Tensor, ...]:
                return run(slice(rows.start + inner.start, rows.start + inner.stop))

            made = run_parts(part, rows.stop - rows.start, c.parts, self.model)
            outputs.extend(tuple(x.detach() for x in one) for one in made)
            return sum_parts([one[:1] for one in made])[0] * share

        rows = micro_batches(size, c.total_batch, c.accumulate, self.world.size)
        return (Accumulated(micro_batch, rows) if len(rows) > 1 else micro_batch(rows[0])), outputs

    def pictures(self, step: int) -> dict[str, Tensor]:
        """Eight training pictures above their reconstructions with the averaged weights."""
        with averaged_model(self, step > self.config.warm_start_steps) as model:
            if model is None:
                return {}
            assert isinstance(model, DiscreteVAE)
            model.to(self.device)
            images = self.images(np.arange(min(len(self.pairs), 4096)), 8)
            rows = (images, self.reconstruct(model, images, step))
            return {"reconstructions": torch.cat([torch.cat(list(row), 2) for row in rows], 1)}

    @torch.no_grad()
    def reconstruct(self, model: DiscreteVAE, images: Tensor, step: int) -> Tensor:
        """Through the codes, or through the continuous ones where there are no codes yet."""
        if step <= self.config.warm_start_steps and self.config.warm_start_steps:
            return expected_pixels(model.autoencode(images)[0])
        return model.decode(model.encode(images))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Scores of the held-out pictures gone through the codes: "loss" (mean squared error),
        "psnr" (dB), "codes_used"; "elb" is `lower_bound`, the mean in nats a picture."""
        warm = self.config.warm_start_steps
        if self.validation is None or (warm and step <= warm):
            return {}
        assert isinstance(model, DiscreteVAE)
        vae = model.to(self.device)
        images = self._held_out.to(self.device)

        def round_trip(rows: slice) -> tuple[Tensor, ...]:
            tokens = vae.encode(images[rows])
            if self.straight_through:  # q is certain of the nearest code: its KL is ln K
                bound = log_likelihood(vae, images[rows], tokens)
                bound = bound - tokens[0].numel() * math.log(vae.num_tokens)
            else:
                bound = lower_bound(vae, images[rows], first=rows.start)
            return vae.decode(tokens).clamp(0, 1), tokens, bound

        outputs = run_parts_no_grad(
            round_trip, len(images), max(self.config.parts, len(images) // 64)
        )
        decoded, tokens, bounds = (torch.cat(tensors) for tensors in zip(*outputs, strict=True))
        return {
            "loss": float((decoded - images).square().mean()),
            "elb": float(bounds.double().mean()),
            "psnr": float(set_psnr(images, decoded)),
            "codes_used": float(len(tokens.unique())),
        }

    @cached_property
    def _held_out(self) -> Tensor:
        assert self.validation is not None
        return to_tensor(held_out_pictures(self.validation, self.config.image_size)[0])

    def state(self) -> dict[str, Any]:
        """The code counts of the window that is open, and the last window's health; the averaged
        counts of a codebook of moving averages."""
        counted: dict[str, Any] = {
            "counts": self.counts.tolist(),
            "tokens_counted": self.tokens_counted,
        }
        if self.codebook is not None:
            counted["codebook_counts"] = self.codebook.counts.tolist()
        return {**counted, "health": self.health}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores `state()`. Raises UsageError where it holds other numbers."""
        counts = integers("dvae", "counts", state["counts"], 0)
        if len(counts) != self.model.num_tokens:
            want = f"one for each of {self.model.num_tokens} codes"
            raise UsageError(f"dvae: counts must be {want}, got {len(counts)}")
        health = {str(name): float(value) for name, value in dict(state["health"]).items()}
        if self.codebook is not None:
            self.codebook.load_counts(state.get("codebook_counts"))
        self.tokens_counted = integer("dvae", "tokens_counted", state["tokens_counted"], 0)
        self.counts = torch.tensor(counts, dtype=torch.int64, device="cpu")
        self.health = health

    def _make_codebook(self) -> None:
        c = self.config
        order = np.random.default_rng(step_seed(self.seed, 0, 3)).permutation(len(self.pairs))
        with full_model(self) as model, self.world.raise_on_all():
            if model is not None:
                assert isinstance(model, DiscreteVAE)
                init_codebook(
                    model.to(self.device),
                    self.images(order, c.codebook_images),
                    sharpness=None if self.straight_through else c.codebook_sharpness,
                    iterations=c.codebook_iterations,
                    max_points=c.codebook_points,
                    seed=start_seed(self.seed, "codebook"),
                )
                codes, distinct = model.num_tokens, len(model.codebook().unique(dim=0))
                if distinct < codes:
                    say(
                        f"dvae train: only {distinct} of the {codes} codes differ at the start, "
                        "the pictures have no more different parts"
                    )
        self.average = self._new_average()

    def _new_average(self) -> IterateAverage:
        """Of the weights as they are; a codebook of moving averages is not averaged again."""
        c = self.config
        names = tuple(codebook_parameters(self.model)) if self.straight_through else ()
        return IterateAverage(self.model, c.average_decay, warmup=c.average_warmup, as_is=names)

    def _mse(self, images: Tensor, mu: Tensor) -> Tensor:
        error = (torch.sigmoid(mu) - map_pixels(images)).square().mean()
        return self.config.mse_weight * error

    @torch.no_grad()
    def _psnr(self, images: Tensor, mu: Tensor) -> Tensor:
        return psnr(images, expected_pixels(mu)).mean()

    def _global_means(
        self,
        share: float,
        means: dict[str, Tensor],
        others: dict[str, Any],
        more: Callable[[], Values] | None = None,
    ) -> Values:
        """A step's values over all processes; `means` are weighted by this process's share."""
        values = {k: v.detach() * share for k, v in means.items()} | others
        return step_values(self, values, more=more)

    def _count(self, codes: HostCopy, step: int) -> dict[str, float]:
        """Counts this batch's codes, without the noise, which would hide a collapse; the health."""
        read = codes.read()
        index = torch.as_tensor(read["codes"], dtype=torch.int64, device="cpu").flatten()
        counts = torch.bincount(index, minlength=len(self.counts))
        counts = self.world.sum(counts).long()
        self.counts += counts
        self.tokens_counted += int(counts.sum())
        if (step + 1) % self.config.health_every:
            return self.health
        health = codebook_health(self.counts)
        if health.collapsed(self.tokens_counted):
            say(f"dvae: after step {step + 1}: " + COLLAPSED.format(words=health.in_words()))
        self.health = {"codes_used": health.used, "perplexity": health.perplexity}
        if "revived" in read:
            self.health["revived"] = float(read["revived"])
        self.counts.zero_()
        self.tokens_counted = 0
        return self.health
