"""`dalle rerank`: which pictures of a folder fit a caption best."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from dalle import pictures
from dalle.captions import clean
from dalle.commands.sample import read_image
from dalle.console import argument_text, printable
from dalle.data.folder import find_pictures
from dalle.devices import pick_device
from dalle.errors import CheckpointError, DataError, NumericalError, UsageError
from dalle.files import check_not_input, check_targets, make_folder, to_json
from dalle.memory import require_memory
from dalle.ranker.model import ContrastiveRanker, TransformersCLIP, load_ranker

CLIP_SIZE = 224


@dataclass(frozen=True, kw_only=True)
class RerankConfig:
    """Scores the pictures of a folder against a caption.

    Args:
        caption: in quotes.
        images: folder of pictures, searched with its subfolders.
        ranker: folder of a ranker (of `dalle demo`, or a CLIP of transformers; extra `clip`).
        out: folder for scores.json and sorted.png.
        top: pictures in sorted.png.
        device: "cpu", "cuda" or "auto".
    """

    caption: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CAPTION")]
    images: Path
    ranker: Path = Path("out/demo/pipeline/ranker")
    out: Path = Path("out/rerank")
    top: int = 32
    device: str = "auto"


def rerank(config: RerankConfig) -> None:
    """Scores, writes, and says which came first; what does not decode is skipped and counted."""
    caption = clean(argument_text(config.caption), keep_bytes=True)
    if not caption:
        raise UsageError(f"rerank: caption must hold a word, got {config.caption!r}")
    if config.top < 1:
        raise UsageError(f"rerank: top must be at least 1, got {config.top}")
    files = find_pictures(config.images)
    if not files:
        raise DataError(f"rerank: images must be a folder with pictures, got {config.images}")
    make_folder(config.out, "rerank")
    check_targets("rerank", config.out / "scores.json", config.out / "sorted.png")
    check_not_input("rerank", config.out / "sorted.png", files)
    device = pick_device(config.device)
    try:
        ranker = load_ranker(config.ranker)
    except CheckpointError as error:
        raise CheckpointError(f"rerank: ranker: {error}") from error
    size = CLIP_SIZE
    if isinstance(ranker, ContrastiveRanker):
        ranker.to(device)
        size = ranker.config.image_size
    elif isinstance(ranker, TransformersCLIP):
        ranker.to(device)
    description = f"{len(files)} pictures of {size} pixels"
    require_memory("rerank", 4 * 3 * size**2 * len(files), description, "take a smaller folder")
    skipped: Counter[str] = Counter()
    paths, loaded = [], []
    for path in files:
        try:
            loaded.append(read_image(path, size))
            paths.append(path)
        except DataError as error:
            skipped[getattr(error, "reason", "does not decode")] += 1
            print(printable(f"rerank: skipped: {error}"))
    if not paths:
        raise DataError(
            f"rerank: images must hold a picture that decodes, got none of {len(files)}"
        )
    stack = torch.stack(loaded)
    scores = ranker.scores([caption] * len(paths), stack)
    if not bool(scores.isfinite().all()):
        bad = int(scores.isfinite().logical_not().sum())
        raise NumericalError(
            f"rerank: scores must be finite, got {bad} of {len(paths)} that are not"
        )
    order = scores.argsort(descending=True, stable=True).tolist()
    ranking = [
        {"file": str(paths[i].relative_to(config.images)), "score": round(float(scores[i]), 5)}
        for i in order
    ]
    report = {"caption": caption, "ranking": ranking, "skipped": dict(skipped)}
    pictures.save_bytes(config.out / "scores.json", to_json(report))
    best = order[: config.top]
    sheet = pictures.grid(
        stack[best], columns=8, scale=max(1, 96 // size), labels=[f"{scores[i]:.3f}" for i in best]
    )
    pictures.save_png(config.out / "sorted.png", sheet)
    print(
        f"rerank: best of {len(paths)}: {ranking[0]['file']}; "
        f"scores.json and sorted.png in {config.out}"
    )
