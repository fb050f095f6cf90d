"""The procedural set `shapes`: grammar, facts and splits.

Captions are "a red circle on a white background", "a red circle at the top left on a white
background" and "a red circle left of a blue square on a white background". A `Scene` holds the
facts of a caption; `shapes_pairs` draws them and `shapes_check` reads them back from a picture. A
caption says all that a picture shows, except a little jitter: an object without a place is in the
middle, and two objects are in one row or one column through it.

Splits, by the facts and not by the wording (a caption and its mirror image "a blue square right of
a red circle" describe the same pictures, so they fall on the same side):
- `zero`: every caption with one of the held-out colour-shape pairs; those pairs occur in no other
  split, in any role.
- `test`: a tenth of the remaining captions of every kind, by a stable hash.
- `train`: the rest.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from dalle.configs import Named, check_numbers, integer
from dalle.errors import UsageError

SPLITS = ("train", "test", "zero")
KINDS = ("one", "placed", "relation")
SHAPES = ("square", "circle", "triangle", "cross", "diamond")
COLOURS = {
    "red": (216, 38, 38),
    "green": (40, 160, 64),
    "blue": (34, 60, 210),
    "yellow": (246, 206, 24),
    "cyan": (60, 205, 225),
    "pink": (236, 60, 180),
}
BACKGROUNDS = {"white": (250, 250, 250), "black": (14, 14, 14)}
PLACES = {  # word -> (column, row) of the 3 x 3 lattice
    "at the top left": (0, 0),
    "at the top right": (2, 0),
    "at the bottom left": (0, 2),
    "at the bottom right": (2, 2),
}
RELATIONS = {  # word -> (columns, rows) from the second object to the first
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
MIRROR = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True, kw_only=True)
class ShapesConfig(Named):
    """What the set contains. Lengths are in pixels of a 32-pixel canvas and scale with it.

    Attributes:
        canvas: side of a picture in pixels, a multiple of 8, at least 24.
        size: extent of an object.
        size_jitter: the extent is uniform in size -/+ size_jitter.
        place_jitter: each centre is off its lattice point by up to this, uniformly, along x and y.
            Centres lie on a lattice of 3 x 3 points 8 pixels apart (6 at a canvas of 24), so that
            with 2 pixels a token an object meets the token grid in one way wherever it stands.
        num_zero_pairs: colour-shape pairs of the zero-shot split; 4 of the 30 by default.
        test_share: share of captions held out in `test`.
        kind_weights: how often a picture is of each kind (one, placed, relation).
    """

    canvas: int = 24
    size: float = 13.0
    size_jitter: float = 0.5
    place_jitter: float = 0.25
    num_zero_pairs: int = 4
    test_share: float = 0.1
    kind_weights: tuple[float, float, float] = (0.1, 0.25, 0.65)

    def __post_init__(self) -> None:
        check_numbers("shapes", self)
        requirements = (
            ("canvas", self.canvas >= 24 and self.canvas % 8 == 0, "a multiple of 8, at least 24"),
            ("size_jitter", self.size_jitter >= 0, "0 or more"),
            (
                "size",
                9 <= self.size - self.size_jitter <= self.size + self.size_jitter <= 15,
                "9 to 15 with its jitter",
            ),
            ("place_jitter", 0 <= self.place_jitter <= 1, "0 to 1"),
            ("num_zero_pairs", 1 <= self.num_zero_pairs <= 4, "1 to 4"),
            ("test_share", 0 < self.test_share < 0.5, "above 0 and below 0.5"),
            (
                "kind_weights",
                min(self.kind_weights) >= 0 and sum(self.kind_weights) > 0,
                "three weights, not all 0",
            ),
        )
        for name, holds, requirement in requirements:
            if not holds:
                raise UsageError(f"shapes: {name} must be {requirement}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Thing:
    """One object: a key of COLOURS and one of SHAPES."""

    colour: str
    shape: str


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The facts of one caption.

    Attributes:
        background: a key of BACKGROUNDS.
        things: one object, or two of different colours (first, second).
        relation: a key of RELATIONS for two objects, how the first stands to the second; else None.
        place: a key of PLACES for a placed object; else None.
    """

    background: str
    things: tuple[Thing, ...]
    relation: str | None = None
    place: str | None = None

    @property
    def kind(self) -> str:
        return "relation" if self.relation else "placed" if self.place else "one"

    @property
    def caption(self) -> str:
        words = [f"a {thing.colour} {thing.shape}" for thing in self.things]
        middle = f" {self.relation} {words[1]}" if self.relation else ""
        place = f" {self.place}" if self.place else ""
        return f"{words[0]}{middle}{place} on a {self.background} background"

    @property
    def canonical(self) -> Scene:
        """The same facts in one fixed order: "right of" and "below" are mirrored."""
        if self.relation not in ("right of", "below"):
            return self
        return Scene(
            background=self.background,
            things=self.things[::-1],
            relation=MIRROR[self.relation],
        )


