"""Scores of the trained models on unseen captions and pictures, and their samples.

Shape letters: B captions, N samples of each, P true pictures, H = W side of a picture in pixels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from threading import Event, Lock
from typing import Any

import numpy as np
import torch

from dalle import pictures
from dalle.console import duration, say
from dalle.data.augment import to_tensor
from dalle.data.pairs import Pairs
from dalle.data.shapes import Scene, parse
from dalle.data.shapes_check import ShapesReport, check_batch, summary
from dalle.demo import tiles
from dalle.demo.config import Workspace
from dalle.demo.context import SHOWN, Demo, captions_to_draw
from dalle.dvae.codebook import codebook_health
from dalle.dvae.likelihood import set_psnr
from dalle.errors import CheckpointError, Interrupted, UsageError
from dalle.files import read_bytes
from dalle.pictures import to_uint8
from dalle.pretrained import MAX_HEADER_BYTES, tensors_from_bytes, tensors_to_bytes
from dalle.train.parts import PARTS, run_parts_no_grad

ROW = 8  # pictures shown of a caption, the true one among them
BEST_OF = (1, 2, 4, 8)


def nearest_rank(samples: torch.Tensor, target: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    """How many true pictures are nearer to each sample than its own true picture is.

    Args:
        samples: (M, 3, H, W).
        target: (M,) int64, index in the pool of the sample's own true picture.
        pool: (P, 3, H, W) true pictures.

    Returns:
        (M,) int64: 0 where the sample's own is the nearest by pixel L2 distance.
    """
    distance = torch.cdist(samples.flatten(1).double(), pool.flatten(1).double())
    return (distance < distance.gather(1, target[:, None])).sum(1)


def best_of(right: np.ndarray, scores: np.ndarray, count: int) -> float:
    """Share of right answers when the highest score among `count` samples is taken.

    The N samples are cut into N / count groups, which all are averaged, so that small counts are
    measured on as many samples as large ones.

    Args:
        right: (B, N) bool.
        scores: (B, N), higher is better.
        count: samples to choose from, a divisor of N.
    """
    groups = _groups(right, count)
    order = _groups(scores, count).argmax(-1)
    return float(np.take_along_axis(groups, order[..., None], -1).mean())


def oracle_of(right: np.ndarray, count: int) -> float:
    """Share of groups of `count` samples that hold a right one: what a ranker cannot exceed."""
    return float(_groups(right, count).any(-1).mean())


def curve(right: np.ndarray, scores: np.ndarray) -> list[dict[str, float]]:
    """Best of 1, 2, 4, 8 by the ranker and by an oracle (paper Fig. 6 and 9c in small)."""
    return [
        {
            "samples": count,
            "reranked": best_of(right, scores, count),
            "oracle": oracle_of(right, count),
        }
        for count in BEST_OF
        if right.shape[1] % count == 0
    ]


def emoji_scores(ranks: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """Scores of samples for held-out captions.

    Args:
        ranks: (B, N) of `nearest_rank`.
        scores: (B, N) of the ranker.
    """
    count = ranks.shape[1]
    result: dict[str, Any] = {}
    for top in (1, 5):
        right = ranks < top
        result[f"held_out_at_{top}"] = best_of(right, scores, count)
        result[f"held_out_at_{top}_single"] = float(right.mean())
        result[f"held_out_at_{top}_oracle"] = oracle_of(right, count)
        result[f"curve_at_{top}"] = curve(right, scores)
    return result


def check_samples(images: torch.Tensor, scenes: Sequence[Scene]) -> list[list[ShapesReport]]:
    """(B, N, 3, H, W) in [0, 1] and B scenes -> reports, B lists of N."""
    count = images.shape[1]
    flat = check_batch(
        to_uint8(images.flatten(0, 1)), [scene for scene in scenes for _ in range(count)]
    )
    return [flat[i : i + count] for i in range(0, len(flat), count)]


def fact_table(reports: Sequence[Sequence[ShapesReport]], scores: np.ndarray) -> dict[str, Any]:
    """Share right per fact: of single samples, and of the sample the ranker puts first."""
    singles = [report for row in reports for report in row]
    best = [row[int(i)] for row, i in zip(reports, scores.argmax(1), strict=True)]
    return {"single": summary(singles), "best": summary(best), "captions": len(reports)}


def right_table(reports: Sequence[Sequence[ShapesReport]], fact: str = "all_right") -> np.ndarray:
    """(B, N) bool: does each sample show the fact."""
    return np.array([[bool(getattr(report, fact)) for report in row] for row in reports])


def shapes_scores(
    images: torch.Tensor, scenes: Sequence[Scene], splits: Sequence[str], scores: np.ndarray
) -> dict[str, Any]:
    """Scores of samples for captions of several splits.

    Args:
        images: (B, N, 3, H, W) in [0, 1].
        scenes: B scenes.
        splits: B of "train", "test", "zero".
        scores: (B, N) of the ranker.

    Returns:
        `one_object_single`, `one_object_best_of_8` (zero split, every fact right),
        `relation_best_of_8` (two objects, test split, every fact right), the same for the other
        splits, tables per fact, and curves.
    """
    reports = check_samples(images, scenes)
    right = right_table(reports)
    kinds = np.array(["two_objects" if s.relation else "one_object" for s in scenes])
    result: dict[str, Any] = {"table": {}, "curves": {}}
    for split in ("train", "test", "zero"):
        for kind in ("one_object", "two_objects"):
            rows = np.flatnonzero((np.array(splits) == split) & (kinds == kind))
            if not len(rows):
                continue
            group = [reports[i] for i in rows]
            result["table"][f"{split}/{kind}"] = fact_table(group, scores[rows])
            result["curves"][f"{split}/{kind}"] = curve(right[rows], scores[rows])
    for key, group_name in (("one_object", "zero/one_object"), ("relation", "test/two_objects")):
        table = result["table"].get(group_name)
        if table:
            result[f"{key}_single"] = table["single"]["all_right"]
            result[f"{key}_best_of_{images.shape[1]}"] = table["best"]["all_right"]
    zero = result["table"].get("zero/two_objects")
    if zero:
        result["relation_zero_single"] = zero["single"]["all_right"]
        result[f"relation_zero_best_of_{images.shape[1]}"] = zero["best"]["all_right"]
    return result


def reconstruction_right(images: torch.Tensor, scenes: Sequence[Scene]) -> float:
    """Share of pictures (N, 3, H, W) in [0, 1] that show every fact of their scene."""
    return summary(check_batch(to_uint8(images), list(scenes)))["all_right"]


def _groups(values: np.ndarray, count: int) -> np.ndarray:
    """(B, N) -> (B, N / count, count)."""
    if values.ndim != 2 or count < 1 or values.shape[1] % count:
        raise UsageError(f"best_of: count must divide N of (B, N), got {count} and {values.shape}")
    return values.reshape(len(values), -1, count)


def all_images(pairs: Pairs) -> torch.Tensor:
    """Every picture of a small set: (N, 3, H, W) in [0, 1]."""
    return to_tensor([pairs.load(i) for i in range(len(pairs))])


@torch.no_grad()
def round_trip(demo: Demo, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reconstructions (N, 3, H, W) in [0, 1] and codes (N, h, w), both on the CPU."""
    tokens = [demo.vae.encode(part.to(demo.device)) for part in images.split(256)]
    decoded = [demo.vae.decode(part).float().cpu() for part in tokens]
    return torch.cat(decoded).clamp(0, 1), torch.cat(tokens).cpu()


