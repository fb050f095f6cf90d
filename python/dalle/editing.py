"""Editing a picture: some of its tokens are kept, the others are drawn for a caption.

`Pipeline.edit` and `Pipeline.edit_stream` are what this file does. Shape letters: k pictures kept,
h x w tokens, H = W side in pixels.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, Unpack

import torch
from torch import Tensor

from dalle.candidates import (
    DrawOptions,
    Event,
    Finished,
    Generation,
    Request,
    SupportsChoosing,
    choose,
    choose_weighted,
    counted,
)
from dalle.captions import clean
from dalle.configs import check_options
from dalle.devices import without_autocast
from dalle.errors import UsageError
from dalle.masks import kept_tokens
from dalle.prior.decode import Drawn
from dalle.prior.editing import GROUP, draw_edited, is_weighted
from dalle.prior.sampling import CHOOSING, caption_key, uniform_noise


class SupportsEditing(SupportsChoosing, Protocol):
    """What this file needs of a `Pipeline`, which calls it."""

    tokenizer: Any
    vae: Any
    prior: Any

    def request(self, owner: str, captions: int, options: Mapping[str, object]) -> Request: ...
    def edit_stream(
        self,
        image: Tensor,
        caption: str,
        *,
        keep: Tensor,
        paste: bool = False,
        **options: Unpack[DrawOptions],
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


def picture(owner: str, name: str, image: Any, side: int) -> Tensor:
    """A picture (3, side, side) in [0, 1] as float32 on the CPU.

    Args:
        owner, name: begin the error's line.

    Raises:
        UsageError: something else, or of another size or range.
    """
    if not isinstance(image, Tensor) or not image.is_floating_point():
        got = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise UsageError(f"{owner}: {name} must be a float tensor, got {got}")
    if tuple(image.shape) != (3, side, side):
        want = f"(3, {side}, {side})"
        raise UsageError(f"{owner}: {name} must be {want}, got {tuple(image.shape)}")
    colours: Tensor = image.detach().to("cpu", torch.float32)
    if not bool(((colours >= 0) & (colours <= 1)).all()):
        raise UsageError(f"{owner}: {name} must hold colours in [0, 1], got others")
    return colours


def checked(
    pipeline: SupportsEditing, image: Tensor, caption: str, keep: Any, paste: bool = False
) -> Edit:
    """The edit of a picture; see `Pipeline.edit`.

    Raises:
        UsageError: a picture, caption or mask that does not fit.
    """
    side = pipeline.image_size
    image = picture("edit", "image", image, side)
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
        one = image[None].to(device)
        with without_autocast(one):
            given = pipeline.vae.encode(one)[0].flatten().cpu()
    return Edit(caption, text, image, given, tokens.flatten(), pixels, paste)


def steps(pipeline: SupportsEditing, edit: Edit, request: Request) -> Generator[Drawn]:
    """`draw_edited` for an edit."""
    return draw_edited(pipeline.prior, edit.text, edit.given, edit.keep, request, group=GROUP)


def events(pipeline: SupportsEditing, edit: Edit, request: Request) -> Generator[Event]:
    """Draws candidates of an edit and keeps the best; see `Pipeline.edit_stream`."""
    drawing = steps(pipeline, edit, request)
    if not edit.weighted:
        return choose(pipeline, [edit.caption], drawing, request, edit.finish)
    noise = choosing_noise(edit, request)
    return choose_weighted(pipeline, edit.caption, drawing, request, edit.finish, noise)


def redrawn(
    pipeline: SupportsEditing, edit: Edit, candidate: int, request: Request
) -> tuple[Tensor, Tensor]:
    """One candidate of an edit again: (h, w) tokens, (3, H, W) picture.

    Alone where it has no weight, else with the group that it was weighted in.

    Args:
        candidate: its number, 0 to num_samples - 1.
        request: of the edit, all of whose candidates were numbered from 0.
    """
    start = candidate // GROUP * GROUP if edit.weighted else candidate
    count = min(GROUP, request.num_samples - start) if edit.weighted else 1
    request = replace(request, num_samples=count, first_sample=start)
    *_, drawn = counted(steps(pipeline, edit, request), 1, request)
    tokens = drawn.tokens[0, candidate - start].unflatten(0, pipeline.grid).cpu()
    return tokens, edit.finish(pipeline.decode(tokens[None]))[0]


def choosing_noise(edit: Edit, request: Request) -> Tensor:
    """(1,) float64 in [0, 1) for the last resampling."""
    key = caption_key(edit.text[0, :0] if request.sampling.cond_scale == 0 else edit.text[0])
    (first,) = request.first(1)
    return uniform_noise(request.seed, key, range(first, first + 1), 1, CHOOSING)[0]


class Editing:
    """The part of `Pipeline` that edits pictures."""

    def edit(
        self: SupportsEditing,
        image: Tensor,
        caption: str,
        *,
        keep: Tensor,
        paste: bool = False,
        **options: Unpack[DrawOptions],
    ) -> Generation:
        """Draws the tokens of a picture that are not kept: the end of `edit_stream`.

        Args:
            image, caption, keep, paste, options: of `edit_stream`.

        Raises:
            UsageError: an argument is out of range.
        """
        found = self.edit_stream(image, caption, keep=keep, paste=paste, **options)
        (end,) = (event for event in found if isinstance(event, Finished))
        return end.generation

    def edit_stream(
        self: SupportsEditing,
        image: Tensor,
        caption: str,
        *,
        keep: Tensor,
        paste: bool = False,
        **options: Unpack[DrawOptions],
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
            first_candidate: of `stream`; candidates are weighted in groups of 256 from it on.
            max_batch: of `stream`, where none is weighted.
            options: the other keywords are those of `stream`, without prime_image and prime_rows.
                Where fewer than `top` pictures differ, repetitions follow.

        Raises:
            UsageError: an argument is out of range, nothing is kept, or nothing is left to draw.
        """
        check_options("edit", options, (*DrawOptions.__annotations__, "keep", "paste"))
        try:
            request = self.request("edit", 1, options)
        except UsageError as error:
            error.rename(("generate",), "edit")
            raise
        return events(self, checked(self, image, caption, keep, paste), request)
