"""Best of N as a stream: candidates are drawn in parts, decoded and scored, the best are kept.

Memory holds one part and the best k of each caption in work, however many candidates there are.
Shape letters: k pictures kept, h x w code grid, H = W side in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol, TypedDict

import torch
from torch import Tensor

from dalle.errors import UsageError
from dalle.prior.decode import Drawn, Progress
from dalle.prior.editing import Weighted
from dalle.prior.particles import systematic
from dalle.prior.sampling import MAX_BATCH, DrawConfig, SamplingConfig

Finish = Callable[[Tensor], Tensor]
"""Decoded candidates (n, 3, H, W) -> what is scored and kept of them, on the CPU."""


@dataclass(frozen=True)
class Generation:
    """What was drawn for one caption, best first.

    Attributes:
        images: (k, 3, H, W) float32 in [0, 1].
        scores: (k,) float32, higher is better; NaN where there is no ranker.
        tokens: (k, h, w) int64.
        order: (k,) int64, which candidate each was, in the order of sampling.
    """

    images: Tensor
    scores: Tensor
    tokens: Tensor
    order: Tensor


@dataclass(frozen=True)
class RowsFinished:
    """Candidates of a part of the work have one more row of codes.

    Attributes:
        caption: index of the caption.
        candidates: their numbers.
        rows: finished rows, 1 to h.
        tokens: (n, rows, w) int64 on the CPU; `Pipeline.decode` turns them into the pictures' top.
    """

    caption: int
    candidates: range
    rows: int
    tokens: Tensor


@dataclass(frozen=True)
class CandidateFinished:
    """A candidate is drawn, decoded and scored.

    Attributes:
        caption: index of the caption.
        candidate: its number.
        image: (3, H, W) float32 in [0, 1].
        score: higher is better; NaN where there is no ranker.
        tokens: (h, w) int64.
    """

    caption: int
    candidate: int
    image: Tensor
    score: float
    tokens: Tensor


@dataclass(frozen=True)
class Finished:
    """A caption is done, or the work was cancelled.

    Attributes:
        caption: index of the caption.
        generation: the best of the candidates that were finished; of none where there is none.
        drawn: how many were finished.
        cancelled: whether candidates are missing because `cancel` said so.
    """

    caption: int
    generation: Generation
    drawn: int
    cancelled: bool


Event = RowsFinished | CandidateFinished | Finished


class SampleOptions(TypedDict, total=False):
    """Keywords of `Pipeline.sample` that all others have as well."""

    seed: int
    first_candidate: int | Sequence[int]
    max_batch: int | None
    weights: str
    progress: Progress | None
    code_progress: Progress | None


class DrawOptions(SampleOptions, total=False):
    """Keywords that `Pipeline.generate`, `stream`, `edit` and `edit_stream` share."""

    num_candidates: int | None
    top: int | None
    sampling: SamplingConfig | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    cond_scale: float | None
    cache_bits: int | None
    cancel: Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class Request(DrawConfig):
    """What is drawn and kept of each caption, with all numbers known: `Pipeline.request` makes it.

    Args:
        top: how many candidates are kept.
        cancel: asked after every code; once it is true, what is finished is handed over.
        progress: called with (sequences done, sequences in all) after each part.
        code_progress: called with (codes done, codes in all) after each code of a part.
    """

    top: int = 1
    cancel: Callable[[], bool] = lambda: False
    progress: Progress | None = None
    code_progress: Progress | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("cancel", "progress", "code_progress"):
            call = getattr(self, name)
            if not (callable(call) or (call is None and name != "cancel")):
                raise UsageError(f"generate: {name} must be a function, got {type(call).__name__}")


class Best:
    """Keeps the k best of a caption's candidates; of equal scores, and of NaN, the first.

    Args:
        top: k.
        grid: (h, w) of the codes.
        image_size: H.
    """

    def __init__(self, top: int, grid: tuple[int, int], image_size: int) -> None:
        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(0, *shape, dtype=dtype, device="cpu")

        self.top, self.drawn = top, 0
        self.kept = Generation(
            empty(3, image_size, image_size, dtype=torch.float32),
            empty(dtype=torch.float32),
            empty(*grid, dtype=torch.int64),
            empty(dtype=torch.int64),
        )

    def add(self, images: Tensor, scores: Tensor, tokens: Tensor, numbers: Tensor) -> None:
        """Candidates with their scores and numbers; see `Generation` for the shapes."""
        self.drawn += len(numbers)
        kept = self.kept
        scores = torch.cat([kept.scores, scores])
        order = scores.nan_to_num(-math.inf, posinf=math.inf, neginf=-math.inf)
        best = order.argsort(descending=True, stable=True)[: self.top]

        def chosen(before: Tensor, new: Tensor) -> Tensor:  # copies no picture that is not kept
            old = [before[i] if i < len(before) else new[i - len(before)] for i in best.tolist()]
            return torch.stack(old) if old else before

        self.kept = Generation(
            chosen(kept.images, images),
            scores[best],
            chosen(kept.tokens, tokens),
            torch.cat([kept.order, numbers])[best],
        )


class SupportsChoosing(Protocol):
    """What this file needs of a `Pipeline`, which calls it."""

    grid: tuple[int, int]
    image_size: int

    def decode(self, tokens: Tensor) -> Tensor: ...
    def score(self, caption: str, images: Tensor) -> Tensor: ...


def choose(
    pipeline: SupportsChoosing,
    captions: Sequence[str],
    steps: Generator[Drawn],
    request: Request,
    finish: Finish = lambda images: images,
) -> Generator[Event]:
    """Turns steps of drawing into events; every caption has one `Finished`.

    Args:
        pipeline: decodes and scores.
        captions: of the steps.
        steps: of `draw_parts` or what draws likewise: all parts of a caption before the next.
        request: what was asked for.
        finish: see `Finish`.
    """
    grid, first = pipeline.grid, request.first(len(captions))
    columns = grid[1]
    best = {i: Best(request.top, grid, pipeline.image_size) for i in range(len(first))}
    stopped = False
    with closing(counted(steps, len(first), request)) as steps:
        for drawn in steps:
            stopped = request.cancel()
            if drawn.slots % columns == 0:
                rows = drawn.slots // columns
                for row, caption in enumerate(drawn.captions):
                    so_far = drawn.tokens[row, :, : drawn.slots].unflatten(1, (rows, columns)).cpu()
                    yield RowsFinished(
                        caption, _numbers(first[caption], drawn), rows, so_far.clone()
                    )
            for row, caption in enumerate(drawn.captions if drawn.done else ()):
                tokens = drawn.tokens[row].unflatten(1, grid)
                images = finish(pipeline.decode(tokens))
                scores, tokens = pipeline.score(captions[caption], images), tokens.cpu().clone()
                numbers = _numbers(first[caption], drawn)
                number = torch.tensor(numbers, dtype=torch.int64, device="cpu")
                best[caption].add(images, scores, tokens, number)
                for each in zip(numbers, images, scores.tolist(), tokens, strict=True):
                    yield CandidateFinished(caption, *each)
                if best[caption].drawn == request.num_samples:
                    keeper = best.pop(caption)
                    yield Finished(caption, keeper.kept, keeper.drawn, False)
            if stopped:
                break
    for caption, keeper in best.items():
        yield Finished(caption, keeper.kept, keeper.drawn, True)


def _numbers(first: int, drawn: Drawn) -> range:
    return range(first + drawn.samples.start, first + drawn.samples.stop)


def counted(steps: Generator[Drawn], captions: int, request: Request) -> Generator[Drawn]:
    """The same steps for so many captions, reported to the request's `progress` callbacks."""
    progress, code_progress = request.progress, request.code_progress
    before, total = 0, captions * request.num_samples
    with closing(steps):
        for drawn in steps:
            count, slots = len(drawn.captions) * len(drawn.samples), drawn.tokens.shape[-1]
            if code_progress is not None:
                code_progress(before * slots + count * drawn.slots, total * slots)
            yield drawn
            before += count if drawn.done else 0
            if drawn.done and progress is not None:
                progress(before, total)