def code_use(tokens: torch.Tensor, num_tokens: int) -> dict[str, Any]:
    """How many codes occur, the perplexity of their use, and the sorted shares (64 of them)."""
    counts = torch.bincount(tokens.flatten(), minlength=num_tokens)
    health = codebook_health(counts)
    share = counts.sort(descending=True).values.double() / counts.sum().clamp_min(1)
    points = np.unique(np.geomspace(1, num_tokens, 64).astype(int)) - 1
    return {
        "codes": num_tokens,
        "codes_used": health.used,
        "perplexity": health.perplexity,
        "rank": (points + 1).tolist(),
        "share": share[points].tolist(),
    }


def score_reconstructions(demo: Demo) -> None:
    """PSNR of unseen pictures, for shapes also the share whose facts all survive; code use."""
    result: dict[str, Any] = {}
    sets = [(pairs, all_images(pairs)) for pairs in demo.unseen]
    reconstructions = [round_trip(demo, images)[0] for _, images in sets]
    unseen, reconstructed = torch.cat([images for _, images in sets]), torch.cat(reconstructions)
    if demo.data == "shapes":
        for (pairs, _), images in zip(sets, reconstructions, strict=True):
            split = "zero" if "zero" in pairs.name else "test"
            scenes = [parse(caption) for caption in pairs.captions]
            result[f"reconstruction_{split}"] = reconstruction_right(images, scenes)
        scenes = [parse(caption) for pairs, _ in sets for caption in pairs.captions]
        result["reconstruction"] = reconstruction_right(reconstructed, scenes)
        result["reconstruction_of_true_pictures"] = reconstruction_right(unseen, scenes)
    pairs = demo.train_pairs
    indices = np.random.default_rng(demo.seed).permutation(len(pairs))[:2048]
    train_images = to_tensor([pairs.load(int(i)) for i in indices])
    train_reconstructed, tokens = round_trip(demo, train_images)
    result["psnr_train"] = set_psnr(train_images, train_reconstructed)
    result["code_use"] = code_use(tokens, demo.vae.num_tokens)
    shown = torch.linspace(0, len(unseen) - 1, SHOWN, dtype=torch.float32, device="cpu").long()
    columns = torch.stack([unseen[shown], reconstructed[shown]], 1)
    tiles.save_sheet(demo.space.out / "pictures" / "reconstructions.png", columns)
    demo.space.add_scores({**result, "psnr": set_psnr(unseen, reconstructed)})


