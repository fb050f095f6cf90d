"""`dalle rerank`: which pictures of a folder fit a caption best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import tyro

from dalle import pictures
from dalle.captions import clean
from dalle.commands.drawn import earlier_pictures, find_model, read_image
from dalle.commands.picture_record import sheet_metadata
from dalle.console import argument_text, printable, say
from dalle.data.folder import find_pictures
from dalle.devices import pick_device
from dalle.errors import CheckpointError, DataError, NumericalError, UsageError
from dalle.files import check_not_input, check_targets, make_folder, read_json, to_json
from dalle.memory import require_memory
from dalle.pretrained import fingerprint
from dalle.ranker.model import ContrastiveRanker, TransformersCLIP, load_ranker

CLIP_SIZE = 224
RECORDS = (  # file of a command, a key in it, the sheet that it describes
    ("scores.json", "ranking", "sorted.png"),
    ("facts.json", None, "contact.png"),
)


@dataclass(frozen=True, kw_only=True)
class RerankConfig:
    """Scores the pictures of a folder against a caption.

    Args:
        caption: in quotes.
        data: folder of pictures, searched with its subfolders; the sheets that `dalle rerank`,
            `sample` and `data make-shapes` have left there are not ranked.
        ranker: folder of a ranker, or of a CLIP of transformers (extra `clip`). Left out:
            run/pipeline/ranker, and where there is none, out/demo/pipeline/ranker.
        out: folder for scores.json and sorted.png.
        top: pictures in sorted.png.
        device: "cpu", "cuda" or "auto".
    """

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"images": "data"}

    caption: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CAPTION")]
    data: Path
    ranker: Path | None = None
    out: Path = Path("run/rerank")
    top: int = 32
    device: str = "auto"


def contact_sheets(paths: Sequence[Path]) -> set[Path]:
    """Those of `paths` that show many pictures, by the record of the command beside them."""
    sheets: set[Path] = set()
    for folder in {path.parent for path in paths}:
        sheets |= {path for path in earlier_pictures(folder) if path.parent == folder}
        for record, key, name in RECORDS:
            content: object = None
            if (folder / record).is_file():
                with suppress(CheckpointError):
                    content = read_json(folder / record, CheckpointError)
            if isinstance(content, dict) and (key is None or key in content):
                sheets.add(folder / name)
    return sheets & set(paths)


def rerank(config: RerankConfig) -> None:
    """Scores, writes, and says which came first; what does not decode is skipped and counted."""
    caption = clean(argument_text(config.caption), keep_bytes=True)
    if not caption:
        raise UsageError(f"rerank: caption must hold a word, got {config.caption!r}")
    if config.top < 1:
        raise UsageError(f"rerank: top must be at least 1, got {config.top}")
    candidates = find_pictures(config.data)
    if not candidates:
        raise DataError(f"rerank: data must be a folder with pictures, got {config.data}")
    sheets = contact_sheets(candidates)
    files = [path for path in candidates if path not in sheets]
    if sheets:
        say(f"rerank: contact sheets left out: {len(sheets)}, such as {min(sheets)}")
    if not files:
        raise DataError("rerank: data must hold single pictures, got contact sheets only")
    ranker_folder = find_model("rerank", "ranker", config.ranker, "ranker")
    make_folder(config.out, "rerank")
    check_targets("rerank", config.out / "scores.json", config.out / "sorted.png")
    check_not_input("rerank", config.out / "sorted.png", files)
    device = pick_device(config.device)
    try:
        ranker = load_ranker(ranker_folder)
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
    skipped: Counter[str] = Counter({"contact sheet": len(sheets)} if sheets else {})
    paths, loaded = [], []
    for path in files:
        try:
            loaded.append(read_image(path, size))
            paths.append(path)
        except DataError as error:
            skipped[getattr(error, "reason", "does not decode")] += 1
            print(printable(f"rerank: skipped: {error}"))
    if not paths:
        raise DataError(f"rerank: data must hold a picture that decodes, got none of {len(files)}")
    stack = torch.stack(loaded)
    scores = ranker.scores([caption] * len(paths), stack)
    if not bool(scores.isfinite().all()):
        bad = int(scores.isfinite().logical_not().sum())
        raise NumericalError(
            f"rerank: scores must be finite, got {bad} of {len(paths)} that are not"
        )
    order = scores.argsort(descending=True, stable=True).tolist()
    ranking = [
        {"file": str(paths[i].relative_to(config.data)), "score": round(float(scores[i]), 5)}
        for i in order
    ]
    report = {"caption": caption, "ranking": ranking, "skipped": dict(skipped)}
    pictures.save_bytes(config.out / "scores.json", to_json(report))
    best = order[: config.top]
    sheet = pictures.grid(
        stack[best],
        columns=8,
        scale=pictures.default_scale(size),
        labels=[f"{scores[i]:.3f}" for i in best],
    )
    judge = fingerprint(ranker) if isinstance(ranker, torch.nn.Module) else None
    said = sheet_metadata("rerank", caption) | {
        "ranking": ranking[: config.top],
        "scores": {"ranker": [each["score"] for each in ranking[: config.top]]},
        "options": {"top": config.top},
        "model": {"ranker": judge},
    }
    pictures.save_png(config.out / "sorted.png", sheet, said)
    print(
        f"rerank: best of {len(paths)}: {ranking[0]['file']}; "
        f"scores.json and sorted.png in {config.out}"
    )
