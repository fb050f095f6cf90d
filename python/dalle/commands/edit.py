"""`dalle edit`: parts of a picture drawn anew for a caption, by a trained pipeline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

from dalle import editing, masks, pictures
from dalle.captions import clean
from dalle.commands.again import Again, Drawn
from dalle.commands.drawing import DrawingOptions, Run, last_events
from dalle.commands.drawn import PAGE
from dalle.commands.fits import require_best_fit, require_group_fits
from dalle.commands.picture_record import Input, image_hash
from dalle.console import argument_text, progress_shown, say
from dalle.data.augment import center_crop, to_tensor
from dalle.data.images import decode, decode_mask, read_bytes
from dalle.errors import DataError, Interrupted, UsageError
from dalle.options import REPEATED
from dalle.pipeline import Generation
from dalle.prior.editing import GROUP
from dalle.train.signals import signals


@dataclass(frozen=True, kw_only=True)
class Region:
    """A picture, and what of it is redrawn: what the options name together.

    Args:
        image: the picture; its largest centred square is taken at the pipeline's size.
        caption: what the whole picture shows afterwards, in quotes.
        mask: a picture of any size, white where is redrawn, or transparent, if it has transparency.
            It has the picture's proportions, or is square like the part that is taken.
        box: x0,y0,x1,y1 of a rectangle that is redrawn, x1 and y1 excluded; x0,y0 alone reaches
            the bottom right corner. May be given several times.
        box_units: of `box`: pixels of the picture at the pipeline's size, tokens, or pixels of the
            input as it is given.
        keep_rows: how many rows of tokens are kept from the top.
        redraw_rows: how many rows of tokens are redrawn at the bottom: variations.
        invert: redraw what `mask` and `box` leave, and keep what they name.
        paste: put the kept pixels of the picture into the results as they are, unblended. Without,
            they are what the dVAE makes of the kept tokens.
    """

    image: Path
    caption: str | None = None
    mask: Path | None = None
    box: Annotated[tuple[str, ...], REPEATED] = ()
    box_units: Literal["pixels", "tokens", "input"] = "pixels"
    keep_rows: int | None = None
    redraw_rows: int | None = None
    invert: bool = False
    paste: bool = False


@dataclass(frozen=True, kw_only=True)
class EditConfig(DrawingOptions, Region):  # help shows the fields of Region first
    """Keeps a part of a picture and draws the rest for a caption.

    What is redrawn is what `mask`, `box`, `keep_rows` and `redraw_rows` name together. Where none
    is given, the top 15 of 32 rows of tokens are kept, as in the paper's image-to-image. A token
    is kept only if all its pixels are.

    Tokens are drawn row by row, and the model cannot see a kept token that comes later. So what is
    drawn before it is judged by how likely the model then finds the kept token: candidates to which
    it fits are copied, others dropped. More candidates fit better (docs/editing.md).
    """

    out: Path = Path("run/edits")


def read_mask(path: Path, picture: tuple[int, int], side: int) -> torch.Tensor:
    """(side, side) bool, True where a mask picture keeps.

    Args:
        path: of the mask.
        picture: height and width of the picture that is edited.
        side: of its centred square at the pipeline's size.

    Raises:
        DataError: it cannot be read, or has neither the picture's proportions nor is square.
    """
    marked = decode_mask(read_bytes(path), path)
    height, width = marked.shape
    # A mask that was scaled with the picture is at most half a pixel off.
    alike = 2 * abs(width * picture[0] - height * picture[1]) <= sum(picture)
    if height != width and not alike:
        raise DataError(
            f"edit: mask must be square or have the proportions of the picture "
            f"({picture[1]} x {picture[0]}), got {width} x {height}"
        )
    return squared(~marked, side)


def squared(mask: np.ndarray, side: int) -> torch.Tensor:
    """The largest centred square of a mask (H, W), as of the picture: (side, side) bool."""
    height, width = mask.shape
    shorter = min(height, width)
    top, left = (height - shorter) // 2, (width - shorter) // 2
    return masks.resized(mask[top : top + shorter, left : left + shorter], side)


def kept_pixels(
    config: Region, picture: tuple[int, int], grid: tuple[int, int], side: int
) -> torch.Tensor:
    """(side, side) bool, True where the options keep the picture.

    Raises:
        UsageError: a box or a number of rows out of range.
        DataError: the mask cannot be read or has other proportions.
    """
    factor, parts = side // grid[0], []
    if config.mask is not None:
        parts.append(read_mask(config.mask, picture, side))
    if config.box:
        boxes = [masks.parse_box(text) for text in config.box]
        if config.box_units == "input":
            mask = masks.outside_boxes(boxes, picture[1], picture[0])
            parts.append(squared(mask.numpy(), side))
        elif config.box_units == "pixels":
            parts.append(masks.outside_boxes(boxes, side, side))
        else:
            parts.append(masks.pixels_of(masks.outside_boxes(boxes, grid[1], grid[0]), factor))
    keep = torch.stack(parts or [torch.ones(side, side, dtype=torch.bool, device="cpu")]).all(0)
    if config.invert:
        keep = ~keep
    rows = config.keep_rows
    if config.redraw_rows is not None:
        if not 0 < config.redraw_rows < grid[0]:
            raise UsageError(
                f"edit: redraw_rows must be 1 to {grid[0] - 1}, got {config.redraw_rows}"
            )
        rows = grid[0] - config.redraw_rows
    if rows is None and not parts:
        rows = masks.default_rows(grid[0])
        say(f"edit: the top {rows} of {grid[0]} rows of tokens are kept")
    if rows is not None:
        keep &= masks.pixels_of(masks.top_rows(grid, rows), factor)
    return keep


def check_config(config: EditConfig) -> str:
    """The caption, once what can be checked without the model is.

    Raises:
        UsageError: an option is missing, out of range, or does not go with another.
    """
    if config.caption is None:
        raise UsageError("edit: caption must be given, got nothing")
    caption = clean(argument_text(config.caption), keep_bytes=True)
    if not caption:
        raise UsageError(f"edit: caption must hold a word, got {config.caption!r}")
    for text in config.box:
        masks.parse_box(text)
    if config.keep_rows is not None and config.redraw_rows is not None:
        raise UsageError(
            f"edit: redraw_rows must be left out beside keep_rows, got {config.redraw_rows}"
        )
    if config.invert and config.mask is None and not config.box:
        raise UsageError("edit: invert must be given with a mask or a box, got neither")
    config.check("edit")
    return caption


def edit(config: EditConfig) -> None:
    """Draws, writes, and says where."""
    if config.again is not None:
        return edit_again(config)
    caption = check_config(config)
    inputs = [config.image, *([config.mask] if config.mask else [])]
    source = decode(read_bytes(config.image), config.image)
    run = Run("edit", config, [caption], inputs)
    pipeline, options = run.pipeline, run.options()
    pictures.check_sheet("edit", options["top"], pipeline.image_size, config.scale)
    image = square(source, pipeline.image_size)
    keep = kept_pixels(config, source.shape[:2], pipeline.grid, pipeline.image_size)
    work = editing.checked(pipeline, image, caption, keep, config.paste)
    num_candidates, top = options["num_candidates"], options["top"]
    if work.weighted:  # a group is drawn at a time
        require_group_fits("edit", pipeline, num_candidates, GROUP, options["sampling"])
    else:
        require_best_fit("edit", pipeline, top, options["sampling"])
    say(f"edit: {int((~work.keep).sum())} of {work.keep.numel()} tokens are redrawn")
    drawn_as = pipeline.tokenizer.shape(caption)
    if drawn_as != clean(caption):
        say(f"edit: the caption is drawn as {drawn_as!r}, spelt as in the training")
    shown = work.keep.view(pipeline.grid).tolist()
    run.begin(
        options,
        config.precision,
        image=str(config.image),
        keep=["".join("#" if kept else "." for kept in row) for row in shown],
        paste=config.paste,
    )
    with signals() as received, progress_shown("edit") as show:
        callbacks = {"cancel": lambda: bool(received), "code_progress": show}
        request = pipeline.request("edit", 1, {**options, **callbacks})
        end, begun = last_events(editing.events(pipeline, work, request))
    end = replace(end, generation=different(end.generation))
    given = Input(pixels=image_hash(image), keep=masks.packed(work.pixels), paste=config.paste)
    picture = run.picture(caption, drawn_as, options, given)
    if work.weighted and end.drawn:
        say(
            f"edit: candidates {end.drawn}, weighted by the kept tokens behind redrawn ones; "
            f"different ones that are kept: {len(end.generation.images)}"
        )
    elif top < config.top:
        say(f"edit: of {end.drawn} candidates all are kept, not {config.top}")
    singles = run.finish(caption, drawn_as, end, begun, picture)
    if singles is None:
        raise Interrupted(f"edit: stopped by {received[0]} before the first row was finished")
    count = f"{len(singles)} picture{'s' * (len(singles) > 1)}"
    print(f"edit: {count}, grid and samples.json in {run.out}; look at {run.out / PAGE}")
    if end.cancelled:
        raise Interrupted(
            f"edit: stopped by {received[0]} after {end.drawn} of {num_candidates} candidates; "
            f"what was drawn is in {run.out}"
        )


def square(picture: np.ndarray, side: int) -> torch.Tensor:
    """A picture's largest centred square, (3, side, side) in [0, 1]."""
    return to_tensor([center_crop(picture, side)])[0]


