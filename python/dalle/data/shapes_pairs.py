"""Drawing the scenes of `shapes`, and the set as Pairs."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from dalle.configs import integer, seed_number
from dalle.data.pairs import ArrayPairs
from dalle.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    PLACES,
    RELATIONS,
    SPLITS,
    Scene,
    ShapesConfig,
    split_scenes,
)
from dalle.data.source import Source
from dalle.errors import UsageError
from dalle.memory import require_memory

STEPS = 4  # positions and sizes are multiples of 1/4 pixel; pictures are supersampled 4 x 4
BASE = 32  # lengths of the configuration are in pixels of this canvas
LATTICE = (8.0, 16.0, 24.0)
DEFAULT_SIZES = {"train": 20_000, "test": 2_000, "zero": 2_000}


@lru_cache(maxsize=4096)
def coverage(shape: str, extent: int, dx: int, dy: int) -> np.ndarray:
    """How much of each pixel a shape covers.

    Args:
        shape: a key of SHAPES.
        extent: side of the bounding square, in quarters of a pixel.
        dx, dy: where its centre lies right of and below the window's centre, in quarters.

    Returns:
        (S, S) float32 in [0, 1]; the window's side S is even and holds the shape with a margin.
    """
    half = extent // (2 * STEPS) + 3
    sub = (np.arange(2 * half * STEPS) + 0.5) / STEPS - half
    x, y = np.meshgrid(sub - dx / STEPS, sub - dy / STEPS)
    r = extent / STEPS / 2
    if shape == "square":
        inside = (np.abs(x) < r * 0.94) & (np.abs(y) < r * 0.94)
    elif shape == "circle":
        inside = x**2 + y**2 < r**2
    elif shape == "triangle":
        inside = (y < r) & (x > -r) & (y > x)
    elif shape == "cross":
        bar = 0.4 * r
        box = np.maximum(np.abs(x), np.abs(y)) < r
        inside = box & ((np.abs(x) < bar) | (np.abs(y) < bar))
    elif shape == "diamond":
        inside = np.abs(x) + np.abs(y) < r
    else:
        raise UsageError(f"shapes: shape must be one of the set's, got {shape!r}")
    side = 2 * half
    mean: np.ndarray = inside.reshape(side, STEPS, side, STEPS).mean((1, 3), dtype=np.float32)
    mean.setflags(write=False)
    return mean


def lattice_points(scene: Scene) -> list[tuple[int, int]]:
    """The lattice point (column, row) of each object."""
    if scene.place:
        return [PLACES[scene.place]]
    if scene.relation is None:
        return [(1, 1)]
    column, row = RELATIONS[scene.relation]
    return [(1 + column, 1 + row), (1 - column, 1 - row)]


def render(
    scene: Scene, rng: np.random.Generator, config: ShapesConfig | None = None
) -> np.ndarray:
    """Draws one picture of a scene, with jitter from `rng`.

    Args:
        scene: the facts.
        rng: jitter of places and sizes.
        config: canvas, size, jitter.

    Returns:
        (canvas, canvas, 3) uint8, anti-aliased.
    """
    config = config or ShapesConfig()
    scale = config.canvas / BASE
    canvas = np.empty((config.canvas, config.canvas, 3), np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    for thing, point in zip(scene.things, lattice_points(scene), strict=True):
        size = config.size + rng.uniform(-1, 1) * config.size_jitter
        offset = rng.uniform(-1, 1, 2) * config.place_jitter
        centre = [(LATTICE[p] + o) * scale for p, o in zip(point, offset, strict=True)]
        extent = round(size * scale * STEPS)
        pixel = [round(c) for c in centre]
        dx, dy = (round((c - w) * STEPS) for c, w in zip(centre, pixel, strict=True))
        alpha = coverage(thing.shape, extent, dx, dy)
        half = len(alpha) // 2
        low = [max(w - half, 0) for w in pixel]
        high = [min(w + half, config.canvas) for w in pixel]
        piece = alpha[
            low[1] - pixel[1] + half : high[1] - pixel[1] + half,
            low[0] - pixel[0] + half : high[0] - pixel[0] + half,
            None,
        ]
        view = canvas[low[1] : high[1], low[0] : high[0]]
        view += piece * (np.array(COLOURS[thing.colour], np.float32) - view)
    return np.rint(canvas).astype(np.uint8)


class ShapesPairs(ArrayPairs):
    """Pictures of `shapes` with their captions and facts, drawn on construction.

    Picture i of a split is a pure function of (split, seed, i, config): its kind by
    `config.kind_weights`, then a scene of that kind, then a drawing of it.

    Args:
        split: "train", "test" or "zero".
        image_size: canvas in pixels; 24 where neither this nor `config` says otherwise.
        seed: which pictures.
        size: how many; 20,000 for train, 2,000 for the others by default.
        config: what the set contains; its canvas is replaced by `image_size` where that is given.

    Attributes:
        scenes: the facts of each picture.

    Raises:
        UsageError: unknown split, size below 1, bad canvas or seed.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        image_size: int | None = None,
        seed: int = 0,
        size: int | None = None,
        config: ShapesConfig | None = None,
    ) -> None:
        config = config or ShapesConfig()
        seed = seed_number("shapes", seed)
        if image_size is not None and image_size != config.canvas:
            config = replace(config, canvas=image_size)
        groups: dict[str, list[Scene]] = {kind: [] for kind in KINDS}
        for scene in split_scenes(split, config):
            groups[scene.kind].append(scene)
        size = DEFAULT_SIZES[split] if size is None else integer("shapes", "size", size)
        if size < 1:
            raise UsageError(f"shapes: size must be at least 1, got {size}")
        weights = np.array(config.kind_weights) / sum(config.kind_weights)
        pictures = size * (3 * config.canvas**2 + 200)
        require_memory(
            "shapes",
            pictures,
            f"{size} pictures of {config.canvas} pixels",
            "take smaller pictures, or fewer",
        )
        images = np.empty((size, config.canvas, config.canvas, 3), np.uint8)
        self.config = config
        self.split = split
        self.scenes: list[Scene] = []
        for i in range(size):
            rng = np.random.default_rng((SPLITS.index(split), seed, i))
            group = groups[KINDS[int(np.searchsorted(weights.cumsum(), rng.random(), "right"))]]
            scene = group[int(rng.integers(len(group)))]
            images[i] = render(scene, rng, config)
            self.scenes.append(scene)
        super().__init__(f"shapes ({split})", images, [scene.caption for scene in self.scenes])


def load_shapes(image_size: int, split: str, seed: int) -> ShapesPairs:
    """`ShapesPairs` of a split's own number of pictures."""
    return ShapesPairs(split, image_size=image_size, seed=seed)


SOURCE = Source(name="shapes", opens=load_shapes, held_out="test", recipe="shapes")
