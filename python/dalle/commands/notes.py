"""Lines before a training on options that do nothing, or that do not fit its length."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from dalle.commands.presets import given
from dalle.distributed.config import ClusterConfig
from dalle.train.averaging import FIRST_SHARE, first_share
from dalle.train.config import LoopConfig
from dalle.train.dvae import DvaeTrainConfig
from dalle.train.prior_recipe import PriorTrainConfig
from dalle.train.ranker import RankerTrainConfig


def _unused(options: Any, config: Any, names: Iterable[str], why: str) -> Iterator[str]:
    """A line for each option that is given, is not its default, and does nothing."""
    values = given(options)
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in names:
        if values.get(name) and values[name] != defaults[name]:
            yield f"{name} {values[name]} does nothing {why}"


def _average(config: DvaeTrainConfig | PriorTrainConfig, updates: int, every: int) -> Iterator[str]:
    share = first_share(config.average_decay, max(0, updates) // every, config.average_warmup)
    if share > FIRST_SHARE:
        yield (
            f"the averaged weights will still hold {share:.0%} of the first ones after {updates} "
            "updates; take --average-warmup, a smaller --average-decay or more --steps"
        )


def _too_long(config: Any, names: Iterable[str], updates: int, what: str) -> Iterator[str]:
    for name in names:
        if getattr(config, name) > updates:
            yield (
                f"{name} {getattr(config, name)} is more than the {updates} updates {what}: its "
                "ramp will not reach its end"
            )


def dvae_notes(options: Any, config: DvaeTrainConfig, steps: int) -> Iterator[str]:
    """Of `dalle dvae train`."""
    warm = config.warm_start_steps
    left = steps - warm
    relaxed = config.quantizer == "gumbel"
    ramps = ["tau_steps"] * (relaxed and config.tau_start != config.tau_end)
    ramps += ["kl_steps"] * (relaxed and config.kl_weight > 0)
    ramps += ["lr_steps"] * (config.lr_start != config.lr_end)
    yield from _too_long(config, ramps, left, "after the warm start" if warm else "of the run")
    yield from _average(config, left, 1)
    if config.health_every > left:
        yield f"health_every {config.health_every}: no report of the codes in {left} updates"
    if not warm:
        names = [f.name for f in dataclasses.fields(config) if f.name.startswith("codebook_")]
        names = names if relaxed else []  # k-means comes in any case
        yield from _unused(options, config, ["warm_start_lr", *names], "without warm_start_steps")
    if config.distortion != "mse":
        yield from _unused(options, config, ["mse_weight"], "without --distortion mse")
    if not config.kl_weight:
        yield from _unused(options, config, ["kl_steps"], "with kl_weight 0")
    for ramp in ("lr", "tau"):
        if not getattr(config, f"{ramp}_steps"):
            yield from _unused(options, config, [f"{ramp}_start"], f"with {ramp}_steps 0")
    if not config.average_decay:
        yield from _unused(options, config, ["average_warmup"], "with average_decay 0")


def prior_notes(
    options: Any, config: PriorTrainConfig, steps: int, half_weights: bool = False
) -> Iterator[str]:
    """Of `dalle prior train`."""
    if config.warmup_steps >= steps:
        yield (
            f"warmup_steps {config.warmup_steps} is not less than the {steps} updates of the run: "
            f"the step size will end at {config.step_size(max(0, steps - 1)):.2g}, not at "
            f"{config.lr:.2g}"
        )
    yield from _average(config, steps, config.average_every)
    if config.decay == "cosine" and config.decay_steps < steps:
        left = steps - config.decay_steps
        yield f"decay_steps {config.decay_steps} ends before the run: {left} updates change nothing"
    if config.decay == "cosine" and config.decay_steps > steps:
        yield from _too_long(config, ["decay_steps"], steps, "of the run")
    if config.decay != "cosine":
        yield from _unused(options, config, ["decay_steps"], "without --decay cosine")
    plateau = ("plateau_window", "plateau_patience", "plateau_min_delta", "max_halvings")
    if config.decay != "plateau":
        yield from _unused(options, config, plateau, "without --decay plateau")
    elif given(options).keys() & set(plateau):
        length = config.plateau_window * (config.plateau_patience + 1)
        if length > steps:
            yield f"the step size cannot be halved before update {length}, the run has {steps}"
    if config.optimizer != "muon":
        yield from _unused(options, config, ["muon_scale"], "without --optimizer muon")
    if not half_weights:
        yield from _unused(options, config, ["stochastic_rounding"], "without --half-weights")
    if config.image_init != "codebook":
        scales = ("embedding_scale", "head_scale")
        yield from _unused(options, config, scales, "without --image-init codebook")
    if not config.average_decay:
        yield from _unused(options, config, ["average_warmup"], "with average_decay 0")


def ranker_notes(options: Any, config: RankerTrainConfig, steps: int, vae: bool) -> Iterator[str]:
    """Of `dalle ranker train`."""
    if config.warmup >= steps:
        yield (
            f"warmup {config.warmup} is not less than the {steps} updates of the run: the step "
            f"size will not reach {config.learning_rate:.2g}"
        )
    if not vae:
        yield from _unused(options, config, ["reconstructed"], "without --vae")
    elif not config.reconstructed and not config.spliced:
        yield "vae does nothing with reconstructed 0 and num_spliced 0"


def loop_notes(loop: LoopConfig, held_out: bool) -> Iterator[str]:
    """Of the options of every training."""
    if loop.validate_every and not held_out:
        yield f"validate_every {loop.validate_every} does nothing without --validation"
    if loop.accept_changes and loop.resume == "none":
        yield "accept_changes does nothing with --resume none"


def cluster_notes(cluster: ClusterConfig, processes: int) -> Iterator[str]:
    """Of the options of several processes, on one."""
    for field in dataclasses.fields(cluster):
        value = getattr(cluster, field.name)
        if processes == 1 and value != field.default:
            yield f"{field.name} {value} does nothing on one process; torchrun starts several"
    if processes > 1 and not cluster.powersgd_rank and cluster.powersgd_wire != "1-6-9":
        yield f"powersgd_wire {cluster.powersgd_wire} does nothing without --powersgd-rank"
