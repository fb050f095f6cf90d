"""Reads a picture of `shapes` back into facts and compares them with a caption.

The reader knows the palette and the outlines, but not the caption. It finds the background by the
border and the colours by solid areas. Each colour gets a mask, whose connected pieces are counted.
An outline is that of the nearest template; places and relations follow from centres. It works on
batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dalle.data.shapes import BACKGROUNDS, COLOURS, PLACES, RELATIONS, SHAPES, Scene
from dalle.data.shapes_pairs import BASE, LATTICE, coverage
from dalle.errors import DataError

SOLID_DISTANCE = 70.0  # RGB distance to a palette entry within which a pixel is surely of it
SOLID_CORE = 3  # 3 x 3 blocks of sure pixels a colour needs: the thin rim where red blends into
# white passes close to pink, and must not count as a pink object
PIECE_AREA = 12.0  # covered pixels a connected piece needs to count as an object
BORDER_DISTANCE = 60.0
MISFIT = 0.5  # squared distance to the best template, as a share of the template's own square
WINDOW = 10  # half the side of the square around a centre that is compared with templates
BANK_SIZES = range(44, 61, 2)  # 11 to 15 pixels, in quarters

MIN_SIDE = 24

FACTS = ("background", "count", "colour", "shape", "place", "relation")


@dataclass(frozen=True)
class ShapesReport:
    """Which facts of a caption a picture shows. None: the caption does not state this fact.

    Attributes:
        background: the border has the stated colour.
        count: as many separate objects as stated.
        colour: exactly the stated colours are there.
        shape: each stated colour has the stated outline.
        place: the object is at the stated place.
        relation: the two stated colours stand as stated, with any outlines.
    """

    background: bool
    count: bool
    colour: bool
    shape: bool
    place: bool | None
    relation: bool | None

    @property
    def relation_right(self) -> bool | None:
        """The relation alone, read from the colours; None for captions without one."""
        return self.relation

    @property
    def all_right(self) -> bool:
        """Every stated fact holds."""
        return all(getattr(self, fact) is not False for fact in FACTS)


@dataclass(frozen=True)
class Reading:
    """What a picture shows: per colour its outline ("" for none of the set) and centre (x, y)."""

    background: str
    pieces: int
    outlines: dict[str, str]
    centres: dict[str, tuple[float, float]]


def _to_base(images: np.ndarray) -> np.ndarray:
    """(N, S, S, 3) uint8 -> (N, 32, 32, 3) float32 by averaging or repeating pixels."""
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
        raise DataError(f"shapes: images must be (N, S, S, 3), got {images.shape}")
    side = images.shape[1]
    if side % 8 or side < MIN_SIDE:
        raise DataError(f"shapes: images must have a side of {MIN_SIDE} or more, by 8, got {side}")
    if side == BASE:
        return images.astype(np.float32)
    common = int(np.lcm(side, BASE))
    rows = images.astype(np.float32).repeat(common // side, 1).repeat(common // side, 2)
    step = common // BASE
    averaged: np.ndarray = rows.reshape(len(images), BASE, step, BASE, step, 3).mean((2, 4))
    return averaged


def _nearest(colours: np.ndarray, palette: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the nearest palette entry and the distance to it, over the last axis."""
    distance = np.linalg.norm(colours[..., None, :] - palette, axis=-1)
    return distance.argmin(-1), distance.min(-1)


def _cores(mask: np.ndarray) -> np.ndarray:
    """(N, 32, 32) bool -> number of all-True 3 x 3 blocks, (N,)."""
    rows = mask[:, :-2] & mask[:, 1:-1] & mask[:, 2:]
    blocks: np.ndarray = (rows[:, :, :-2] & rows[:, :, 1:-1] & rows[:, :, 2:]).sum((1, 2))
    return blocks


