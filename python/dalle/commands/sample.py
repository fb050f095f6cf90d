"""`dalle sample`: pictures for captions, from a trained pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dalle import files, pictures
from dalle.captions import caption_lines, clean
from dalle.commands.again import Again, Drawn
from dalle.commands.drawing import DrawingOptions, Run, last_events
from dalle.commands.drawn import PAGE, read_image
from dalle.commands.fits import require_best_fit
from dalle.commands.picture_record import Input, image_hash
from dalle.configs import integer
from dalle.console import argument_text, progress_shown, say
from dalle.errors import DataError, Interrupted, UsageError
from dalle.train.signals import signals


@dataclass(frozen=True, kw_only=True)
class SampleConfig(DrawingOptions):
    """Draws pictures for captions.

    Args:
        captions: what to draw, each in quotes.
        file: captions, one a line, in addition.
        prime_image: a picture whose top rows are given.
        prime_rows: how many rows of codes of it; 0 is half of them.
        max_batch: candidates drawn at a time; left out, what fits the memory, at most 64. It
            changes no picture.
    """

    captions: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    file: Path | None = None
    prime_image: Path | None = None
    prime_rows: int = 0
    max_batch: int | None = None


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
    config.check("sample")
    rows = integer("sample", "prime_rows", config.prime_rows, 0)
    if rows and config.prime_image is None:
        raise UsageError(f"sample: prime_rows must be 0 without a prime_image, got {rows}")
    if config.max_batch is not None:
        integer("sample", "max_batch", config.max_batch, 1)
    run = Run("sample", config, captions, [config.prime_image] if config.prime_image else [])
    pipeline, options = run.pipeline, run.options()
    if options["top"] < config.top:
        say(f"sample: of {options['top']} candidates all are kept, not {config.top}")
    require_best_fit("sample", pipeline, options["top"], options["sampling"])
    pictures.check_sheet("sample", options["top"], pipeline.image_size, config.scale)
    prime = given = None
    if rows >= pipeline.grid[0]:
        raise UsageError(f"sample: prime_rows must be 1 to {pipeline.grid[0] - 1}, got {rows}")
    if config.prime_image is not None:
        prime = read_image(config.prime_image, pipeline.image_size)
        rows = rows or pipeline.grid[0] // 2
        given = Input(pixels=image_hash(prime), rows=rows)
        say(
            f"sample: {config.prime_image} gives the top {rows} of {pipeline.grid[0]} rows of codes"
        )
    said = None if prime is None else {"image": str(config.prime_image), "rows": rows}
    run.begin(options, config.precision, prime=said)
    with signals() as received:
        for number, caption in enumerate(captions):
            drawn_as = pipeline.tokenizer.shape(caption)
            if drawn_as != clean(caption):
                as_words = (
                    f"caption {number + 1} is drawn as {drawn_as!r}, spelt as in the training"
                )
                say(f"sample: {as_words}")
            cut = pipeline.tokenizer.truncated
            with progress_shown(f"sample {number + 1}/{len(captions)}") as show:
                events = pipeline.stream(
                    caption,
                    **options,
                    prime_image=prime,
                    prime_rows=rows,
                    max_batch=config.max_batch,
                    cancel=lambda: bool(received),
                    code_progress=show,
                )
                end, begun = last_events(events)
            if pipeline.tokenizer.truncated > cut:
                slots = pipeline.prior.config.text_len - 1
                print(
                    f"sample: caption {number + 1} has more than {slots} tokens, the rest is cut "
                    "off"
                )
            picture = run.picture(caption, drawn_as, options, given)
            if run.finish(caption, drawn_as, end, begun, picture) is None:
                break
            say(f"sample: {number + 1}/{len(captions)} {caption}")
            if end.cancelled:
                break
    entries, out = run.said["records"], run.out
    if received and (len(entries) < len(captions) or "finished" in entries[-1]):
        raise Interrupted(
            f"sample: stopped by {received[0]}; what was drawn of {len(entries)} of "
            f"{len(captions)} captions is in {out}"
        )
    count = f"{len(captions)} caption{'s' * (len(captions) > 1)}"
    print(f"sample: {count}, grids and samples.json in {out}; look at {out / PAGE}")


def sample_again(config: SampleConfig) -> None:
    """Draws one candidate of an earlier run again; see `DrawingOptions.again`."""
    job = Again("sample", config, "prime_image", config.prime_image)
    record, image = job.record, job.record.options.image

    def draw() -> Drawn:
        with progress_shown("sample --again") as show:
            found = job.pipeline.generate(
                record.caption,
                num_candidates=1,
                seed=record.seed,
                sampling=record.options.sampling,
                weights=record.options.weights,
                prime_image=job.image,
                prime_rows=0 if image is None else image.rows or 0,
                first_candidate=record.candidate,
                code_progress=show,
            )
        return found.images[0], found.tokens[0], float(found.scores[0])

    job.finish(draw)
