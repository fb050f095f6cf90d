"""`dalle data filter`, `dedup` and `stats`: what is kept, why not, and that trainings take it."""

from __future__ import annotations

import json
import shlex
import tracemalloc
from functools import partial
from html import escape

import numpy as np
import pytest
import torch
from PIL import Image

from dalle.commands.data_dedup import DedupConfig, dedup
from dalle.commands.data_filter import FilterConfig, filter_pairs
from dalle.commands.data_stats import StatsConfig, stats
from dalle.data import alike, sources
from dalle.data.alike import (
    difference_hash,
    equal,
    groups_in,
    groups_of,
    hash_links,
    near_features,
    near_hash_pairs,
    near_hashes,
)
from dalle.data.filters import CaptionFilter, FilterRule, content_words, picture_reason
from dalle.data.pairs import captions_of
from dalle.data.shapes_pairs import ShapesPairs
from dalle.data.sources import load_pairs
from dalle.errors import DataError, UsageError

ENGLISH = "a brown dog runs over the green grass"
PAIRS = [  # caption, size, reason
    (ENGLISH, (40, 40), ""),
    ("red dog", (40, 40), "caption too short"),
    ("photographed on 12 May 2014", (40, 40), "caption is boilerplate"),
    ("ein brauner Hund läuft über das grüne Gras", (40, 40), "caption is not English"),
    ("two people walk along a quiet beach", (90, 40), "aspect ratio out of range"),
    ("two people walk along a quiet beach", (80, 40), ""),
    ("a small picture of an old house", (20, 20), "picture too small"),
    ("the picture of a house that is broken", None, "picture does not open"),
    (f"red dog\n{ENGLISH}\nphotographed on 2014-05-12", (40, 40), ""),
]


def write(folder, i, caption, image):
    path = folder / f"{i:02d}.png"
    if image is None:
        path.write_bytes(b"\x89PNG\r\n\x1a\n broken")
    else:
        image.save(path)
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def noise(size, seed):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (9, 9, 3), np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    (home / "pairs").mkdir()
    for i, (caption, size, _) in enumerate(PAIRS):
        write(home / "pairs", i, caption, None if size is None else noise(size, i))
    (home / "copies").mkdir()
    for i in range(4):
        write(home / "copies", i, ENGLISH, noise((64, 64), i))
    write(home / "copies", 4, "the same file again", noise((64, 64), 1))
    near = noise((64, 64), 2).resize((48, 48)).point(lambda v: min(255, v + 9))
    write(home / "copies", 5, "smaller and brighter", near)
    return home


def test_pairs_are_left_out_by_the_first_reason_and_counted(home, tmp_path, capsys):
    rule = FilterRule(min_side=30)
    filter_pairs(FilterConfig(data=str(home / "pairs"), out=tmp_path / "kept", rule=rule))
    kept = load_pairs(str(tmp_path / "kept"), image_size=0)
    source = load_pairs(str(home / "pairs"), image_size=0)
    wanted = [f"{i:02d}.png" for i, (_, _, reason) in enumerate(PAIRS) if not reason]
    assert [source.paths[i].name for i in kept.items] == wanted
    assert list(captions_of(kept, len(kept) - 1)) == [ENGLISH] and dict(kept.several) == {}
    head = json.loads((tmp_path / "kept/keep.json").read_text())
    assert head["rule"]["filter"]["min_side"] == 30 and head["kept"] == 3
    reasons = [reason for _, _, reason in PAIRS if reason]
    assert {**head["left_out"], "picture does not open": 1} == {r: 1 for r in reasons}
    said = capsys.readouterr().out
    assert "3 of " in said and "left out 1: caption is boilerplate" in said
    page = (tmp_path / "kept/report.html").read_text()
    assert (
        escape(f"dalle tokenizer train --data {shlex.quote(str(tmp_path / 'kept'))} --out") in page
    )
    assert "photographed on 12 May 2014" in page and (tmp_path / "kept/examples/0-0.png").exists()


