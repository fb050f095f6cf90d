"""Scores of the trained models on unseen captions and pictures, and their samples.

Shape letters: B captions, N samples of each, P true pictures, H = W side of a picture in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from threading import Event, Lock
from typing import Any

import numpy as np
import torch

from dalle import pictures
from dalle.console import progress_shown, say
from dalle.data.augment import load_cropped, to_tensor
from dalle.data.codes import tokens_of
from dalle.data.pairs import evenly_spaced
from dalle.demo import tiles
from dalle.demo.context import SHOWN, Demo
from dalle.demo.measures import code_use
from dalle.demo.sets import Columns, some_images
from dalle.demo.workspace import Workspace
from dalle.dvae.likelihood import set_psnr
from dalle.errors import CheckpointError, Interrupted
from dalle.files import read_bytes
from dalle.pretrained import MAX_HEADER_BYTES, tensors_from_bytes, tensors_to_bytes
from dalle.train.parts import PARTS, run_parts_no_grad

ROW = 8  # pictures shown of a caption, the true one among them
BATCH = 256  # pictures that go through the codes at a time
MAX_PICTURES = 2048  # training pictures that are sent through the codes


def score_codes(demo: Demo) -> None:
    """Which codes are in use; with pictures, PSNR of unseen ones and the set's own scores of their
    reconstructions."""
    pairs = demo.data.train
    result: dict[str, Any] = {}
    items = np.random.default_rng(demo.seed).permutation(len(pairs))[:MAX_PICTURES].tolist()
    if demo.data.vae is not None:
        tokens = tokens_of(pairs, items, [0] * len(items))
    else:
        result, tokens = _reconstructions(demo, items)
    use = code_use(tokens, demo.vae.num_tokens)
    result |= {
        "codes_used": use["codes_used"],
        "code_share": use["codes_used"] / use["codes"],
        "code_use": use,
    }
    demo.space.add_scores(result)


def _reconstructions(demo: Demo, items: list[int]) -> tuple[dict[str, Any], torch.Tensor]:
    """Scores of reconstructions, some of which it draws, and tokens of training pictures."""
    unseen = [some_images(pairs, demo.recipe.image_size) for pairs in demo.data.unseen]
    reconstructions = [demo.vae.reconstruct(images, BATCH)[0] for images in unseen]
    result = demo.data.reconstruction_scores(reconstructions)
    true, reconstructed = torch.cat(unseen), torch.cat(reconstructions)
    train_images, _ = images_of(demo, items)
    train_reconstructed, tokens = demo.vae.reconstruct(train_images, BATCH)
    result |= {
        "psnr": set_psnr(true, reconstructed),
        "psnr_train": set_psnr(train_images, train_reconstructed),
    }
    count = min(SHOWN, len(true))
    shown = torch.linspace(0, len(true) - 1, count, dtype=torch.float32, device="cpu").long()
    columns = torch.stack([true[shown], reconstructed[shown]], 1)
    tiles.save_sheet(demo.space.out / "pictures" / "reconstructions.png", columns)
    return result, tokens


def images_of(demo: Demo, items: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
    """Training pictures, (N, 3, S, S) in [0, 1], and their items; without those that cannot be
    used."""
    size = demo.recipe.image_size
    crops, usable = load_cropped(demo.data.train, items, size)
    return to_tensor(crops), usable


def samples_stage(demo: Demo) -> None:
    """Draws, scores with the ranker, compares with the true pictures, and lays out a page."""
    recipe, space = demo.recipe, demo.space
    columns = demo.data.captions(recipe.num_captions)
    captions = columns.captions
    shape = (len(captions), recipe.num_samples, *demo.pipeline.grid)
    tokens = stored_tokens(space, shape, demo.vae.num_tokens)
    if tokens is None:
        tokens = draw_samples(demo, captions)
        pictures.save_bytes(space.samples, tensors_to_bytes({"tokens": tokens}))
    images = demo.pipeline.decode(tokens)
    ranker = demo.pipeline.ranker
    assert ranker is not None
    repeated = [caption for caption in captions for _ in range(recipe.num_samples)]
    ranked = ranker.scores(repeated, images.flatten(0, 1)).view(len(captions), -1).numpy()
    result = demo.data.sample_scores(columns, images, ranked)
    draw_strips(demo, columns, images, ranked, demo.data.originals(columns))
    space.add_scores({**result, "captions_drawn": len(captions), "samples": int(ranked.size)})


def draw_samples(demo: Demo, captions: list[str]) -> torch.Tensor:
    """(B, N, h, w) codes on the CPU; a caption that comes again gets other candidates."""
    count = demo.recipe.num_samples
    first = [captions[:i].count(caption) * count for i, caption in enumerate(captions)]
    counts: dict[int, int] = {}
    lock, stop = Lock(), Event()

    def part(rows: slice) -> tuple[torch.Tensor]:
        def progress(number: int, _: int) -> None:
            if stop.is_set():  # after Ctrl-C the process would wait for its threads
                raise Interrupted("samples: stopped")
            with lock:
                counts[rows.start] = number
                show(sum(counts.values()), len(captions) * count)

        tokens = demo.pipeline.sample(
            captions[rows],
            count,
            demo.recipe.sampling,
            seed=demo.seed,
            first_candidate=first[rows],
            progress=progress,
        )
        return (tokens.cpu(),)

    with progress_shown("samples") as show:
        try:
            outputs = run_parts_no_grad(part, len(captions), PARTS)
        finally:
            stop.set()
    return torch.cat([tokens for (tokens,) in outputs])


def stored_tokens(space: Workspace, shape: tuple[int, ...], codes: int) -> torch.Tensor | None:
    """The codes an earlier run has drawn, int64 of `shape`; None where there are none.

    A damaged file, or one of another demo, is reported and drawn again.
    """
    if not space.samples.exists():
        return None
    try:
        data = read_bytes(space.samples, 8 * math.prod(shape) + MAX_HEADER_BYTES)
        tokens = tensors_from_bytes(data, space.samples).get("tokens")
    except (OSError, CheckpointError):
        tokens = None
    if tokens is not None and (tokens.shape, tokens.dtype) == (shape, torch.int64):
        if 0 <= int(tokens.min()) and int(tokens.max()) < codes:
            return tokens
    say(
        f"{space.command}: {space.samples} must hold this run's samples, got others; drawing them "
        "anew"
    )
    if not space.samples.is_file():
        space.samples.unlink()  # a device or a pipe cannot be replaced by a file
    return None


def draw_strips(
    demo: Demo,
    columns: Columns,
    images: torch.Tensor,
    scores: np.ndarray,
    truth: torch.Tensor | None,
) -> None:
    """A row of tiles per caption, best first (after the true picture, where there is one).

    Writes pictures/strips.png, pictures/samples.png (true picture and best sample of 24 captions,
    with their captions, to be passed on) and work/strips.json.
    """
    captions, splits, shown = columns.captions, columns.splits, demo.data.shown
    order = np.argsort(-scores, axis=1, kind="stable")[:, : ROW - (truth is not None)]
    indices = [i for split in shown for i in _evenly_spaced(splits, split, SHOWN // len(shown))]
    drawn = torch.stack([images[i][torch.from_numpy(order[i])] for i in indices])
    rows = drawn if truth is None else torch.cat([truth[indices][:, None], drawn], 1)
    tiles.save_sheet(demo.space.out / "pictures" / "strips.png", rows)
    own = [] if truth is None else [demo.data.true]
    strips = [
        {
            "caption": captions[i],
            "split": splits[i],
            "below": own + [f"{scores[i, j]:.2f}" for j in order[i]],
        }
        for i in indices
    ]
    best = rows[:, : 1 + (truth is not None)]
    labels = [words for i in indices for words in (captions[i], "drawn")[: best.shape[1]]]
    scale = tiles.scale_for(demo.recipe.image_size)
    sheet = pictures.grid(best.flatten(0, 1), columns=8, scale=scale, labels=labels)
    pictures.save_png(demo.space.out / "pictures" / "samples.png", sheet)
    demo.space.write(demo.space.work / "strips.json", {"strips": strips})


def _evenly_spaced(splits: list[str], split: str, count: int) -> list[int]:
    """Indices of up to `count` captions of a split, spread over all of them."""
    rows = [i for i, name in enumerate(splits) if name == split]
    return [rows[i] for i in evenly_spaced(len(rows), count)]