def _count_pieces(mask: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(M, 32, 32) bool and covered area per pixel -> number of 4-connected pieces, (M,)."""
    count, side = len(mask), mask.shape[1]
    labels = np.where(mask, np.arange(1, side * side + 1).reshape(side, side), 0)
    while True:
        padded = np.pad(labels, ((0, 0), (1, 1), (1, 1)))
        around = np.maximum.reduce(
            [padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]]
        )
        grown = np.where(mask, np.maximum(labels, around), 0)
        if (grown == labels).all():
            break
        labels = grown
    flat = labels + np.arange(count)[:, None, None] * (side * side + 1)
    area = np.bincount(flat.ravel(), weight.ravel(), count * (side * side + 1))
    pieces: np.ndarray = (area.reshape(count, -1)[:, 1:] >= PIECE_AREA).sum(1)
    return pieces


@lru_cache
def _bank() -> tuple[np.ndarray, np.ndarray]:
    """Templates (T, 400) with their centre of mass in the middle pixel's square, and shape ids."""
    rows, ids = [], []
    for shape_id, shape in enumerate(SHAPES):
        for extent in BANK_SIZES:
            for dx in range(-2, 3):
                for dy in range(-2, 3):
                    drawn = coverage(shape, extent, dx, dy)
                    pad = WINDOW + 4 - len(drawn) // 2
                    rows.append(_window(np.pad(drawn, pad)).ravel())
                    ids.append(shape_id)
    return np.stack(rows), np.array(ids)


def _centre(mask: np.ndarray) -> tuple[float, float]:
    """Centre of mass (x, y) in pixels from the top left corner."""
    total = max(float(mask.sum()), 1e-6)
    steps = np.arange(len(mask)) + 0.5
    return float(mask.sum(0) @ steps / total), float(mask.sum(1) @ steps / total)


def _window(mask: np.ndarray) -> np.ndarray:
    """The (20, 20) square around the pixel corner nearest to the centre of mass."""
    x, y = (round(c) for c in _centre(mask))
    padded = np.pad(mask, WINDOW)
    return padded[y : y + 2 * WINDOW, x : x + 2 * WINDOW]


def read(images: np.ndarray) -> list[Reading]:
    """Reads pictures.

    Args:
        images: (N, S, S, 3) uint8 or float in 0 .. 255, S a multiple of 8 and at least 24.
    """
    pixels = _to_base(np.asarray(images))
    names, grounds = list(COLOURS), list(BACKGROUNDS)
    palette = np.array([*COLOURS.values(), *BACKGROUNDS.values()], np.float32)
    frame = np.concatenate(
        [pixels[:, 0], pixels[:, -1], pixels[:, 1:-1, 0], pixels[:, 1:-1, -1]], 1
    )
    ground, border_distance = _nearest(np.median(frame, 1), palette[len(names) :])
    ground_colour = palette[len(names) :][ground]
    nearest, distance = _nearest(pixels, palette)
    solid = np.where(distance < SOLID_DISTANCE, nearest, -1)
    present = np.stack([_cores(solid == c) >= SOLID_CORE for c in range(len(names))], 1)

    # One mask per present colour: how far a pixel lies from the background towards it, where it is
    # nearer to that line than to the lines of the other colours present.
    picture, colour = np.nonzero(present)
    towards = palette[colour] - ground_colour[picture]
    relative = pixels[picture] - ground_colour[picture][:, None, None]
    share = np.einsum("mhwc,mc->mhw", relative, towards) / (towards**2).sum(1)[:, None, None]
    share = share.clip(0, 1)
    residual = np.linalg.norm(relative - share[..., None] * towards[:, None, None], axis=-1)
    best = np.full((len(pixels), BASE, BASE), np.inf, np.float32)
    np.minimum.at(best, picture, residual)
    masks = np.where(residual <= best[picture], share, 0.0)
    pieces = np.zeros(len(pixels), int)
    windows = np.zeros((len(masks), (2 * WINDOW) ** 2), np.float32)
    centres = []
    if len(masks):
        np.add.at(pieces, picture, _count_pieces(masks > 0.5, masks))
        for m, mask in enumerate(masks):
            mask = np.where(mask > 0.2, mask, 0)
            centres.append(_centre(mask))
            windows[m] = _window(mask).ravel()
    bank, ids = _bank()
    square = (bank**2).sum(1)
    misfit = ((windows**2).sum(1)[:, None] - 2 * windows @ bank.T + square) / square
    choice = misfit.argmin(1)
    readings = [
        Reading(grounds[g] if d < BORDER_DISTANCE else "", int(p), {}, {})
        for g, d, p in zip(ground, border_distance, pieces, strict=True)
    ]
    for m, (i, c) in enumerate(zip(picture, colour, strict=True)):
        fits = misfit[m, choice[m]] < MISFIT
        readings[i].outlines[names[c]] = SHAPES[ids[choice[m]]] if fits else ""
        readings[i].centres[names[c]] = centres[m]
    return readings


def _lattice_point(x: float, y: float) -> tuple[int, int]:
    lattice = np.array(LATTICE)
    return int(np.abs(lattice - x).argmin()), int(np.abs(lattice - y).argmin())


def _compare(reading: Reading, scene: Scene) -> ShapesReport:
    stated = {thing.colour: thing.shape for thing in scene.things}
    centres = [reading.centres.get(colour) for colour in stated]
    place = relation = None
    if scene.place:
        place = centres[0] is not None and _lattice_point(*centres[0]) == PLACES[scene.place]
    if scene.relation:
        relation = False
        if len(centres) == 2 and centres[0] is not None and centres[1] is not None:
            along = np.array(RELATIONS[scene.relation])
            gap = np.array(centres[0]) - np.array(centres[1])
            ahead = float(gap @ along)
            across = float(np.abs(gap @ along[::-1]))
            relation = ahead > 4 and ahead > across
    return ShapesReport(
        background=reading.background == scene.background,
        count=reading.pieces == len(scene.things),
        colour=set(reading.outlines) == set(stated),
        shape=all(reading.outlines.get(c) == s for c, s in stated.items()),
        place=place,
        relation=relation,
    )


def check_batch(images: np.ndarray, scenes: Sequence[Scene]) -> list[ShapesReport]:
    """Checks picture i against scene i.

    Args:
        images: (N, S, S, 3) uint8, S a multiple of 8 and at least 24.
        scenes: N scenes.

    Raises:
        DataError: shapes or counts do not fit.
    """
    if len(images) != len(scenes):
        raise DataError(f"shapes: scenes must be {len(images)}, got {len(scenes)}")
    reports = []
    for start in range(0, len(scenes), 256):  # bounds the memory of a large batch
        readings = read(np.asarray(images)[start : start + 256])
        part = scenes[start : start + 256]
        reports += [_compare(r, s) for r, s in zip(readings, part, strict=True)]
    return reports


def check(image: np.ndarray, scene: Scene) -> ShapesReport:
    """Checks one (S, S, 3) picture against the facts of a caption."""
    return check_batch(image[None], [scene])[0]


def summary(reports: Sequence[ShapesReport]) -> dict[str, float]:
    """Share of right answers per fact among the captions that state it, and `all_right`."""
    shares = {}
    for fact in (*FACTS, "all_right"):
        values = [getattr(r, fact) for r in reports if getattr(r, fact) is not None]
        if values:
            shares[fact] = float(np.mean(values))
    return shares