def test_a_set_that_has_changed_is_refused(home, tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for i in range(2):
        write(folder, i, ENGLISH, noise((40, 40), i))
    filter_pairs(FilterConfig(data=str(folder), out=tmp_path / "kept"))
    first = load_pairs(str(tmp_path / "kept"), image_size=0).fingerprint()
    filter_pairs(FilterConfig(data=str(folder), out=tmp_path / "kept", rule=FilterRule(min_side=9)))
    assert load_pairs(str(tmp_path / "kept"), image_size=0).fingerprint() != first
    write(folder, 2, ENGLISH, noise((40, 40), 2))
    with pytest.raises(DataError, match="must be the set that .* was made of, got a changed one"):
        load_pairs(str(tmp_path / "kept"), image_size=0)
    (tmp_path / "kept/keep.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"keep.bin must be as keep.json says"):
        load_pairs(str(tmp_path / "kept"), image_size=0)
    filter_pairs(
        FilterConfig(data=str(folder), out=tmp_path / "none", rule=FilterRule(min_side=999))
    )
    with pytest.raises(DataError, match="must keep a pair, got none of 3"):
        load_pairs(str(tmp_path / "none"), image_size=0)
    with pytest.raises(UsageError, match="^data filter: out must be a new or empty folder, got "):
        filter_pairs(FilterConfig(data=str(folder), out=folder))


@pytest.mark.parametrize("size", [0, 24])
@pytest.mark.parametrize("mixed", [False, True])
def test_what_is_kept_of_a_drawn_set_is_drawn_again_at_its_size(
    size, mixed, home, tmp_path, monkeypatch
):
    few = partial(ShapesPairs, size=4)
    monkeypatch.setitem(
        sources.BUILT_IN, "shapes", lambda side, split, seed: few(split, image_size=side, seed=seed)
    )
    data = f"shapes:test=0.5\n{home / 'copies'}=2" if mixed else "shapes:test"
    filter_pairs(FilterConfig(data=data, out=tmp_path / "kept", image_size=size, seed=3))
    dedup(DedupConfig(data=str(tmp_path / "kept"), out=tmp_path / "once", by="exact"))
    once = load_pairs(str(tmp_path / "once"), image_size=0)
    wanted = few("test", image_size=size or 64, seed=3)
    assert len(once) >= 4 and once.captions[:4] == list(wanted.captions)
    np.testing.assert_array_equal(once.load(1), wanted.load(1))
    dedup(DedupConfig(data=data, out=tmp_path / "alone", image_size=size, by="exact"))
    assert len(load_pairs(str(tmp_path / "alone"), image_size=0)) == (9 if mixed else 4)


@pytest.mark.parametrize(
    "caption",
    [
        "photographed on 12 May 2014",
        "Photographed on May 12th, 2014",
        "photographed on 2014-05-12",
        "Photo taken 12.05.2014 10:15:30 pm",
        "picture taken on 3rd of July 1999 with Canon EOS 350D",
        "IMG_20140512_101530.jpg",
        "DSC_0123 uploaded on Dec. 2008",
        "stock photo © all rights reserved https://example.org/a.jpg",
        "image taken in September 2011",
    ],
)
def test_boilerplate_in_many_forms(caption):
    assert len(content_words(caption)) < 3
    assert (
        CaptionFilter(FilterRule(min_words=1, english=False)).reason(f"{caption} {ENGLISH}") == ""
    )


@pytest.mark.parametrize(
    "caption",
    [
        ENGLISH,
        "may the force be with you",
        "a march of soldiers in the snow",
        "a photograph of an old camera on a wooden table",
        "12 red apples on a table",
    ],
)
def test_ordinary_captions_are_no_boilerplate(caption):
    rule = FilterRule(english=False)
    assert CaptionFilter(rule).reason(caption) == ""


def test_language_and_short_captions():
    caption_filter = CaptionFilter(FilterRule(min_words=1))
    assert caption_filter.reason(ENGLISH) == ""
    assert caption_filter.reason("rotes Haus") == ""  # too short to tell, plain ASCII
    for caption in (
        "a pink diamond above a blue triangle on a black background",
        "two dogs playing in the snow",
        "happy birthday card with balloons",
    ):
        assert caption_filter.reason(caption) == "", caption
    for caption in (
        "el perro de la bodega vieja del pueblo",
        "赤い家の写真がここにあります よ とても",
        "een hond speelt in de sneeuw",
        "dua anjing bermain di salju",
        "dwa psy bawiące się na śniegu",
    ):
        assert caption_filter.reason(caption) == "caption is not English", caption


def test_bounds_of_the_aspect_ratio_are_kept():
    rule = FilterRule()
    for size in ((10, 20), (20, 10), (10, 10)):
        assert picture_reason(rule, size) == ""
    for size in ((10, 21), (21, 10)):
        assert picture_reason(rule, size) == "aspect ratio out of range"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_words", -1), ("max_words", 0), ("english_probability", 1.5), ("min_aspect", 0.0),
        ("max_aspect", 0.1), ("min_side", -1), ("min_aspect", float("nan")),
    ],
)  # fmt: skip
def test_a_rule_out_of_range(name, value):
    with pytest.raises(UsageError, match=f"^data filter: {name} must be "):
        FilterRule(**{name: value})


