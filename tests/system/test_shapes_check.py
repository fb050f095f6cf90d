"""The checker against true pictures, wrong captions, blur, noise and planted mistakes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dalle.data.shapes import SPLITS, parse
from dalle.data.shapes_check import check, check_batch, read, summary
from dalle.data.shapes_pairs import ShapesPairs, render
from dalle.errors import DataError


@pytest.fixture(scope="module", params=SPLITS)
def pairs(request):
    return ShapesPairs(request.param, seed=5, size=1000)


def test_true_pictures_are_read_right(pairs):
    shares = summary(check_batch(pairs.images, pairs.scenes))
    assert shares["all_right"] >= 0.99, shares


def test_shuffled_captions_are_refused(pairs):
    order = np.random.default_rng(0).permutation(len(pairs))
    # A shuffled caption may be the true one by chance; those pictures are no mistake.
    wrong = [i for i in range(len(pairs)) if pairs.captions[order[i]] != pairs.captions[i]]
    reports = check_batch(pairs.images[wrong], [pairs.scenes[order[i]] for i in wrong])
    # What is left are true descriptions in other words: the mirror image, or a place left out.
    said = [(pairs.scenes[order[i]], pairs.scenes[i]) for i in wrong]
    other = [
        r.all_right
        for r, (stated, true) in zip(reports, said, strict=True)
        if (stated.canonical.things, stated.background) != (true.canonical.things, true.background)
    ]
    assert sum(other) == 0
    assert len(other) > 800


@pytest.mark.parametrize(("radius", "noise", "least"), [(0.6, 8, 0.99), (1.0, 12, 0.97)])
def test_reads_through_blur_and_noise(pairs, radius, noise, least):
    blur = ImageFilter.GaussianBlur(radius * pairs.config.canvas / 32)
    images, scenes = pairs.images[:300], pairs.scenes[:300]
    soft = np.stack([np.asarray(Image.fromarray(image).filter(blur)) for image in images])
    noisy = soft + np.random.default_rng(1).normal(0, noise, soft.shape)
    reports = check_batch(noisy.clip(0, 255).astype(np.uint8), scenes)
    assert summary(reports)["all_right"] >= least


def draw(caption, seed=0):
    return render(parse(caption), np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("shown", "stated", "wrong"),
    [
        (
            "a red circle on a white background",
            "a red circle on a black background",
            {"background"},
        ),
        ("a red circle on a white background", "a red cross on a white background", {"shape"}),
        (
            "a red circle on a white background",
            "a pink circle on a white background",
            {"colour", "shape"},
        ),
        (
            "a red circle at the top left on a black background",
            "a red circle at the bottom left on a black background",
            {"place"},
        ),
        (
            "a red circle left of a blue square on a black background",
            "a red circle right of a blue square on a black background",
            {"relation"},
        ),
        (
            "a red circle above a blue square on a black background",
            "a red square above a blue circle on a black background",
            {"shape"},
        ),
        (
            "a red circle above a blue square on a black background",
            "a red circle on a black background",
            {"count", "colour"},
        ),
    ],
)
def test_each_fact_is_told_apart(shown, stated, wrong):
    for seed in range(5):
        report = check(draw(shown, seed), parse(stated))
        facts = ("background", "count", "colour", "shape", "place", "relation")
        assert {fact for fact in facts if getattr(report, fact) is False} == wrong
        assert not report.all_right


def test_relation_needs_only_colours():
    shown = draw("a red circle above a blue square on a black background")
    report = check(shown, parse("a red cross above a blue triangle on a white background"))
    assert report.relation_right and not report.shape and not report.background
    assert check(shown, parse("a red circle on a black background")).relation_right is None


def test_third_object_of_a_stated_colour_is_counted():
    image = draw("a red circle at the top left on a white background")
    image[16:, 16:] = draw("a red circle at the bottom right on a white background")[16:, 16:]
    report = check(image, parse("a red circle on a white background"))
    assert not report.count and not report.all_right


@pytest.mark.parametrize("kind", ["noise", "plain", "ramp", "blob"])
def test_pictures_of_nothing_are_not_right(kind):
    rng = np.random.default_rng(0)
    images = np.full((50, 32, 32, 3), 250, np.uint8)
    if kind == "noise":
        images = rng.integers(0, 256, images.shape, dtype=np.uint8)
    elif kind == "ramp":
        images[:] = np.linspace(0, 255, 32)[None, None, :, None]
    elif kind == "blob":  # a red smear without an outline
        images[:, 10:22, ::3] = (216, 38, 38)
    scenes = [parse(f"a red {s} on a white background") for s in ("circle", "cross")] * 25
    assert not any(report.all_right for report in check_batch(images, scenes))


@pytest.mark.parametrize("size", [32, 40, 48, 64])
def test_other_canvases_read_as_well(size):
    pairs = ShapesPairs("zero", image_size=size, size=200)
    assert summary(check_batch(pairs.images, pairs.scenes))["all_right"] >= 0.99


def test_reading_without_a_caption():
    reading = read(draw("a red circle above a blue square on a black background")[None])[0]
    assert reading.background == "black" and reading.pieces == 2
    assert reading.outlines == {"red": "circle", "blue": "square"}
    assert reading.centres["red"][1] < reading.centres["blue"][1]


def test_refuses_other_shapes():
    scene = parse("a red circle on a white background")
    for shape in ((32, 30, 3), (16, 16, 3), (32, 32)):
        with pytest.raises(DataError, match="shapes: images must"):
            check(np.zeros(shape, np.uint8), scene)
    with pytest.raises(DataError, match="scenes must be 2, got 1"):
        check_batch(np.zeros((2, 32, 32, 3), np.uint8), [scene])
