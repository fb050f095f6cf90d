"""What `dalle sample` and `dalle edit` share: the pipeline's folder, and what a run leaves.

A run's folder holds samples.json, index.html, and for each caption a grid and single pictures.
"""

from __future__ import annotations

import fcntl
import math
import os
import platform
import re
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dalle import pictures
from dalle.commands.picture_record import PictureRecord
from dalle.console import say
from dalle.data.augment import center_crop, to_tensor
from dalle.data.images import decode, read_bytes
from dalle.demo import tiles
from dalle.devices import default_precision
from dalle.errors import CheckpointError, DataError
from dalle.files import make_folder, read_json, saving
from dalle.pipeline import Generation, Pipeline
from dalle.pretrained import fingerprint
from dalle.version import __version__

CANDIDATES = 64  # where neither the command line nor the pipeline says
PIPELINES = (Path("run/pipeline"), Path("out/demo/pipeline"))  # of `dalle train`, of `dalle demo`
WORDS = {
    "cond_scale": "guidance (cond_scale)",
    "top_k": "top-k",
    "top_p": "top-p",
    "cache_bits": "cache bits",
}
RECORD = "samples.json"
PAGE = "index.html"
SINGLE = re.compile(r"[0-9]+-[a-z0-9-]+/[0-9]+\.png")  # a picture of a run, as `slug` names it


def read_image(path: Path, size: int) -> torch.Tensor:
    """A picture's largest centred square at one size: (3, size, size) in [0, 1].

    Raises:
        DataError: missing, or not a JPEG, PNG or WebP that decodes.
    """
    return to_tensor([center_crop(decode(read_bytes(path), path), size)])[0]


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


def output_folder(owner: str, out: Path, overwrite: bool) -> Path:
    """The folder of this run: never one with samples of another, unless they are to be replaced,
    nor one that another process draws into now.

    Raises:
        EnvironmentProblem: it cannot be made.
    """
    folder, number, why = out, 1, ""
    while True:
        if overwrite or not (folder / RECORD).exists():
            make_folder(folder, owner)
            if overwrite or (_taken(folder) and not (folder / RECORD).exists()):
                break
            why = why or "is drawn into by another process"
        why = why or "holds samples of an earlier run"
        number += 1
        folder = out.with_name(f"{out.name}-{number}")
    if number > 1:
        say(f"{owner}: {out} {why}; these go to {folder}")
    return folder


_HELD: dict[tuple[int, int], int] = {}  # folders of this process, by device and inode


def _taken(folder: Path) -> bool:
    """Whether the folder is this process's from now on, until it ends, however that ends.

    A file system without locks gives it to everyone.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return True  # may be written, not read
    status = os.fstat(handle)
    key = (status.st_dev, status.st_ino)
    try:
        if key not in _HELD:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _HELD[key] = handle
            return True
    except BlockingIOError:
        os.close(handle)
        return False
    except OSError:
        pass
    os.close(handle)
    return True


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


def remove_earlier(owner: str, folder: Path, paths: list[Path]) -> None:
    """Removes the pictures of an earlier run from its folder, and nothing else.

    Raises:
        EnvironmentProblem: one cannot be removed.
    """
    if not paths:
        return
    with saving(owner, folder):
        for path in paths:
            path.unlink(missing_ok=True)
        for parent in {path.parent for path in paths} - {folder}:
            with suppress(OSError):  # it holds something else too
                parent.rmdir()
    say(f"{owner}: {len(paths)} pictures of an earlier run removed from {folder}")


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
    return tiles.html_page(
        f"dalle {run.get('command', 'sample')}", [head, tiles.contact(groups, 4)]
    )


def set_precision(pipeline: Pipeline, precision: str, device: torch.device) -> None:
    """Makes the prior draw in a precision; see `dalle.commands.drawing.DrawingOptions`."""
    trained = pipeline.prior.config.precision
    if precision == "auto":
        precision = trained if trained != "fp32" else default_precision(device)
    if precision != trained or precision != "fp32":  # 16 bits, once and not at every code
        pipeline.prior.compute_in_(precision)


def load_pipeline(model: Path, device: torch.device) -> Pipeline:
    """The pipeline in a folder, with all parts on a device."""
    pipeline = Pipeline.from_pretrained(model)
    for part in (pipeline.vae, pipeline.prior, pipeline.ranker):
        if isinstance(part, torch.nn.Module):
            part.to(device)
    return pipeline


def save_pictures(
    out: Path, name: str, generation: Generation, scale: int, run: PictureRecord | None
) -> list[str]:
    """Writes the grid out/NAME.png and single pictures; returns the names of these.

    Each says of itself how it was drawn: `run` with its own candidate, score and pixels. Without a
    `run`, of pictures that are not finished, it says nothing.
    """
    labels = ["" if math.isnan(s) else f"{s:.3f}" for s in generation.scores.tolist()]
    columns = min(8, len(generation.images))
    sheet = pictures.grid(generation.images, columns=columns, scale=scale, labels=labels)
    pictures.save_png(out / f"{name}.png", sheet, run.sheet(generation) if run else None)
    singles: list[str] = []
    found = zip(generation.order.tolist(), generation.scores.tolist(), strict=True)
    for (candidate, score), image in zip(found, pictures.to_uint8(generation.images), strict=True):
        singles.append(f"{name}/{len(singles)}.png")
        said = run.of(candidate, score, image).metadata() if run else None
        pictures.save_png(out / singles[-1], Image.fromarray(image), said)
    return singles