def test_equal_and_similar_pictures_are_kept_once(home, tmp_path, capsys):
    dedup(DedupConfig(data=str(home / "copies"), out=tmp_path / "exact", by="exact"))
    assert load_pairs(str(tmp_path / "exact"), image_size=0).items == [0, 1, 2, 3, 5]
    dedup(DedupConfig(data=str(home / "copies"), out=tmp_path / "hash"))
    assert load_pairs(str(tmp_path / "hash"), image_size=0).items == [0, 1, 2, 3]
    said = capsys.readouterr().out
    assert "left out 1: same file" in said and "left out 1: alike" in said
    assert "smaller and brighter" in (tmp_path / "hash/report.html").read_text()
    filter_pairs(FilterConfig(data=str(tmp_path / "hash"), out=tmp_path / "both"))
    assert len(load_pairs(str(tmp_path / "both"), image_size=0)) == 4


def test_equal_shapes_of_other_colours_are_not_alike(home, tmp_path, capsys):
    data = str(tmp_path / "set")
    (tmp_path / "set").mkdir()
    for i, colour in enumerate(["red", "blue", "green", "#f80000"]):
        image = Image.new("RGB", (32, 32), "white")
        image.paste(colour, (8, 8, 24, 24))
        write(tmp_path / "set", i, f"a {colour} square", image)
    dedup(DedupConfig(data=data, out=tmp_path / "out"))
    assert load_pairs(str(tmp_path / "out"), image_size=0).items == [0, 1, 2]
    dedup(DedupConfig(data=data, out=tmp_path / "shapes", colour=255))
    assert load_pairs(str(tmp_path / "shapes"), image_size=0).items == [0]
    dedup(DedupConfig(data=data, out=tmp_path / "strict", colour=0))
    assert len(load_pairs(str(tmp_path / "strict"), image_size=0)) == 4


@pytest.mark.parametrize("held", [1, 7, 1 << 20])
def test_groups_are_those_of_all_pairs_however_few_are_held(held, monkeypatch):
    monkeypatch.setattr(alike, "HELD", held)
    monkeypatch.setattr(alike, "WIDTH", 16)
    monkeypatch.setattr(alike, "CHUNK", 8)
    rng = np.random.default_rng(0)
    edges = rng.integers(0, 60, (45, 2))
    reached = np.eye(60, dtype=bool)
    reached[edges[:, 0], edges[:, 1]] = reached[edges[:, 1], edges[:, 0]] = True
    for _ in range(6):
        reached = reached @ reached
    groups = [np.flatnonzero(row).tolist() for i, row in enumerate(reached) if row[:i].sum() == 0]
    wanted = [members for members in groups if len(members) > 1]
    assert groups_in(60, np.array_split(edges, 9)) == wanted == groups_of(60, edges.tolist())
    same = np.full(50, 5, np.uint64)
    assert groups_in(50, near_hash_pairs(same, 0)) == [list(range(50))]
    assert len(near_hashes(same, 2)) == 50 * 49 // 2 and groups_in(3, iter(())) == []


