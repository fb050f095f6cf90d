"""Where a training's random numbers come from: seeds by step, and the global generators."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch

from dalle.configs import integer, seed_number
from dalle.devices import prepare_cublas


def step_seed(seed: int, step: int, stream: int = 0, *indices: int) -> int:
    """A 63-bit seed for step `step`, different for each `stream` and `indices`.

    Args:
        seed: of the training, 0 or more and below 2^63.
        step: update, 0 or more.
        stream: number of what is drawn, so that two uses in a step differ.
        indices: of the item in its batch, and of the draw for it; none for the batch as a whole.

    Raises:
        UsageError: a negative number, or a seed above 63 bits.
    """
    named = [("stream", stream), ("step", step), *(("index", i) for i in indices)]
    key = [integer("step_seed", name, number, 0) for name, number in named]
    sequence = np.random.SeedSequence(seed_number("step_seed", seed), spawn_key=key)
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def start_seed(seed: int, name: str) -> int:
    """A 63-bit seed for what is drawn once, by its name: first weights, a codebook.

    Different for each seed and each name. (Torch's generator on the CPU reads 32 bits of a seed,
    so that 0 and 2^32 are the same to it; the seeds returned here differ.)
    """
    return step_seed(seed, 0, 2**32 - 1, zlib.crc32(name.encode()))


@contextmanager
def reproducible(seed: int, deterministic: bool) -> Iterator[None]:
    """Seeds the global generators; with `deterministic`, no kernel that varies from run to run."""
    before = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    if deterministic:
        prepare_cublas()
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark


def rng_state() -> dict[str, Any]:
    """State of the global generators of torch (CPU and every CUDA device in use), numpy, random."""
    name, keys, position, has_gauss, gauss = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": [
            name,
            torch.tensor(keys.astype(np.int64), dtype=torch.int64, device="cpu"),
            position,
            has_gauss,
            gauss,
        ],
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores `rng_state()`; CUDA generators only where as many devices are there."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    random.setstate(state["python"])