def different(generation: Generation) -> Generation:
    """The pictures without repetitions, which come last."""
    count = len(set(generation.order.tolist()))
    return Generation(
        generation.images[:count],
        generation.scores[:count],
        generation.tokens[:count],
        generation.order[:count],
    )


def edit_again(config: EditConfig) -> None:
    """Draws one candidate of an earlier edit again; see `DrawingOptions.again`."""
    job = Again("edit", config, "image", config.image)
    said, options, given = job.record, job.record.options, job.record.options.image
    assert given is not None and job.image is not None
    pipeline = job.pipeline
    if given.keep is None or said.candidate >= options.num_candidates:
        raise DataError(f"edit: {config.again} must hold a mask and one of its candidates")
    keep = masks.unpacked(given.keep, pipeline.image_size)
    work = editing.checked(pipeline, job.image, said.caption, keep, given.paste)

    def draw() -> Drawn:
        with progress_shown("edit --again") as show:
            names = ("num_candidates", "sampling", "weights")
            how = {name: getattr(options, name) for name in names}
            request = pipeline.request("edit", 1, {**how, "seed": said.seed, "code_progress": show})
            tokens, image = editing.redrawn(pipeline, work, said.candidate, request)
        return image, tokens, float(pipeline.score(said.caption, image[None])[0])

    job.finish(draw)
