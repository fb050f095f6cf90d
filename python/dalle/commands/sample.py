"""`dalle sample`: pictures for captions, from a trained pipeline."""

from __future__ import annotations

import math
import platform
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from PIL import Image

from dalle import files, pictures
from dalle.captions import caption_lines, clean
from dalle.commands.fits import require_samples_fit
from dalle.configs import integer
from dalle.console import argument_text, progress_shown, say
from dalle.data.augment import center_crop, to_tensor
from dalle.data.images import decode, read_bytes
from dalle.demo import tiles
from dalle.devices import default_precision, pick_device
from dalle.errors import CheckpointError, DataError, UsageError
from dalle.files import make_folder, read_json, saving, to_json
from dalle.pipeline import MAX_CANDIDATES, Generation, Pipeline
from dalle.pretrained import fingerprint
from dalle.prior.sampling import SamplingChanges
from dalle.version import __version__

CANDIDATES = 64  # where neither the command line nor the pipeline says
PIPELINES = (Path("run/pipeline"), Path("out/demo/pipeline"))  # of `dalle train`, of `dalle demo`
WORDS = {"cond_scale": "guidance (cond_scale)", "top_k": "top-k", "top_p": "top-p"}
RECORD = "samples.json"
PAGE = "index.html"
SINGLE = re.compile(r"[0-9]+-[a-z0-9-]+/[0-9]+\.png")  # a picture of a run, as `slug` names it


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
        device: "cpu", "cuda" or "auto".
        scale: screen pixels per pixel in the grids.
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


def find_model(owner: str, option: str, given: Path | None, part: str = "") -> Path:
    """The folder given, else the first of `PIPELINES` that is there, which is said.

    Raises:
        DataError: neither is.
    """
    if given is not None:
        return given
    for folder in PIPELINES:
        if (folder / part / "config.json").exists():
            say(f"{owner}: {option} {folder / part}")
            return folder / part
    names = " nor in ".join(str(folder / part) for folder in PIPELINES)
    raise DataError(f"{owner}: {option} must be given, got nothing, and there is none in {names}")


def slug(caption: str, number: int) -> str:
    """A file name for a caption: "03-a-red-circle"."""
    words = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")
    return f"{number:02d}-{words[:48].strip('-') or 'caption'}"


def output_folder(config: SampleConfig) -> Path:
    """The folder of this run: never one with samples of another, unless they are to be replaced.

    Raises:
        EnvironmentProblem: it cannot be made.
        UsageError: it holds a samples.json that no run has written.
    """
    folder, number = config.out, 1
    while not config.overwrite and (folder / RECORD).exists():
        number += 1
        folder = config.out.with_name(f"{config.out.name}-{number}")
    make_folder(folder, "sample")
    if number > 1:
        say(f"sample: {config.out} holds samples of an earlier run; these go to {folder}")
    return folder


def earlier_pictures(folder: Path) -> list[Path]:
    """The pictures that samples.json in a folder names: singles, and the grid of each caption."""
    if not (folder / RECORD).exists():
        return []
    named: list[Any] = []
    with suppress(CheckpointError):  # a damaged one names none
        content = read_json(folder / RECORD, CheckpointError)
        records = content.get("records") if isinstance(content, dict) else content
        for entry in records if isinstance(records, list) else ():
            files_of_entry = entry.get("files") if isinstance(entry, dict) else None
            named += files_of_entry if isinstance(files_of_entry, list) else ()
    singles = sorted({n for n in named if isinstance(n, str) and SINGLE.fullmatch(n)})
    grids = sorted({f"{name.partition('/')[0]}.png" for name in singles})
    return [path for name in [*singles, *grids] if (path := folder / name).is_file()]


def remove_earlier(folder: Path, paths: list[Path]) -> None:
    """Removes the pictures of an earlier run from its folder, and nothing else.

    Raises:
        EnvironmentProblem: one cannot be removed.
    """
    if not paths:
        return
    with saving("sample", folder):
        for path in paths:
            path.unlink(missing_ok=True)
        for parent in {path.parent for path in paths} - {folder}:
            with suppress(OSError):  # it holds something else too
                parent.rmdir()
    say(f"sample: {len(paths)} pictures of an earlier run removed from {folder}")