_THING = rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(
    rf"{_THING}(?: ({'|'.join(RELATIONS)}) {_THING}| ({'|'.join(PLACES)}))?"
    rf" on a ({'|'.join(BACKGROUNDS)}) background"
)


def parse(caption: str) -> Scene:
    """Reads a caption back into its facts.

    Raises:
        UsageError: the caption is not one of this grammar.
    """
    match = _CAPTION.fullmatch(caption.strip().lower())
    if match is None:
        raise UsageError(f"shapes: caption must follow the grammar of the set, got {caption!r}")
    colour, shape, relation, colour2, shape2, place, background = match.groups()
    if relation and colour == colour2:
        raise UsageError(f"shapes: two objects must differ in colour, got {caption!r}")
    things = (Thing(colour, shape), Thing(colour2, shape2)) if relation else (Thing(colour, shape),)
    return Scene(background=background, things=things, relation=relation, place=place)


@lru_cache
def zero_pairs(num_pairs: int = 4) -> frozenset[Thing]:
    """Colour-shape pairs in no training caption; no colour and no shape twice among them."""
    candidates = [Thing(colour, shape) for colour, shape in product(COLOURS, SHAPES)]
    held_out: list[Thing] = []
    num_pairs = integer("shapes", "num_pairs", num_pairs, 0)
    for thing in sorted(candidates, key=lambda t: zlib.crc32(f"{t.colour} {t.shape}".encode())):
        clash = any(thing.colour == t.colour or thing.shape == t.shape for t in held_out)
        if not clash and len(held_out) < num_pairs:
            held_out.append(thing)
    return frozenset(held_out)


def scenes() -> list[Scene]:
    """Every scene of the grammar: 60 of one object, 240 placed, 6,000 with a relation."""
    things = [Thing(colour, shape) for colour, shape in product(COLOURS, SHAPES)]
    result = []
    for background in BACKGROUNDS:
        for thing in things:
            result.append(Scene(background=background, things=(thing,)))
            result += [Scene(background=background, things=(thing,), place=p) for p in PLACES]
        for first, relation, second in product(things, RELATIONS, things):
            if first.colour != second.colour:
                result.append(
                    Scene(background=background, things=(first, second), relation=relation)
                )
    return result


def split_of(scene: Scene, config: ShapesConfig | None = None) -> str:
    """The split a scene belongs to: "train", "test" or "zero"."""
    config = config or ShapesConfig()
    if zero_pairs(config.num_zero_pairs) & set(scene.things):
        return "zero"
    fraction = zlib.crc32(scene.canonical.caption.encode()) / 2**32
    return "test" if fraction < config.test_share else "train"


def split_scenes(split: str, config: ShapesConfig | None = None) -> tuple[Scene, ...]:
    """The scenes of one split, in a fixed order.

    Raises:
        UsageError: unknown split.
    """
    if split not in SPLITS:
        raise UsageError(f"shapes: split must be one of {', '.join(SPLITS)}, got {split!r}")
    return _split_scenes(split, config)


@lru_cache
def _split_scenes(split: str, config: ShapesConfig | None) -> tuple[Scene, ...]:
    return tuple(scene for scene in scenes() if split_of(scene, config) == split)


def captions(split: str, config: ShapesConfig | None = None) -> list[str]:
    """The captions of one split, in a fixed order."""
    return [scene.caption for scene in split_scenes(split, config)]
