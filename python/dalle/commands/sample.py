"""`dalle sample`: pictures for captions, from a trained pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dalle import files, pictures
from dalle.candidates import Event, Finished, RowsFinished
from dalle.captions import caption_lines, clean
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
    read_image,
    record,
    remove_earlier,
    save_pictures,
    set_precision,
    slug,
)
from dalle.commands.fits import require_best_fit
from dalle.commands.picture_record import (
    Input,
    Options,
    PictureRecord,
    image_hash,
    model_hashes,
)
from dalle.configs import integer
from dalle.console import argument_text, progress_shown, say
from dalle.devices import pick_device
from dalle.errors import DataError, Interrupted, UsageError
from dalle.files import to_json
from dalle.pipeline import MAX_CANDIDATES
from dalle.prior.sampling import MAX_SEED, SamplingChanges
from dalle.prior.step import check_weights
from dalle.train.signals import signals


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Draws pictures for captions.

    Args:
        captions: what to draw, each in quotes.
        model: folder of a pipeline. Left out: run/pipeline, which `dalle train` leaves, and where
            there is none, out/demo/pipeline of `dalle demo`.
        file: captions, one a line, in addition.
        out: folder for index.html, grid PNGs, single PNGs and samples.json. Where it holds samples
            of an earlier run, the next free one of OUT-2, OUT-3, ... is taken.
        overwrite: put the samples in `out` in place of those of the earlier run.
        num_candidates: samples a caption to choose from; left out, what the pipeline says, else 64
            (the paper takes 512).
        top: how many of them to keep at most.
        seed: a caption gets the same pictures from the same seed, whatever else is drawn.
        sampling: how a code is drawn; what is left out is as the pipeline says.
        prime_image: a picture whose top rows are given.
        prime_rows: how many rows of codes of it; 0 is half of them.
        precision: in which the prior draws: fp32, bf16, or auto, which is as it was trained, but
            bf16 on a GPU for one of fp32; codes of nearly equal chance may change.
        weights: bf16 rounds the prior's matrices, and what they multiply, to bf16: faster on a CPU
            with bf16 dot products, the only place where it is offered. As with `precision`, codes
            of nearly equal chance may change.
        max_batch: candidates drawn at a time; left out, what fits the memory, at most 64. It
            changes no picture.
        device: "cpu", "cuda" or "auto".
        scale: screen pixels per pixel in the grids.
        again: a PNG that `dalle sample` has written: the same candidate is drawn once more, bit for
            bit, as the picture itself says. Needs the same model, and the same `prime_image`.
    """

    captions: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    model: Path | None = None
    file: Path | None = None
    out: Path = Path("run/samples")
    overwrite: bool = False
    num_candidates: int | None = None
    top: int = 8
    seed: int = 0
    sampling: SamplingChanges = field(default_factory=SamplingChanges)
    prime_image: Path | None = None
    prime_rows: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    weights: Literal["fp32", "bf16"] = "fp32"
    max_batch: int | None = None
    device: str = "auto"
    scale: int = 2
    again: Path | None = None


def read_captions(config: SampleConfig) -> list[str]:
    """Captions of the arguments, then of the file, clean as those of training; none is empty.

    Raises:
        UsageError: none at all.
        DataError: the file cannot be read.
    """
    cleaned = (clean(argument_text(word), keep_bytes=True) for word in config.captions)
    captions = [caption for caption in cleaned if caption]
    if config.file is not None:
        try:
            captions += caption_lines(files.read_bytes(config.file).decode())
        except OSError as error:
            raise DataError(
                f"sample: file must be readable text, got {config.file}: {error.strerror}"
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"sample: file must be readable text, got {config.file}: byte {error.start} is not "
                "UTF-8"
            ) from error
    if not captions:
        raise UsageError("sample: captions must be at least one, got none")
    return captions