def description(pipeline: Pipeline, model: Path) -> dict[str, Any]:
    """What samples.json says of the model and the software."""
    modules = {"vae": pipeline.vae, "prior": pipeline.prior, "ranker": pipeline.ranker}
    prints = {n: fingerprint(m) for n, m in modules.items() if isinstance(m, torch.nn.Module)}
    versions = {
        "dalle": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return {
        "model": {
            "path": str(model.absolute()),
            "fingerprints": {"tokenizer": pipeline.tokenizer.fingerprint(), **prints},
        },
        "versions": versions,
    }


def record(
    caption: str, drawn_as: str, seed: int, generation: Generation, names: list[str]
) -> dict[str, Any]:
    """The entry of one caption in samples.json; a missing score is null."""
    scores = [None if math.isnan(s) else round(s, 5) for s in generation.scores.tolist()]
    return {
        "caption": caption,
        "drawn_as": drawn_as,
        "seed": seed,
        "scores": scores,
        "candidates": generation.order.tolist(),
        "files": names,
    }


def page(run: dict[str, Any]) -> bytes:
    """The HTML page of a run: each caption over its pictures, the best first, and the options."""
    groups = []
    for entry in run["records"]:
        below = ["" if score is None else f"{score:.3f}" for score in entry["scores"]]
        alt = [f"{entry['caption']}: drawn, {words}".rstrip(" ,") for words in below]
        row = zip(entry["files"], alt, below, strict=True)
        groups.append(tiles.group([tiles.picture(*each) for each in row], entry["caption"]))
    options = {WORDS.get(name, name): value for name, value in run["sampling"].items()}
    options = {**options, "candidates": run["num_candidates"], "seed": run["seed"]}
    words = ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)
    ranked = any(score is not None for entry in run["records"] for score in entry["scores"])
    order = "the best first, with the ranker's scores" if ranked else "in the order of sampling"
    head = f"<p>Drawn with {escape(words)}; {order}. Model: {escape(run['model']['path'])}</p>"
    return tiles.html_page("dalle sample", [head, tiles.contact(groups, 4)])


def set_precision(pipeline: Pipeline, precision: str, device: torch.device) -> None:
    """Makes the prior draw in a precision; see `SampleConfig`."""
    trained = pipeline.prior.config.precision
    if precision == "auto":
        precision = trained if trained != "fp32" else default_precision(device)
    if precision != trained or precision != "fp32":  # 16 bits, once and not at every code
        pipeline.prior.compute_in_(precision)


def sample(config: SampleConfig) -> None:
    """Draws, writes, and says where."""
    captions = read_captions(config)
    num_candidates = config.num_candidates
    if num_candidates is not None:
        num_candidates = integer("sample", "num_candidates", num_candidates, 1, MAX_CANDIDATES)
    integer("sample", "top", config.top, 1)
    model = find_model("sample", "model", config.model)
    out, names = output_folder(config), [slug(text, i) for i, text in enumerate(captions)]
    earlier = earlier_pictures(out)
    files.check_targets("sample", out / RECORD, out / PAGE)
    for name in names:
        files.check_targets("sample", out / f"{name}.png", out / name / "0.png")
    if config.prime_image is not None:
        for path in [*earlier, *(out / f"{name}.png" for name in names)]:
            files.check_not_input("sample", path, [config.prime_image])
    device = pick_device(config.device)
    pipeline = Pipeline.from_pretrained(model)
    for part in (pipeline.vae, pipeline.prior, pipeline.ranker):
        if isinstance(part, torch.nn.Module):
            part.to(device)
    if num_candidates is None:
        num_candidates = pipeline.num_candidates or CANDIDATES
    top = min(config.top, num_candidates)
    if top < config.top:
        say(f"sample: of {num_candidates} candidates all are kept, not {config.top}")
    sampling = config.sampling.applied(pipeline.sampling)
    require_samples_fit("sample", pipeline, num_candidates, sampling.cond_scale != 1)
    pictures.check_sheet("sample", top, pipeline.image_size, config.scale)
    prime, rows = None, config.prime_rows
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
    set_precision(pipeline, config.precision, device)  # once the weights' fingerprints are taken
    run["precision"] = pipeline.prior.config.precision
    for number, caption in enumerate(captions):
        drawn_as = pipeline.tokenizer.shape(caption)
        if drawn_as != clean(caption):
            say(f"sample: caption {number + 1} is drawn as {drawn_as!r}, spelt as in the training")
        cut = pipeline.tokenizer.truncated
        with progress_shown(f"sample {number + 1}/{len(captions)}") as show:
            generation = pipeline.generate(
                caption,
                num_candidates=num_candidates,
                top=top,
                seed=config.seed,
                **asdict(sampling),
                prime_image=prime,
                prime_rows=rows,
                code_progress=show,
            )
        if pipeline.tokenizer.truncated > cut:
            slots = pipeline.prior.config.text_len - 1
            print(f"sample: caption {number + 1} has more than {slots} tokens, the rest is cut off")
        if number == 0:  # until here nothing that an earlier run has left is lost
            remove_earlier(out, earlier)
        singles = save_pictures(out, names[number], generation, config.scale)
        run["records"].append(record(caption, drawn_as, config.seed, generation, singles))
        say(f"sample: {number + 1}/{len(captions)} {caption}")
        pictures.save_bytes(out / RECORD, to_json(run))
        pictures.save_bytes(out / PAGE, page(run))
    count = f"{len(captions)} caption{'s' * (len(captions) > 1)}"
    print(f"sample: {count}, grids and samples.json in {out}; look at {out / PAGE}")


def save_pictures(out: Path, name: str, generation: Generation, scale: int) -> list[str]:
    """Writes the grid out/NAME.png and single pictures; returns the names of these."""
    labels = ["" if math.isnan(s) else f"{s:.3f}" for s in generation.scores.tolist()]
    columns = min(8, len(generation.images))
    sheet = pictures.grid(generation.images, columns=columns, scale=scale, labels=labels)
    pictures.save_png(out / f"{name}.png", sheet)
    singles = []
    for index, image in enumerate(pictures.to_uint8(generation.images)):
        singles.append(f"{name}/{index}.png")
        pictures.save_png(out / singles[-1], Image.fromarray(image))
    return singles
