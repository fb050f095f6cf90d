"""`dalle edit`: parts of a picture drawn anew for a caption, by a trained pipeline."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch

from dalle import editing, files, masks, pictures
from dalle.candidates import Finished, RowsFinished
from dalle.captions import clean
from dalle.commands import again
from dalle.commands.drawn import (
    CANDIDATES,
    PAGE,
    RECORD,
    description,
    earlier_pictures,
    find_model,
    load_pipeline,
    output_folder,
    page,
    record,
    remove_earlier,
    save_pictures,
    set_precision,
    slug,
)
from dalle.commands.fits import require_best_fit, require_group_fits
from dalle.commands.picture_record import (
    Input,
    Options,
    PictureRecord,
    image_hash,
    model_hashes,
)
from dalle.configs import integer
from dalle.console import argument_text, progress_shown, say
from dalle.data.augment import center_crop, to_tensor
from dalle.data.images import decode, decode_mask, read_bytes
from dalle.devices import pick_device
from dalle.errors import DataError, Interrupted, UsageError
from dalle.files import to_json
from dalle.options import REPEATED
from dalle.pipeline import MAX_CANDIDATES, Generation
from dalle.prior.editing import GROUP
from dalle.prior.sampling import MAX_SEED, SamplingChanges
from dalle.prior.step import check_weights
from dalle.train.signals import signals


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """Keeps a part of a picture and draws the rest for a caption.

    What is redrawn is what `mask`, `box`, `keep_rows` and `redraw_rows` name together. Where none
    is given, the top 15 of 32 rows of tokens are kept, as in the paper's image-to-image. A token
    is kept only if all its pixels are.

    Args:
        image: the picture; its largest centred square is taken at the pipeline's size.
        caption: what the whole picture shows afterwards, in quotes.
        model: folder of a pipeline. Left out: run/pipeline, which `dalle train` leaves, and where
            there is none, out/demo/pipeline of `dalle demo`.
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
        out: folder for index.html, the grid PNG, single PNGs and samples.json. Where it holds an
            earlier run, the next free one of OUT-2, OUT-3, ... is taken.
        overwrite: put the results in `out` in place of those of the earlier run.
        num_candidates: samples to choose from; left out, what the pipeline says, else 64.
        top: how many of them to keep at most.
        seed: the same seed gives the same pictures.
        sampling: how a token is drawn; what is left out is as the pipeline says.
        precision: of the prior, as of `dalle sample`.
        weights: fp32, or bf16 on a CPU with bf16 dot products: faster, tokens of nearly equal
            chance may change.
        device: "cpu", "cuda" or "auto".
        scale: screen pixels per pixel in the grid.
        again: a PNG that `dalle edit` has written: the same candidate is drawn once more, bit for
            bit, as the picture itself says. Needs the same model and the same `image`.
    """

    image: Path
    caption: str | None = None
    model: Path | None = None
    mask: Path | None = None
    box: Annotated[tuple[str, ...], REPEATED] = ()
    box_units: Literal["pixels", "tokens", "input"] = "pixels"
    keep_rows: int | None = None
    redraw_rows: int | None = None
    invert: bool = False
    paste: bool = False
    out: Path = Path("run/edits")
    overwrite: bool = False
    num_candidates: int | None = None
    top: int = 8
    seed: int = 0
    sampling: SamplingChanges = field(default_factory=SamplingChanges)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    weights: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"
    scale: int = 2
    again: Path | None = None


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
    config: EditConfig, picture: tuple[int, int], grid: tuple[int, int], side: int
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
    if config.num_candidates is not None:
        integer("edit", "num_candidates", config.num_candidates, 1, MAX_CANDIDATES)
    integer("edit", "top", config.top, 1)
    integer("edit", "seed", config.seed, 0, MAX_SEED)
    return caption


def edit(config: EditConfig) -> None:
    """Draws, writes, and says where."""
    if config.again is not None:
        return edit_again(config)
    caption = check_config(config)
    model = find_model("edit", "model", config.model)
    inputs = [config.image, *([config.mask] if config.mask else [])]
    source = decode(read_bytes(config.image), config.image)
    out, name = output_folder("edit", config.out, config.overwrite), slug(caption, 0)
    earlier = earlier_pictures(out)
    targets = [out / RECORD, out / PAGE, out / f"{name}.png", out / name / "0.png"]
    files.check_targets("edit", *targets)
    again.check_inputs("edit", [*earlier, *targets], inputs)
    device = pick_device(config.device)
    pipeline = load_pipeline(model, device)
    num_candidates = config.num_candidates or pipeline.num_candidates or CANDIDATES
    top = min(config.top, num_candidates)
    sampling = config.sampling.applied(pipeline.sampling)
    pictures.check_sheet("edit", top, pipeline.image_size, config.scale)
    image = square(source, pipeline.image_size)
    keep = kept_pixels(config, source.shape[:2], pipeline.grid, pipeline.image_size)
    work = editing.checked(pipeline, image, caption, keep, config.paste)
    if work.weighted:  # a group is drawn at a time
        require_group_fits("edit", pipeline, num_candidates, GROUP, sampling)
    else:
        require_best_fit("edit", pipeline, top, sampling)
    check_weights(config.weights, device)
    say(f"edit: {int((~work.keep).sum())} of {work.keep.numel()} tokens are redrawn")
    drawn_as = pipeline.tokenizer.shape(caption)
    if drawn_as != clean(caption):
        say(f"edit: the caption is drawn as {drawn_as!r}, spelt as in the training")
    run: dict[str, Any] = {
        "command": "edit",
        **description(pipeline, model),
        "sampling": asdict(sampling),
        "num_candidates": num_candidates,
        "top": top,
        "seed": config.seed,
        "image": str(config.image),
        "keep": [
            "".join("#" if kept else "." for kept in row)
            for row in work.keep.view(pipeline.grid).tolist()
        ],
        "paste": config.paste,
        "records": [],
    }
    models = model_hashes(run["model"]["fingerprints"])
    set_precision(pipeline, config.precision, device)  # once the weights' fingerprints are taken
    run |= {"precision": pipeline.prior.config.precision, "weights": config.weights}
    end: Finished | None = None
    begun: RowsFinished | None = None
    with signals() as received, progress_shown("edit") as show:
        for event in editing.events(
            pipeline,
            work,
            num_candidates,
            top,
            sampling,
            seed=config.seed,
            weights=config.weights,
            cancel=lambda: bool(received),
            code_progress=show,
        ):
            end = event if isinstance(event, Finished) else end
            begun = event if isinstance(event, RowsFinished) else begun
    assert end is not None
    generation = different(end.generation)
    if not end.drawn:  # stopped before a candidate was finished: the rows there are
        if begun is None:
            raise Interrupted(f"edit: stopped by {received[0]} before the first row was finished")
        generation = pipeline.unfinished(begun, top)
    if work.weighted and end.drawn:
        say(
            f"edit: candidates {end.drawn}, weighted by the kept tokens behind redrawn ones; "
            f"different ones that are kept: {len(generation.images)}"
        )
    elif top < config.top:
        say(f"edit: of {end.drawn} candidates all are kept, not {config.top}")
    remove_earlier("edit", out, earlier)
    picture = PictureRecord(
        command="edit",
        caption=caption,
        drawn_as=drawn_as,
        seed=config.seed,
        options=Options(
            sampling=sampling,
            num_candidates=num_candidates,
            top=top,
            precision=pipeline.prior.config.precision,
            device=device.type,
            weights=config.weights,
            image=Input(
                pixels=image_hash(image), keep=masks.packed(work.pixels), paste=config.paste
            ),
        ),
        model=models,
    )
    said = picture if end.drawn else None  # a picture that is not finished cannot be drawn again
    singles = save_pictures(out, name, generation, config.scale, said)
    entry = record(caption, drawn_as, config.seed, generation, singles)
    if end.cancelled:
        entry["finished"] = end.drawn
        entry["rows"] = pipeline.grid[0] if end.drawn or begun is None else begun.rows
    run["records"].append(entry)
    pictures.save_bytes(out / RECORD, to_json(run))
    pictures.save_bytes(out / PAGE, page(run))
    count = f"{len(singles)} picture{'s' * (len(singles) > 1)}"
    print(f"edit: {count}, grid and samples.json in {out}; look at {out / PAGE}")
    if end.cancelled:
        raise Interrupted(
            f"edit: stopped by {received[0]} after {end.drawn} of {num_candidates} candidates; "
            f"what was drawn is in {out}"
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
    """Draws one candidate of an earlier edit again; see `EditConfig.again`."""
    job = again.prepare("edit", config, "image", config.image)
    said, options, given = job.record, job.record.options, job.record.options.image
    assert given is not None and job.image is not None
    if given.keep is None or said.candidate >= options.num_candidates:
        raise DataError(f"edit: {config.again} must hold a mask and one of its candidates")
    keep = masks.unpacked(given.keep, job.pipeline.image_size)
    work = editing.checked(job.pipeline, job.image, said.caption, keep, given.paste)

    def draw() -> again.Drawn:
        with progress_shown("edit --again") as show:
            tokens, image = editing.redrawn(
                job.pipeline,
                work,
                said.candidate,
                options.num_candidates,
                options.sampling,
                seed=said.seed,
                weights=options.weights,
                progress=show,
            )
        return image, tokens, float(job.pipeline.score(said.caption, image[None])[0])

    job.finish(draw)
