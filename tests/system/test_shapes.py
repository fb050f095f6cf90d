"""The procedural set: grammar, splits, drawing, pairs."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from dalle.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    PLACES,
    RELATIONS,
    SHAPES,
    SPLITS,
    ShapesConfig,
    captions,
    parse,
    scenes,
    split_of,
    split_scenes,
    zero_pairs,
)
from dalle.data.shapes_pairs import ShapesPairs, lattice_points, render
from dalle.data.sources import load_pairs
from dalle.errors import UsageError


def test_the_set_is_large_enough():
    assert len(SHAPES) >= 4 and len(COLOURS) >= 6 and len(RELATIONS) == 4 and len(BACKGROUNDS) >= 2
    assert len(set(scene.caption for scene in scenes())) == len(scenes()) == 60 + 240 + 6000


def test_captions_parse_back_into_their_facts():
    for scene in scenes():
        assert parse(scene.caption) == scene
    assert parse("  A RED circle on a white background ").caption.startswith("a red circle")


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a dog",
        "a red circle",
        "a red circle on a green background",
        "a red circle left of a blue square at the top left on a white background",
        "a red circle left of a red square on a white background",
    ],
)
def test_parse_refuses_other_captions(caption):
    with pytest.raises(UsageError, match="shapes: "):
        parse(caption)


def test_splits_partition_the_captions():
    parts = [set(captions(split)) for split in SPLITS]
    assert sum(map(len, parts)) == len(scenes())
    assert len(set.union(*parts)) == len(scenes())


def test_zero_pairs_are_new_and_their_halves_are_not():
    held = zero_pairs()
    assert len(held) == 4
    seen = {thing for split in ("train", "test") for s in split_scenes(split) for thing in s.things}
    assert not seen & held
    assert {t.colour for t in seen} == set(COLOURS) and {t.shape for t in seen} == set(SHAPES)
    for scene in split_scenes("zero"):
        assert held & set(scene.things)
    train = {thing for scene in split_scenes("train") for thing in scene.things}
    assert len(train) == 30 - 4


def attribute_pairs(scene):
    """Every two attributes that a caption ties together, roles included."""
    found = set()
    for role, thing in enumerate(scene.things):
        own = [thing.colour, thing.shape, scene.background, scene.place, scene.relation]
        found |= {(role, a, b) for a, b in product(own, own) if a and b and a != b}
    if scene.relation:
        first, second = scene.things
        found |= {("both", a, b) for a in (first.colour, first.shape)
                  for b in (second.colour, second.shape)}  # fmt: skip
    return found


def test_test_split_is_held_out_for_every_kind_and_its_pairs_are_seen():
    train, test = split_scenes("train"), split_scenes("test")
    seen = set().union(*(attribute_pairs(s) for s in train))
    for kind in KINDS:
        assert sum(s.kind == kind for s in test) >= 8
        assert 0.05 < sum(s.kind == kind for s in test) / sum(s.kind == kind for s in train) < 0.25
    for scene in test:
        assert attribute_pairs(scene) <= seen, scene.caption


def test_a_caption_and_its_mirror_image_share_a_split():
    for scene in scenes():
        if scene.relation:
            words = scene.canonical.caption
            assert split_of(parse(words)) == split_of(scene)
            assert scene.canonical.relation in ("left of", "above")
    one = parse("a red circle right of a blue cross on a black background").canonical
    assert one.caption == "a blue cross left of a red circle on a black background"


def test_splits_do_not_drift():
    """Numbers of record: a change here makes published scores incomparable."""
    assert [len(captions(split)) for split in SPLITS] == [4264, 492, 1544]
    names = sorted(f"{thing.colour} {thing.shape}" for thing in zero_pairs())
    assert names == ["blue square", "green diamond", "pink circle", "yellow cross"]


def test_pictures_are_a_pure_function_of_the_seed():
    first, again = ShapesPairs("test", seed=2, size=20), ShapesPairs("test", seed=2, size=40)
    assert (first.images == again.images[:20]).all()
    assert list(first.captions) == list(again.captions[:20])
    other = ShapesPairs("test", seed=3, size=20)
    assert list(other.captions) != list(first.captions)


def test_pairs_hold_their_split_and_every_kind():
    for split in SPLITS:
        pairs = ShapesPairs(split, size=200)
        assert set(pairs.captions) <= set(captions(split))
        assert {scene.kind for scene in pairs.scenes} == set(KINDS)
        assert [scene.caption for scene in pairs.scenes] == list(pairs.captions)


def test_load_pairs_opens_shapes():
    pairs = load_pairs("shapes", image_size=64, split="zero", seed=1)
    assert pairs.image_size == 64 and len(pairs) == 2000
    assert pairs.load(3).shape == (64, 64, 3) and pairs.load(3).dtype == np.uint8
    assert "pink circle" in " ".join(pairs.captions)


@pytest.mark.parametrize("relation", RELATIONS)
def test_objects_stand_as_the_caption_says(relation):
    scene = parse(f"a red circle {relation} a blue cross on a white background")
    (x, y), (x2, y2) = lattice_points(scene)
    gaps = {"left of": x2 - x, "right of": x - x2, "above": y2 - y, "below": y - y2}
    assert gaps[relation] == 2
    assert sorted(gaps.values()) == [-2, 0, 0, 2]


def test_an_object_without_a_place_stands_in_the_middle():
    assert lattice_points(parse("a red circle on a white background")) == [(1, 1)]
    points = [lattice_points(parse(f"a red circle {p} on a white background"))[0] for p in PLACES]
    assert len(set(points)) == len(PLACES) and (1, 1) not in points


@pytest.mark.parametrize("canvas", [24, 32, 40, 64])
def test_jitter_stays_inside_the_canvas(canvas):
    config = ShapesConfig(canvas=canvas, size=14, size_jitter=1, place_jitter=0.5)
    scene = parse("a red square at the top left on a white background")
    rng = np.random.default_rng(0)
    for _ in range(20):
        image = render(scene, rng, config)
        assert image.shape == (canvas, canvas, 3)
        red = np.abs(image.astype(int) - COLOURS["red"]).max(2) < 8
        assert red[: canvas // 2, : canvas // 2].sum() == red.sum() > (0.3 * canvas) ** 2


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"canvas": 30}, "canvas"),
        ({"canvas": 16}, "canvas"),
        ({"size": 20.0}, "size"),
        ({"place_jitter": 3.0}, "place_jitter"),
        ({"num_zero_pairs": 24}, "num_zero_pairs"),
        ({"test_share": 0.0}, "test_share"),
        ({"kind_weights": (0, 0, 0)}, "kind_weights"),
    ],
)
def test_config_refuses(options, name):
    with pytest.raises(UsageError, match=f"shapes: {name} must be"):
        ShapesConfig(**options)
