"""`dalle data dedup`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from dalle.commands import presets
from dalle.commands.data_filter import (
    DRAWN_SIDE,
    PAGE,
    begin_folder,
    thumbnail,
)
from dalle.data import alike
from dalle.data.alike import (
    check_near_features,
    check_near_hashes,
    difference_hash,
    equal,
    groups_in,
    hash_links,
    near_feature_pairs,
)
from dalle.data.augment import center_crop, to_tensor
from dalle.data.codes import require_pictures
from dalle.data.kept import HEAD_FILE, ROWS, write_kept
from dalle.data.pairs import Pairs, captions_of, picture_hashes
from dalle.data.progress import KEPT_SO_FAR, finish, in_blocks, of_data
from dalle.data.sources import absolute
from dalle.devices import pick_device
from dalle.errors import DataError, UsageError, stopped_with
from dalle.pages import contact, group, html_page, picture
from dalle.pictures import save_bytes, save_png
from dalle.pretrained import fingerprint
from dalle.ranker.model import ContrastiveRanker

OWNER = "data dedup"
SHOWN = 60  # groups in the report
ALL = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """Keeps the first of pictures that are alike; `dalle prior train --data OUT` trains on them.

    Nothing is copied: OUT holds which pairs of the set are kept, and report.html with groups of
    pictures that are alike.

    Attributes:
        data: a folder of pictures with captions, of tar shards, a table, or a filtered set.
        out: a folder for the result.
        by: exact takes equal files only; hash also those whose perceptual hashes differ in few
            bits; features also those whose features by a ranker are near.
        distance: bits of 64 in which perceptual hashes may differ.
        colour: of 255, how much the mean colour of each of 8 x 8 cells may differ where hashes are
            near, which see brightness only; 255 compares no colours.
        ranker: model folder of `dalle ranker train`, for features.
        cosine: of features from which on pictures are alike.
        image_size: side in pixels of shapes and emoji.
        seed: which pictures of shapes.
        device: cpu, cuda or auto.
    """

    data: str
    out: Path
    by: Literal["exact", "hash", "features"] = "hash"
    distance: int = 4
    colour: int = 24
    ranker: Path | None = None
    cosine: float = 0.97
    image_size: int = 0
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if (self.by == "features") != (self.ranker is not None):
            got = "none" if self.ranker is None else f"--by {self.by}"
            raise UsageError(f"{OWNER}: ranker must be given with --by features, got {got}")
        check_near_hashes(self.distance, self.colour)
        check_near_features(self.cosine)


def dedup(config: DedupConfig) -> None:
    """Finds the groups, writes what is kept and the report."""
    pairs = presets.open_pairs(config.data, config.image_size, DRAWN_SIDE, config.seed)
    require_pictures(OWNER, pairs)
    begin_folder(OWNER, config.out, config)
    same = equal(list(picture_hashes(pairs)))
    near = iter(()) if config.by == "exact" else _alike(config, pairs)
    copied = np.array(same, np.int64).reshape(-1, 2)
    groups = groups_in(len(pairs), chain([copied], near))
    dropped = {item for members in groups for item in members[1:]}
    copies = {item for _, item in same}
    counts = Counter("same file" if item in copies else "alike" for item in dropped)
    items = [item for item in range(len(pairs)) if item not in dropped]
    rows = np.array([(item, ALL) for item in items], ROWS)
    size = presets.size_of_sets(config.data, config.image_size, DRAWN_SIDE)
    source = {"data": absolute(config.data), "image_size": size, "seed": config.seed}
    rule = {
        "dedup": config.by,
        "distance": config.distance,
        "colour": config.colour,
        "cosine": config.cosine,
    }
    write_kept(OWNER, config.out, source, rule, rows, pairs, counts)
    words = f"{len(items):,} of {len(pairs):,} pairs are kept"
    _write_report(config.out, pairs, words, groups)
    finish(config.out)
    print(f"{OWNER}: {words}, by {config.out / HEAD_FILE}")
    for reason, count in counts.most_common():
        print(f"{OWNER}:   left out {count:,}: {reason}")
    print(f"{OWNER}: {len(groups):,} groups, the largest first in {config.out / PAGE}")


def _alike(config: DedupConfig, pairs: Pairs) -> Iterator[np.ndarray]:
    """The pairs of pictures that are alike by hash or features, in parts of (m, 2)."""
    model = None
    if config.ranker is not None:
        device = pick_device(config.device)
        model = ContrastiveRanker.from_pretrained(config.ranker).to(device)
    width = 0 if model is None else model.config.embed_dim
    dtype = np.dtype(
        [("usable", "?"), ("hash", "<u8"), ("colours", "u1", 192), ("features", "<f4", (width,))]
    )

    def look(items: range) -> np.ndarray:
        found, crops = np.zeros(len(items), dtype), list[np.ndarray]()
        for place, item in enumerate(items):
            try:
                image = pairs.load(item)
                if model is not None:
                    crops.append(center_crop(image, model.config.image_size))
            except DataError:
                continue  # a training leaves it out
            row = found[place : place + 1]
            row["usable"], row["hash"] = True, difference_hash(image)
            row["colours"] = alike.thumbnail(image)
        if crops and model is not None:
            with torch.no_grad():
                images = to_tensor(crops).to(model.log_scale.device)
                features = model.encode_images(images).float().cpu().numpy()
            found["features"][found["usable"]] = features
        return found

    ranker = None if model is None else fingerprint(model)
    depends_on = {"pass": OWNER, **of_data(pairs), "ranker": ranker}
    with stopped_with(f"{OWNER}: stopped by the keyboard; {KEPT_SO_FAR}"):
        every = in_blocks(OWNER, config.out, depends_on, len(pairs), dtype, look, " pictures")
    known = np.flatnonzero(every["usable"])
    found = every[known]
    hashes = np.ascontiguousarray(found["hash"])
    near = hash_links(hashes, config.distance, found["colours"], config.colour)
    yield from (known[part] for part in near)
    if model is not None and len(found):
        features = torch.from_numpy(np.ascontiguousarray(found["features"]))
        yield from (known[part] for part in near_feature_pairs(features, config.cosine))


def _write_report(out: Path, pairs: Pairs, words: str, groups: list[list[int]]) -> None:
    """OUT/report.html: the largest groups, the picture that is kept first."""
    shown = sorted(groups, key=lambda members: (-len(members), members))[:SHOWN]
    blocks = []
    for number, members in enumerate(shown):
        tiles = []
        for k, item in enumerate(members[:6]):
            name = f"examples/{number}-{k}.png"
            save_png(out / name, thumbnail(pairs, item), owner=OWNER)
            below = f"{item}: {captions_of(pairs, item)[0][:120]}"
            tiles.append(picture(name, f"picture {item}", below))
        rest = "" if len(members) <= 6 else f", {len(members) - 6} more"
        blocks.append(group(tiles, f"{len(members)} alike; the first is kept{rest}"))
    title = f"Pictures of {pairs.name} that are alike"
    parts = [f"<p>{words}; {len(groups):,} groups, {len(shown)} shown.</p>", contact(blocks, 2)]
    save_bytes(out / PAGE, html_page(title, parts), owner=OWNER)