def choose_weighted(
    pipeline: SupportsChoosing,
    caption: str,
    steps: Generator[Drawn],
    request: Request,
    finish: Finish,
    noise: Tensor,
) -> Generator[Event]:
    """Draws weighted candidates, takes of them by their weights, and ranks those that are left.

    Candidates taken several times are decoded and ranked once. They fill what is left of the k
    places once every one has a place, so that with k the number of candidates the result follows
    the distribution that is drawn from.

    Args:
        steps: of `draw_edited`, each one `Weighted`.
        noise: (1,) float64 in [0, 1), of the last resampling.
        pipeline, caption, request, finish: of `choose`.
    """
    (first,), top, (rows, columns) = request.first(1), request.top, pipeline.grid
    tokens, weights = [], []
    with closing(counted(steps, 1, request)) as steps:
        for drawn in steps:
            assert isinstance(drawn, Weighted)
            stopped = request.cancel()
            if drawn.slots % columns == 0:
                done = drawn.slots // columns
                numbers = _numbers(first, drawn)
                so_far = drawn.tokens[0, :, : drawn.slots].unflatten(1, (done, columns))
                yield RowsFinished(0, numbers, done, so_far.cpu().clone())
            if drawn.done:
                tokens.append(drawn.tokens[0].unflatten(1, (rows, columns)).cpu().clone())
                weights.append(drawn.log_weights[0].cpu().clone())
            if stopped:
                break
    best = Best(top, pipeline.grid, pipeline.image_size)
    if not tokens:
        yield Finished(0, best.kept, 0, True)
        return
    drawn_tokens, log_weights = torch.cat(tokens), torch.cat(weights)
    taken = systematic(log_weights[None], noise)[0]
    own, repeats = _distinct(drawn_tokens, taken)
    for part in own.split(MAX_BATCH):
        images = finish(pipeline.decode(drawn_tokens[part]))
        scores, numbers = pipeline.score(caption, images), part + first
        best.add(images, scores, drawn_tokens[part], numbers)
        for each in zip(numbers.tolist(), images, scores.tolist(), drawn_tokens[part], strict=True):
            yield CandidateFinished(0, *each)
    kept = _filled(best.kept, repeats, min(top, len(taken)), first)
    yield Finished(0, kept, len(taken), len(taken) < request.num_samples)


def _distinct(tokens: Tensor, taken: Tensor) -> tuple[Tensor, dict[int, int]]:
    """The candidates taken, one of those with equal tokens, and how many times it was taken."""
    found: dict[bytes, int] = {}
    counts: dict[int, int] = {}
    for index in taken.tolist():
        own = found.setdefault(tokens[index].numpy().tobytes(), index)
        counts[own] = counts.get(own, 0) + 1
    return torch.tensor(list(counts), dtype=torch.int64, device="cpu"), counts


def _filled(kept: Generation, counts: dict[int, int], top: int, first: int) -> Generation:
    """`kept`, and behind them what was taken several times, up to `top` in all."""
    numbers = (kept.order - first).tolist()
    more = [place for place, number in enumerate(numbers) for _ in range(counts[number] - 1)]
    places = [*range(len(numbers)), *more][:top]
    return Generation(
        kept.images[places], kept.scores[places], kept.tokens[places], kept.order[places]
    )
