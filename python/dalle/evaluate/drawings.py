"""Pictures that a pipeline draws for captions, kept on the disk as they come.

`Pipeline.generate` draws N candidates of a caption and orders them by the ranker. The best of the
first n of them, in the order of sampling, is what a run with n candidates would have kept; so one
drawing of 512 gives the best of 1, 2, 4, ... 512.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle.configs import Named, integer, integers, seed_number
from dalle.data.pairs import ArrayPairs, Pairs, evenly_spaced
from dalle.errors import DataError, UsageError
from dalle.evaluate.cache import CACHE, in_parts, key_of
from dalle.evaluate.sets import Source, captions_of_file
from dalle.memory import require_memory
from dalle.pictures import to_uint8
from dalle.pipeline import MAX_CANDIDATES, Generation, Pipeline
from dalle.pretrained import fingerprint

AT_ONCE = 512  # candidates of a part of the cache, about


@dataclass(frozen=True, kw_only=True)
class DrawConfig(Named):
    """How a pipeline that is given as a SOURCE draws.

    Attributes:
        captions: file of captions, one a line. Left out: those of the real set.
        num_candidates: samples of a caption; the best by the ranker is kept. Left out, what the
            pipeline says, else 64 (the paper takes 512).
        draw_seed: of the samples.
    """

    captions: Path | None = None
    num_candidates: int | None = None
    draw_seed: int = 0


@dataclass(frozen=True)
class Drawn:
    """What was drawn for B captions.

    Attributes:
        images: (B, len(sizes), S, S, 3) uint8: the best of the first n candidates, n of `sizes`.
        scores: (B, len(sizes)) float32 of the ranker, NaN without one.
        sizes: as asked for.
        captions: B.
        record: how it was drawn.
    """

    images: np.ndarray
    scores: np.ndarray
    sizes: list[int]
    captions: list[str]
    record: dict[str, Any]

    def set_of(self, size: int) -> Pairs:
        """The best of `size` candidates of each caption, as a set of pictures."""
        column = self.sizes.index(size)
        return ArrayPairs(f"best of {size}", self.images[:, column], self.captions)


def occurrences(captions: Sequence[str]) -> list[int]:
    """How often each caption has stood before it: a caption given twice is drawn twice."""
    seen: Counter[str] = Counter()
    numbers = []
    for caption in captions:
        numbers.append(seen[caption])
        seen[caption] += 1
    return numbers


def _description(pipeline: Pipeline) -> dict[str, str]:
    """Hashes of a pipeline's parts."""
    parts = {"vae": pipeline.vae, "prior": pipeline.prior, "ranker": pipeline.ranker}
    prints = {n: fingerprint(m) for n, m in parts.items() if isinstance(m, torch.nn.Module)}
    return {"tokenizer": pipeline.tokenizer.fingerprint(), **prints}


