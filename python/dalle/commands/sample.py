"""`dalle sample`: pictures for captions, from a trained pipeline."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro
from PIL import Image

from dalle import files, pictures
from dalle.captions import caption_lines, clean
from dalle.commands.fits import require_samples_fit
from dalle.console import argument_text, say
from dalle.data.augment import center_crop, to_tensor
from dalle.data.images import decode, read_bytes
from dalle.devices import pick_device
from dalle.errors import DataError, UsageError
from dalle.files import make_folder, to_json
from dalle.pipeline import Generation, Pipeline
from dalle.prior.sampling import SamplingChanges

CANDIDATES = 64  # where neither the command line nor the pipeline says


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Draws pictures for captions.

    Args:
        captions: what to draw, each in quotes.
        model: folder of a pipeline (the demo leaves one in out/demo/pipeline).
        file: captions, one a line, in addition.
        out: folder for grid PNGs, single PNGs and samples.json.
        num_candidates: samples a caption to choose from; left out, what the pipeline says, else 64
            (the paper takes 512).
        top: how many of them to keep at most.
        seed: a caption gets the same pictures from the same seed, whatever else is drawn.
        sampling: how a code is drawn; what is left out is as the pipeline says.
        prime_image: a picture whose top rows are given.
        prime_rows: how many rows of codes of it.
        device: "cpu", "cuda" or "auto".
        scale: screen pixels per pixel in the grids.
    """

    captions: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    model: Path = Path("out/demo/pipeline")
    file: Path | None = None
    out: Path = Path("out/samples")
    num_candidates: int | None = None
    top: int = 8
    seed: int = 0
    sampling: SamplingChanges = field(default_factory=SamplingChanges)
    prime_image: Path | None = None
    prime_rows: int = 0
    device: str = "auto"
    scale: int = 2


def read_image(path: Path, size: int) -> torch.Tensor:
    """A picture's largest centred square at one size: (3, size, size) in [0, 1].

    Raises:
        DataError: missing, or not a JPEG, PNG or WebP that decodes.
    """
    return to_tensor([center_crop(decode(read_bytes(path), path), size)])[0]


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


def slug(caption: str, number: int) -> str:
    """A file name for a caption: "03-a-red-circle"."""
    words = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")
    return f"{number:02d}-{words[:48].strip('-') or 'caption'}"


def record(caption: str, seed: int, generation: Generation, names: list[str]) -> dict[str, object]:
    """The entry of one caption in samples.json; a missing score is null."""
    scores = [None if math.isnan(s) else round(s, 5) for s in generation.scores.tolist()]
    return {
        "caption": caption,
        "seed": seed,
        "scores": scores,
        "candidates": generation.order.tolist(),
        "files": names,
    }


def sample(config: SampleConfig) -> None:
    """Draws, writes, and says where."""
    captions = read_captions(config)
    make_folder(config.out, "sample")
    names = [slug(caption, number) for number, caption in enumerate(captions)]
    files.check_targets("sample", config.out / "samples.json")
    for name in names:
        files.check_targets("sample", config.out / f"{name}.png", config.out / name / "0.png")
        if config.prime_image is not None:
            files.check_not_input("sample", config.out / f"{name}.png", [config.prime_image])
    device = pick_device(config.device)
    pipeline = Pipeline.from_pretrained(config.model)
    for part in (pipeline.vae, pipeline.prior, pipeline.ranker):
        if isinstance(part, torch.nn.Module):
            part.to(device)
    num_candidates = config.num_candidates
    if num_candidates is None:
        num_candidates = pipeline.num_candidates or CANDIDATES
    top = min(config.top, num_candidates)
    if top < config.top:
        say(f"sample: of {num_candidates} candidates all are kept, not {config.top}")
    sampling = config.sampling.applied(pipeline.sampling)
    require_samples_fit("sample", pipeline, num_candidates, sampling.cond_scale != 1)
    pictures.check_sheet("sample", top, pipeline.image_size, config.scale)
    prime = None
    if config.prime_image is not None:
        prime = read_image(config.prime_image, pipeline.image_size)
    records = []
    for number, caption in enumerate(captions):
        cut = pipeline.tokenizer.truncated
        generation = pipeline.generate(
            caption,
            num_candidates=num_candidates,
            top=top,
            seed=config.seed,
            **asdict(sampling),
            prime_image=prime,
            prime_rows=config.prime_rows,
        )
        if pipeline.tokenizer.truncated > cut:
            slots = pipeline.prior.config.text_len - 1
            print(f"sample: caption {number + 1} has more than {slots} tokens, the rest is cut off")
        name = names[number]
        labels = ["" if math.isnan(s) else f"{s:.3f}" for s in generation.scores.tolist()]
        sheet = pictures.grid(
            generation.images, columns=min(8, top), scale=config.scale, labels=labels
        )
        pictures.save_png(config.out / f"{name}.png", sheet)
        singles = []
        for index, image in enumerate(pictures.to_uint8(generation.images)):
            singles.append(f"{name}/{index}.png")
            pictures.save_png(config.out / singles[-1], Image.fromarray(image))
        records.append(record(caption, config.seed, generation, singles))
        say(f"sample: {number + 1}/{len(captions)} {caption}")
        pictures.save_bytes(config.out / "samples.json", to_json(records))
    print(f"sample: {len(captions)} captions, grids and samples.json in {config.out}")