def sample(config: SampleConfig) -> None:
    """Draws, writes, and says where."""
    if config.again is not None:
        return sample_again(config)
    captions = read_captions(config)
    num_candidates = config.num_candidates
    if num_candidates is not None:
        num_candidates = integer("sample", "num_candidates", num_candidates, 1, MAX_CANDIDATES)
    integer("sample", "top", config.top, 1)
    integer("sample", "seed", config.seed, 0, MAX_SEED)
    rows = integer("sample", "prime_rows", config.prime_rows, 0)
    if rows and config.prime_image is None:
        raise UsageError(f"sample: prime_rows must be 0 without a prime_image, got {rows}")
    if config.max_batch is not None:
        integer("sample", "max_batch", config.max_batch, 1)
    model = find_model("sample", "model", config.model)
    out, names = (
        output_folder("sample", config.out, config.overwrite),
        [slug(text, i) for i, text in enumerate(captions)],
    )
    earlier = earlier_pictures(out)
    files.check_targets("sample", out / RECORD, out / PAGE)
    for name in names:
        files.check_targets("sample", out / f"{name}.png", out / name / "0.png")
    if config.prime_image is not None:
        for path in [*earlier, *(out / f"{name}.png" for name in names)]:
            files.check_not_input("sample", path, [config.prime_image])
    device = pick_device(config.device)
    pipeline = load_pipeline(model, device)
    if num_candidates is None:
        num_candidates = pipeline.num_candidates or CANDIDATES
    top = min(config.top, num_candidates)
    if top < config.top:
        say(f"sample: of {num_candidates} candidates all are kept, not {config.top}")
    sampling = config.sampling.applied(pipeline.sampling)
    require_best_fit("sample", pipeline, top, sampling)
    check_weights(config.weights, device)
    pictures.check_sheet("sample", top, pipeline.image_size, config.scale)
    prime = None
    if rows >= pipeline.grid[0]:
        raise UsageError(f"sample: prime_rows must be 1 to {pipeline.grid[0] - 1}, got {rows}")
    if config.prime_image is not None:
        prime = read_image(config.prime_image, pipeline.image_size)
        rows = rows or pipeline.grid[0] // 2
        say(
            f"sample: {config.prime_image} gives the top {rows} of {pipeline.grid[0]} rows of codes"
        )
    run: dict[str, Any] = {
        **description(pipeline, model),
        "sampling": asdict(sampling),
        "num_candidates": num_candidates,
        "top": top,
        "seed": config.seed,
        "prime": None if prime is None else {"image": str(config.prime_image), "rows": rows},
        "records": [],
    }
    models = model_hashes(run["model"]["fingerprints"])
    set_precision(pipeline, config.precision, device)  # once the weights' fingerprints are taken
    run["precision"] = pipeline.prior.config.precision
    run["weights"] = config.weights
    options = Options(
        sampling=sampling,
        num_candidates=num_candidates,
        top=top,
        precision=pipeline.prior.config.precision,
        device=device.type,
        image=None if prime is None else Input(pixels=image_hash(prime), rows=rows),
        weights=config.weights,
    )
    with signals() as received:
        for number, caption in enumerate(captions):
            drawn_as = pipeline.tokenizer.shape(caption)
            if drawn_as != clean(caption):
                said = f"caption {number + 1} is drawn as {drawn_as!r}, spelt as in the training"
                say(f"sample: {said}")
            cut = pipeline.tokenizer.truncated
            with progress_shown(f"sample {number + 1}/{len(captions)}") as show:
                events = pipeline.stream(
                    caption,
                    num_candidates=num_candidates,
                    top=top,
                    seed=config.seed,
                    sampling=sampling,
                    prime_image=prime,
                    prime_rows=rows,
                    max_batch=config.max_batch,
                    weights=config.weights,
                    cancel=lambda: bool(received),
                    code_progress=show,
                )
                end, begun = last_events(events)
            if pipeline.tokenizer.truncated > cut:
                slots = pipeline.prior.config.text_len - 1
                said = f"more than {slots} tokens, the rest is cut off"
                print(f"sample: caption {number + 1} has {said}")
            picture: PictureRecord | None = PictureRecord(
                command="sample",
                caption=caption,
                drawn_as=drawn_as,
                seed=config.seed,
                options=options,
                model=models,
            )
            generation = end.generation
            if not end.drawn:  # stopped before a candidate was finished: the rows there are
                if begun is None:
                    break
                generation, picture = pipeline.unfinished(begun, top), None
            if number == 0:  # until here nothing that an earlier run has left is lost
                remove_earlier("sample", out, earlier)
            singles = save_pictures(out, names[number], generation, config.scale, picture)
            entry = record(caption, drawn_as, config.seed, generation, singles)
            if end.cancelled:
                entry["finished"] = end.drawn
                entry["rows"] = pipeline.grid[0] if end.drawn or begun is None else begun.rows
            run["records"].append(entry)
            say(f"sample: {number + 1}/{len(captions)} {caption}")
            pictures.save_bytes(out / RECORD, to_json(run))
            pictures.save_bytes(out / PAGE, page(run))
            if end.cancelled:
                break
    if (
        received
        and len(run["records"]) < len(captions)
        or any("finished" in entry for entry in run["records"])
    ):
        raise Interrupted(
            f"sample: stopped by {received[0]}; what was drawn of {len(run['records'])} of "
            f"{len(captions)} captions is in {out}"
        )
    count = f"{len(captions)} caption{'s' * (len(captions) > 1)}"
    print(f"sample: {count}, grids and samples.json in {out}; look at {out / PAGE}")


def last_events(events: Iterator[Event]) -> tuple[Finished, RowsFinished | None]:
    """The end of a stream for one caption, and the last row before it."""
    begun = None
    for event in events:
        if isinstance(event, RowsFinished):
            begun = event
        elif isinstance(event, Finished):
            return event, begun
    raise AssertionError("a stream ends with Finished")


def sample_again(config: SampleConfig) -> None:
    """Draws one candidate of an earlier run again; see `SampleConfig.again`."""
    job = again.prepare("sample", config, "prime_image", config.prime_image)
    record, options = job.record, job.record.options

    def draw() -> again.Drawn:
        with progress_shown("sample --again") as show:
            found = job.pipeline.generate(
                record.caption,
                num_candidates=1,
                seed=record.seed,
                sampling=options.sampling,
                weights=options.weights,
                prime_image=job.image,
                prime_rows=0 if options.image is None else options.image.rows or 0,
                first_candidate=record.candidate,
                code_progress=show,
            )
        return found.images[0], found.tokens[0], float(found.scores[0])

    job.finish(draw)
