"""Refuses work that cannot fit in memory before a model is built, and says what would fit.

What is counted is a lower bound of what the work keeps, so nothing that would run is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from dalle.dvae.model import DiscreteVAE, DiscreteVAEConfig
from dalle.memory import free_memory, require_memory
from dalle.pipeline import Pipeline
from dalle.plan import memory
from dalle.prior.config import PRESETS, PriorConfig
from dalle.prior.sampling import SamplingConfig
from dalle.prior.step import candidate_bytes

TRAIN_BYTES = 20  # bytes a parameter: fp32 weight, gradient, two moments, average


def prior_bytes(shape: PriorConfig, batch: int) -> float:
    """Least bytes for training `shape` on one device, by `plan.memory` at its precision."""
    kind = "paper" if shape.half_weights else "fp32" if shape.precision == "fp32" else "bf16"
    parts = memory(shape, batch, kind)
    if shape.image_rank:  # the plan counts image tables of full width
        return parts["activations_checkpointed"]
    total = parts["total_checkpointed" if shape.checkpointing else "total"]
    return total - parts["moments"] / 2 if kind == "bf16" else total  # AdamW16 keeps 16 bits


def require_prior_fits(owner: str, shape: PriorConfig, batch: int, device: torch.device) -> None:
    """Raises EnvironmentProblem where training cannot fit on `device`."""
    free = free_memory(device)
    if free is None or prior_bytes(shape, batch) <= free:
        return
    advice = _batch(batch, lambda size: prior_bytes(shape, size) <= free)
    if advice is None:
        smaller = (
            (
                name,
                replace(
                    shape,
                    d_model=p.d_model,
                    num_heads=p.num_heads,
                    num_layers=p.num_layers,
                    attention=(),
                ),
            )
            for name, p in PRESETS.items()
        )
        fitting = [name for name, other in smaller if prior_bytes(other, 1) <= free]
        advice = f"--preset {fitting[-1]} would fit" if fitting else "no preset would fit"
    require_memory(owner, prior_bytes(shape, batch), f"a batch of {batch}", advice, device)


def dvae_bytes(config: DiscreteVAEConfig, image_size: int, batch: int) -> float:
    """Least bytes for training on one device: parameters, and activations for backward."""
    grid = (image_size // config.factor) ** 2
    if config.stem == "released":  # at full resolution, 2.5 widths a block, encoder and decoder
        activations = image_size**2 * config.n_hid * 5 * config.n_blk_per_group
    else:
        activations = grid * config.n_hid * 6 * config.n_blk_per_group
    pictures = 3 * image_size**2 + 2 * grid * config.vocab_size
    return TRAIN_BYTES * DiscreteVAE.min_parameters(config) + 4.0 * batch * (activations + pictures)


def require_dvae_fits(
    owner: str, config: DiscreteVAEConfig, image_size: int, batch: int, device: torch.device
) -> None:
    """Raises EnvironmentProblem where training cannot fit on `device`."""
    free = free_memory(device)
    if free is None or dvae_bytes(config, image_size, batch) <= free:
        return
    advice = _batch(batch, lambda size: dvae_bytes(config, image_size, size) <= free)
    needed = dvae_bytes(config, image_size, batch)
    description = f"a batch of {batch} pictures of {image_size} pixels"
    require_memory(
        owner, needed, description, advice or "take smaller pictures or a smaller model", device
    )


def require_group_fits(
    owner: str, pipeline: Pipeline, candidates: int, group: int, sampling: SamplingConfig
) -> None:
    """Raises EnvironmentProblem where the candidates that are weighted together cannot fit."""
    each, count = _candidate_bytes(pipeline, sampling), min(candidates, group)
    free = free_memory(pipeline.device)
    if free is not None and count * each > free:
        fits = _max_fitting(count, lambda number: number * each <= free)
        advice = f"--num-candidates {fits} would fit" if fits else "take a smaller model"
        description = f"{count} candidates at a time"
        require_memory(owner, count * each, description, advice, pipeline.device)


def require_best_fit(owner: str, pipeline: Pipeline, top: int, sampling: SamplingConfig) -> None:
    """Raises EnvironmentProblem where one candidate and the `top` kept ones cannot fit.

    Candidates are drawn in parts that fit, and only the best are kept: how many are drawn does not
    matter.
    """
    cache = _candidate_bytes(pipeline, sampling)
    picture = 2 * 4 * 3 * pipeline.image_size**2  # the pictures kept, and their next selection
    require_memory(owner, cache, "one candidate", "take a smaller model", pipeline.device)
    free = free_memory()
    if free is not None and top * picture > free:
        fits = _max_fitting(top, lambda count: count * picture <= free)
        advice = f"--top {fits} would fit" if fits else "take a smaller model"
        description = f"{top} pictures of {pipeline.image_size} pixels"
        require_memory(owner, top * picture, description, advice)


def _candidate_bytes(pipeline: Pipeline, sampling: SamplingConfig) -> int:
    return candidate_bytes(pipeline.prior.config, sampling.guided, sampling.cache_bits)


def _batch(batch: int, fits: Callable[[int], bool]) -> str | None:
    size = _max_fitting(batch, fits)
    return f"--batch-size {size} would fit" if size else None


def _max_fitting(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to `limit` that fits, to a power of two; 0 where 1 does not."""
    sizes: Iterable[int] = (1 << power for power in range(limit.bit_length()))
    return max((size for size in sizes if fits(size)), default=0)