def draw(
    owner: str,
    pipeline: Pipeline,
    captions: Sequence[str],
    sizes: Sequence[int],
    *,
    drawn: int | None = None,
    seed: int = 0,
    cache: Path = CACHE,
) -> Drawn:
    """Draws the captions, or reads what an earlier call has drawn.

    Args:
        owner: begins the line of an error.
        pipeline: on its device.
        captions: B, one or more; repeated ones are drawn anew each time.
        sizes: numbers of candidates whose best is kept.
        drawn: candidates of each caption; the largest size if left out.
        seed: of the samples.
        cache: folder.

    Raises:
        UsageError: a size above what is drawn, or below 1.
        DataError: no captions.
    """
    sizes = integers(owner, "candidates", sizes, 1)
    seed = seed_number(owner, seed)
    if not sizes:
        raise UsageError(f"{owner}: candidates must be one number or more, got none")
    count = max(sizes) if drawn is None else integer(owner, "drawn", drawn, 1, MAX_CANDIDATES)
    count = integer(owner, "num_candidates", count, 1, MAX_CANDIDATES)
    if max(sizes) > count:
        raise UsageError(
            f"{owner}: candidates must be at most the {count} that are drawn, got {max(sizes)}"
        )
    captions = list(captions)
    if not captions:
        raise DataError(f"{owner}: captions must be one or more, got none")
    if count > 1 and pipeline.ranker is None:
        raise UsageError(
            f"{owner}: num_candidates must be 1 for a pipeline without a ranker, got {count}"
        )
    side = pipeline.image_size
    pixels = len(captions) * len(sizes) * side * side * 3
    what = f"{len(captions) * len(sizes)} pictures of {side} pixels"
    require_memory(owner, pixels, what, "take fewer captions")
    # All candidates of a caption are there at once, and their chunks beside them.
    what = f"{count} candidates of {side} pixels"
    require_memory(owner, count * 2 * 4 * 3 * side**2, what, "take fewer candidates")
    numbers = occurrences(captions)
    record = {
        "pipeline": _description(pipeline),
        "sampling": asdict(pipeline.sampling),
        "num_candidates": count,
        "draw_seed": seed,
    }
    description = {"kind": "drawings", "captions": captions, "sizes": sizes, **record}

    def compute(items: Sequence[int], done: Callable[[int], None]) -> dict[str, Tensor]:
        shape = (len(items), len(sizes))
        images = torch.empty(*shape, side, side, 3, dtype=torch.uint8, device="cpu")
        scores = torch.empty(*shape, dtype=torch.float32, device="cpu")
        finished = 0
        for number in sorted({numbers[i] for i in items}):
            rows = [row for row, i in enumerate(items) if numbers[i] == number]
            made = pipeline.generate(
                [captions[items[row]] for row in rows],
                num_candidates=count,
                top=count,
                seed=(seed + number) % 2**63,
            )
            for row, generation in zip(rows, made, strict=True):
                picks = best_of_first(generation, sizes)
                images[row] = torch.from_numpy(to_uint8(generation.images[picks]))
                scores[row] = generation.scores[picks].cpu()
            finished += len(rows)
            done(finished)
        return {"images": images, "scores": scores}

    def whole(read: dict[str, Tensor], count: int) -> bool:
        shape = (count, len(sizes), side, side, 3)
        images, scores = read.get("images"), read.get("scores")
        return (
            images is not None
            and scores is not None
            and images.shape == shape
            and images.dtype == torch.uint8
            and scores.shape == shape[:2]
        )

    parts, _ = in_parts(
        owner,
        Path(cache) / "drawings" / key_of(description),
        len(captions),
        max(1, AT_ONCE // count),
        compute,
        name=f"drawing {len(captions)} captions",
        check=whole,
    )
    images = np.concatenate([part["images"].numpy() for part in parts])
    values = np.concatenate([part["scores"].numpy() for part in parts])
    return Drawn(images, values, sizes, captions, record)


def best_of_first(generation: Generation, sizes: Sequence[int]) -> list[int]:
    """Positions in a generation (best first) of the best among the first n candidates.

    Without a ranker candidates stand in the order of sampling, so it is the first one.
    """
    order = generation.order.tolist()
    return [next(i for i, candidate in enumerate(order) if candidate < size) for size in sizes]


def captions_to_draw(
    owner: str, file: Path | None, real: Pairs | None, count: int | None
) -> list[str]:
    """The captions of a file, else of the real set, at most `count` of them, evenly spaced.

    Raises:
        UsageError: there is neither.
    """
    if file is not None:
        captions = captions_of_file(owner, file)
    else:
        captions = [caption for caption in real.captions if caption] if real is not None else []
        if not captions:
            raise UsageError(
                f"{owner}: captions must be given for a pipeline, as a file or by a real set that "
                "has captions, got none"
            )
    if count is not None and count < len(captions):
        captions = [captions[i] for i in evenly_spaced(len(captions), count)]
    return captions


def draw_source(
    owner: str,
    spec: str,
    pipeline: Pipeline,
    captions: Sequence[str],
    *,
    num_candidates: int | None = None,
    seed: int = 0,
    cache: Path = CACHE,
) -> Source:
    """A pipeline's drawings as a SOURCE: the best of `num_candidates` for each caption."""
    if num_candidates is not None:
        num_candidates = integer(owner, "num_candidates", num_candidates, 1, MAX_CANDIDATES)
    else:
        num_candidates = (pipeline.num_candidates or 64) if pipeline.ranker is not None else 1
    made = draw(owner, pipeline, captions, [num_candidates], seed=seed, cache=cache)
    return Source(spec, "pipeline", made.set_of(num_candidates), {"drawn": made.record})


def mean_score(scores: np.ndarray) -> float | None:
    """The mean of the ranker's scores, None without a ranker."""
    mean = float(np.mean(scores))
    return None if math.isnan(mean) else mean