def test_a_picture_that_is_there_many_times_takes_little_time_and_memory():
    """10,000 equal pictures have 50 million pairs, 5 GB as tuples; nearly equal ones are cut."""
    hashes, colours = np.zeros(10_000, np.uint64), np.zeros((10_000, 192), np.uint8)
    hashes[7::9], colours[11, :3] = 1, 200
    tracemalloc.start()
    groups = groups_in(10_000, hash_links(hashes, 1, colours, 24))
    apart = groups_in(300, near_hash_pairs(hashes[:300], 1))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert groups == [[i for i in range(10_000) if i != 11]] and apart == [list(range(300))]
    assert most < 400 << 20


@pytest.mark.parametrize("distance", [0, 3])
def test_links_connect_what_all_pairs_connect(distance):
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 40, 200, np.uint64)
    colours = rng.integers(0, 2, (200, 192), np.uint8) * np.uint8(60)
    colours[:120] = colours[rng.integers(120, 200, 120)]
    wanted = groups_of(200, near_hashes(hashes, distance, colours, 24))
    assert wanted and groups_in(200, hash_links(hashes, distance, colours, 24)) == wanted
    none = np.empty(0, np.uint64), np.empty((0, 192), np.uint8)
    assert groups_in(0, hash_links(none[0], 4, none[1], 24)) == []


def test_near_hashes_and_features_are_those_of_brute_force():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 300, np.uint64, endpoint=False)
    for i in range(100, 160):  # some within few bits of another
        flips = rng.choice(64, rng.integers(0, 8), replace=False)
        hashes[i] = hashes[i - 100] ^ np.uint64(sum(1 << int(bit) for bit in flips))
    for distance in (0, 3, 6):
        counts = np.bitwise_count(hashes[:, None] ^ hashes[None])
        wanted = [(a, b) for a, b in zip(*np.nonzero(counts <= distance), strict=True) if a < b]
        assert near_hashes(hashes, distance) == wanted
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(features, dim=1)
    wanted = [(a, b) for a in range(50) for b in range(a + 1, 50) if unit[a] @ unit[b] >= 0.9]
    assert sorted(near_features(features, 0.9)) == wanted
    assert near_hashes(np.empty(0, np.uint64), 4) == [] and groups_of(0, []) == []
    assert groups_of(6, [(4, 2), (2, 5), (0, 1)]) == [[0, 1], [2, 4, 5]]
    assert equal([b"a", b"", b"a", b"", b"b"]) == [(0, 2)]
    assert difference_hash(np.zeros((9, 9, 3), np.uint8)) == 0


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"distance": 16}, "distance must be 0 .. 15 bits, got 16"),
        ({"colour": 256}, "colour must be 0 .. 255, got 256"),
        ({"cosine": 0.0}, "cosine must be above 0 and at most 1, got 0.0"),
        ({"by": "features"}, "ranker must be given with --by features, got none"),
    ],
)
def test_dedup_options_out_of_range(home, tmp_path, changes, line):
    with pytest.raises(UsageError) as caught:
        DedupConfig(data=str(home), out=tmp_path, **changes)
    assert str(caught.value) == f"data dedup: {line}"


def test_stats_of_a_set(home, tmp_path):
    stats(StatsConfig(data=str(home / "copies"), out=tmp_path / "stats"))
    found = json.loads((tmp_path / "stats/stats.json").read_text())
    assert found["width"]["most"] == 64 and found["width"]["least"] == 48
    assert found["words_a_caption"]["least"] == 3 and found["captions"] == 6
    with Image.open(tmp_path / "stats/words_a_caption.png") as image:
        assert image.size == (600, 360)
    with pytest.raises(UsageError, match="^data stats: limit must be 0 or more, got -1"):
        StatsConfig(data="x", out=tmp_path, limit=-1)