def samples_stage(demo: Demo) -> None:
    """Draws, scores with the ranker, compares with the true pictures, and lays out a page."""
    columns = captions_to_draw(demo)
    captions, splits = columns["caption"], columns["split"]
    recipe, space = demo.recipe, demo.space
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
    if demo.data == "emoji":
        truth = all_images(demo.unseen[0])
        target = torch.tensor(columns["target"], dtype=torch.int64, device="cpu")
        ranks = nearest_rank(
            images.flatten(0, 1), target.repeat_interleave(recipe.num_samples), truth
        )
        result = emoji_scores(ranks.view(len(captions), -1).numpy(), ranked)
        originals: torch.Tensor | None = truth[target]
    else:
        scenes = [parse(caption) for caption in captions]
        result = shapes_scores(images, scenes, splits, ranked)
        originals = None
    draw_strips(demo, captions, splits, images, ranked, originals)
    space.add_scores({**result, "captions_drawn": len(captions), "samples": int(ranked.size)})


def draw_samples(demo: Demo, captions: list[str]) -> torch.Tensor:
    """(B, N, h, w) codes on the CPU; a caption that comes again gets other candidates."""
    count = demo.recipe.num_samples
    first = [captions[:i].count(caption) * count for i, caption in enumerate(captions)]
    begin = reported = time.monotonic()
    counts: dict[int, int] = {}
    lock, stop = Lock(), Event()

    def part(rows: slice) -> tuple[torch.Tensor]:
        def progress(number: int, _: int) -> None:
            nonlocal reported
            if stop.is_set():  # after Ctrl-C the process would wait for its threads
                raise Interrupted("samples: stopped")
            with lock:
                counts[rows.start] = number
                now, drawn, total = time.monotonic(), sum(counts.values()), len(captions) * count
                if now - reported > 5 or drawn == total:
                    reported = now
                    left = duration((now - begin) / drawn * (total - drawn))
                    say(f"samples {drawn}/{total} | ETA {left}")

        tokens = demo.pipeline.sample(
            captions[rows],
            count,
            demo.recipe.sampling,
            seed=demo.seed,
            first_candidate=first[rows],
            progress=progress,
        )
        return (tokens.cpu(),)

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
    say(f"demo: {space.samples} must hold this demo's samples, got others; drawing them anew")
    if not space.samples.is_file():
        space.samples.unlink()  # a device or a pipe cannot be replaced by a file
    return None


def draw_strips(
    demo: Demo,
    captions: list[str],
    splits: list[str],
    images: torch.Tensor,
    scores: np.ndarray,
    truth: torch.Tensor | None,
) -> None:
    """A row of tiles per caption, best first (after the true picture, where there is one).

    Writes pictures/strips.png, pictures/samples.png (true picture and best sample of 24 captions,
    with their captions, to be passed on) and work/strips.json.
    """
    order = np.argsort(-scores, axis=1, kind="stable")[:, : ROW - (truth is not None)]
    if truth is None:
        indices = [
            i for split in ("zero", "test") for i in _evenly_spaced(splits, split, SHOWN // 2)
        ]
    else:
        indices = _evenly_spaced(splits, "heldout", SHOWN)
    drawn = torch.stack([images[i][torch.from_numpy(order[i])] for i in indices])
    rows = drawn if truth is None else torch.cat([truth[indices][:, None], drawn], 1)
    tiles.save_sheet(demo.space.out / "pictures" / "strips.png", rows)
    strips = [
        {
            "caption": captions[i],
            "split": splits[i],
            "below": ["true"] * (truth is not None) + [f"{scores[i, j]:.2f}" for j in order[i]],
        }
        for i in indices
    ]
    columns = rows[:, : 1 + (truth is not None)]
    labels = [words for i in indices for words in (captions[i], "drawn")[: columns.shape[1]]]
    scale = tiles.scale_for(demo.recipe.image_size)
    sheet = pictures.grid(columns.flatten(0, 1), columns=8, scale=scale, labels=labels)
    pictures.save_png(demo.space.out / "pictures" / "samples.png", sheet)
    demo.space.write(demo.space.work / "strips.json", {"strips": strips})


def _evenly_spaced(splits: list[str], split: str, count: int) -> list[int]:
    """Indices of up to `count` captions of a split, spread over all of them."""
    rows = [i for i, name in enumerate(splits) if name == split]
    if len(rows) <= count:
        return rows
    return [rows[int(i)] for i in np.linspace(0, len(rows) - 1, count)]
