"""Editing a picture: some of its tokens are kept, the others are drawn for a caption.

`Pipeline.edit` and `Pipeline.edit_stream` are what this file does. Shape letters: k pictures kept,
h x w tokens, H = W side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol, Required, TypedDict, Unpack

import torch
from torch import Tensor

from dalle.candidates import Event, Finished, Generation, choose, choose_weighted, counted
from dalle.captions import clean
from dalle.configs import integer
from dalle.errors import UsageError
from dalle.masks import kept_tokens
from dalle.prior.decode import MAX_BATCH, Drawn, Progress
from dalle.prior.editing import GROUP, draw_edited, is_weighted
from dalle.prior.sampling import (
    CHOOSING,
    MAX_SEED,
    SamplingChanges,
    SamplingConfig,
    caption_key,
    uniform_noise,
)
from dalle.prior.step import fitting


class EditOptions(TypedDict, total=False):
    """Keyword arguments of `Pipeline.edit`."""

    keep: Required[Tensor]
    paste: bool
    num_candidates: int | None
    top: int | None
    seed: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    cond_scale: float | None
    cache_bits: int | None
    sampling: SamplingConfig | None
    first_candidate: int
    weights: str
    cancel: Callable[[], bool]
    progress: Progress | None
    code_progress: Progress | None


class SupportsEditing(Protocol):
    """What this file needs of a `Pipeline`, which calls it."""

    tokenizer: Any
    vae: Any
    prior: Any
    grid: tuple[int, int]
    image_size: int
    sampling: SamplingConfig

    def counts(self, num_candidates: int | None, top: int | None) -> tuple[int, int]: ...
    def decode(self, tokens: Tensor) -> Tensor: ...
    def score(self, caption: str, images: Tensor) -> Tensor: ...
    def edit_stream(
        self, image: Tensor, caption: str, **options: Unpack[EditOptions]
    ) -> Generator[Event]: ...


@dataclass(frozen=True)
class Edit:
    """A checked edit.

    Attributes:
        caption: as given.
        text: (1, text_len - 1) int64 tokens of the caption.
        image: (3, H, W) float32 in [0, 1], on the CPU.
        given: (N,) int64, its tokens.
        keep: (N,) bool, which of them are kept.
        pixels: (H, W) bool, which pixels are kept.
        paste: whether these are the picture's own in the result.
    """

    caption: str
    text: Tensor
    image: Tensor
    given: Tensor
    keep: Tensor
    pixels: Tensor
    paste: bool

    @property
    def weighted(self) -> bool:
        """Whether a kept token comes after a redrawn one."""
        return is_weighted(self.keep)

    def finish(self, images: Tensor) -> Tensor:
        """Decoded candidates (n, 3, H, W) with the kept pixels put in, where these are pasted."""
        return torch.where(self.pixels, self.image, images) if self.paste else images


def checked(
    pipeline: SupportsEditing, image: Tensor, caption: str, keep: Any, paste: bool = False
) -> Edit:
    """The edit of a picture; see `Pipeline.edit`.

    Raises:
        UsageError: a picture, caption or mask that does not fit.
    """
    side = pipeline.image_size
    if not isinstance(image, Tensor) or not image.is_floating_point():
        got = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise UsageError(f"edit: image must be a float tensor, got {got}")
    if tuple(image.shape) != (3, side, side):
        raise UsageError(f"edit: image must be (3, {side}, {side}), got {tuple(image.shape)}")
    image = image.detach().to("cpu", torch.float32)
    if not bool(((image >= 0) & (image <= 1)).all()):
        raise UsageError("edit: image must hold colours in [0, 1], got others")
    if not isinstance(caption, str):
        raise UsageError(f"edit: caption must be a string, got {type(caption).__name__}")
    if not clean(caption):
        raise UsageError(f"edit: caption must hold a word, got {caption!r:.100}")
    tokens, pixels = kept_tokens(keep, pipeline.grid, side)
    length, tokenizer = pipeline.prior.config.text_len - 1, pipeline.tokenizer
    cut = tokenizer.truncated
    text = tokenizer.encode([tokenizer.shape(caption)], length)
    if tokenizer.truncated > cut:
        tokenizer.truncated = cut
        raise UsageError(
            f"edit: caption must have at most {length} tokens, got more in {caption!r:.100}"
        )
    device = next(pipeline.vae.parameters()).device
    with torch.no_grad():
        given = pipeline.vae.encode(image[None].to(device))[0].flatten().cpu()
    return Edit(caption, text, image, given, tokens.flatten(), pixels, paste)


def steps(
    pipeline: SupportsEditing,
    edit: Edit,
    num_candidates: int,
    sampling: SamplingConfig,
    *,
    seed: int,
    first_candidate: int,
    weights: str = "fp32",
) -> Generator[Drawn]:
    """`draw_edited` for an edit, in parts that fit the memory where they are not weighted."""
    guided = sampling.cond_scale not in (0, 1)
    fits = fitting(pipeline.prior, MAX_BATCH, guided, sampling.cache_bits)
    return draw_edited(
        pipeline.prior,
        edit.text,
        edit.given,
        edit.keep,
        num_samples=num_candidates,
        sampling=sampling,
        seed=seed,
        first_sample=first_candidate,
        max_batch=max(1, fits),
        group=GROUP,
        weights=weights,
    )


def events(
    pipeline: SupportsEditing,
    edit: Edit,
    num_candidates: int,
    top: int,
    sampling: SamplingConfig,
    *,
    seed: int = 0,
    first_candidate: int = 0,
    weights: str = "fp32",
    cancel: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
    code_progress: Progress | None = None,
) -> Generator[Event]:
    """Draws candidates of an edit and keeps the best; see `Pipeline.edit_stream`."""
    drawing = steps(
        pipeline,
        edit,
        num_candidates,
        sampling,
        seed=seed,
        first_candidate=first_candidate,
        weights=weights,
    )
    drawing = counted(drawing, num_candidates, progress, code_progress)

    def decode(tokens: Tensor) -> Tensor:
        return edit.finish(pipeline.decode(tokens))

    def score(_: int, images: Tensor) -> Tensor:
        return pipeline.score(edit.caption, images)

    if edit.weighted:
        return choose_weighted(
            drawing,
            decode,
            score,
            noise=choosing_noise(edit, sampling, seed, first_candidate),
            first=first_candidate,
            top=top,
            grid=pipeline.grid,
            image_size=pipeline.image_size,
            cancel=cancel,
        )
    return choose(
        drawing,
        decode,
        score,
        first=[first_candidate],
        num_candidates=num_candidates,
        top=top,
        grid=pipeline.grid,
        image_size=pipeline.image_size,
        cancel=cancel,
    )


def redrawn(
    pipeline: SupportsEditing,
    edit: Edit,
    candidate: int,
    num_candidates: int,
    sampling: SamplingConfig,
    *,
    seed: int,
    weights: str = "fp32",
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """One candidate of an edit again: (h, w) tokens, (3, H, W) picture.

    Alone where it has no weight, else with the group that it was weighted in.

    Args:
        candidate: its number, 0 to num_candidates - 1.
        num_candidates: of the edit.
        sampling, seed, weights: of the edit.
        progress: called with (tokens done, tokens in all).
    """
    start = candidate // GROUP * GROUP if edit.weighted else candidate
    count = min(GROUP, num_candidates - start) if edit.weighted else 1
    drawing = steps(
        pipeline, edit, count, sampling, seed=seed, first_candidate=start, weights=weights
    )
    *_, drawn = counted(drawing, count, None, progress)
    tokens = drawn.tokens[0, candidate - start].unflatten(0, pipeline.grid).cpu()
    return tokens, edit.finish(pipeline.decode(tokens[None]))[0]


def choosing_noise(edit: Edit, sampling: SamplingConfig, seed: int, first_candidate: int) -> Tensor:
    """(1,) float64 in [0, 1) for the last resampling."""
    key = caption_key(edit.text[0, :0] if sampling.cond_scale == 0 else edit.text[0])
    own = range(first_candidate, first_candidate + 1)
    return uniform_noise(seed, key, own, 1, CHOOSING)[0]


class Editing:
    """The part of `Pipeline` that edits pictures."""

    def edit(
        self: SupportsEditing, image: Tensor, caption: str, **options: Unpack[EditOptions]
    ) -> Generation:
        """Draws the tokens of a picture that are not kept: the end of `edit_stream`.

        Args:
            image, caption, options: of `edit_stream`; `keep` is required.

        Raises:
            UsageError: an argument is out of range.
        """
        found = self.edit_stream(image, caption, **options)
        (end,) = (event for event in found if isinstance(event, Finished))
        return end.generation

    def edit_stream(
        self: SupportsEditing,
        image: Tensor,
        caption: str,
        *,
        keep: Tensor,
        paste: bool = False,
        num_candidates: int | None = None,
        top: int | None = None,
        seed: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        cond_scale: float | None = None,
        cache_bits: int | None = None,
        sampling: SamplingConfig | None = None,
        first_candidate: int = 0,
        weights: str = "fp32",
        cancel: Callable[[], bool] = lambda: False,
        progress: Progress | None = None,
        code_progress: Progress | None = None,
    ) -> Generator[Event]:
        """Edits a picture: keeps some of its tokens and draws the others for a caption.

        Where no kept token comes after a redrawn one, in raster order, this is drawing with a
        prime. Else candidates are weighted by the likelihood that the model gives those kept
        tokens, taken by their weights, and then ranked (docs/editing.md). Events are those of
        `stream`; a candidate that is not taken has no `CandidateFinished`.

        Args:
            image: (3, H, W) in [0, 1], of the pipeline's size.
            caption: of what the whole picture shows afterwards.
            keep: (h, w) bool, True where a token is kept; or (H, W) of pixels: a token is kept only
                if all its pixels are. `dalle.masks` makes them from boxes and rows.
            paste: put the kept pixels of `image` into the results, unchanged and unblended.
            num_candidates, top, seed, sampling, temperature, top_k, top_p, cond_scale, cache_bits,
                weights, cancel, progress, code_progress: of `stream`. Where fewer than `top`
                pictures differ, repetitions follow.
            first_candidate: of `stream`; candidates are weighted in groups of 256 from it on.

        Raises:
            UsageError: an argument is out of range, nothing is kept, or nothing is left to draw.
        """
        num_candidates, top = self.counts(num_candidates, top)
        most = MAX_SEED + 1 - num_candidates  # numbers fit 64 bits with a sign
        first_candidate = integer("edit", "first_candidate", first_candidate, 0, most)
        changes = SamplingChanges(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            cond_scale=cond_scale,
            cache_bits=cache_bits,
        )
        return events(
            self,
            checked(self, image, caption, keep, paste),
            num_candidates,
            top,
            changes.applied(self.sampling if sampling is None else sampling),
            seed=seed,
            first_candidate=first_candidate,
            weights=weights,
            cancel=cancel,
            progress=progress,
            code_progress=code_progress,
        )
