"""The demo's scores on hand-made answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dalle.data.shapes import parse
from dalle.data.shapes_pairs import ShapesPairs, render
from dalle.demo import measures
from dalle.dvae.likelihood import set_psnr
from dalle.errors import UsageError


def test_psnr_of_a_known_error():
    images = torch.zeros(2, 3, 4, 4)
    assert set_psnr(images, images + 0.1) == pytest.approx(20.0, abs=1e-4)
    assert set_psnr(images, images) == 99.0
    with pytest.raises(UsageError, match="one shape"):
        set_psnr(images, images[:1])


def test_nearest_rank_counts_the_nearer_ones():
    pool = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    samples = torch.tensor([0.1, 1.2, 3.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    ranks = measures.nearest_rank(samples, torch.tensor([0, 2, 0]), pool)
    assert ranks.tolist() == [0, 1, 3]


def test_nearest_rank_takes_every_picture_of_the_caption_as_right():
    pool = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    samples = torch.tensor([0.1, 1.2, 3.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    labels = torch.tensor([7, 8, 8, 7])
    ranks = measures.nearest_rank(samples, torch.tensor([7, 7, 8]), pool, labels)
    assert ranks.tolist() == [0, 2, 1]


RIGHT = np.array([[0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
SCORES = np.array([[0.0, 3.0, 1.0, 2.0], [2.0, 1.0, 5.0, 3.0], [1.0, 0.0, 0.0, 0.0]])


def test_best_of_takes_the_highest_score_of_each_group():
    assert measures.best_of(RIGHT, SCORES, 1) == pytest.approx(RIGHT.mean())
    # groups of two: first captions choose item 1 (right) and 3; second 0 (right) and 2; third none
    assert measures.best_of(RIGHT, SCORES, 2) == pytest.approx(2 / 6)
    assert measures.best_of(RIGHT, SCORES, 4) == pytest.approx(1 / 3)
    assert measures.oracle_of(RIGHT, 2) == pytest.approx(2 / 6)
    assert measures.oracle_of(RIGHT, 4) == pytest.approx(2 / 3)
    with pytest.raises(UsageError, match="divide"):
        measures.best_of(RIGHT, SCORES, 3)


def test_curve_holds_both_lines():
    points = measures.curve(RIGHT, SCORES)
    assert [p["samples"] for p in points] == [1, 2, 4]
    assert [p["oracle"] >= p["reranked"] for p in points] == [True] * 3


def test_nearest_scores_of_known_ranks():
    ranks = np.array([[0, 9, 4, 0, 7, 7, 7, 7], [6, 5, 3, 1, 8, 8, 8, 8]])
    scores = np.array([[0, 0, 9, 0, 0, 0, 0, 0], [0, 0, 0, 9, 0, 0, 0, 0]], float)
    found = measures.nearest_scores(ranks, scores, "held_out")
    assert found["held_out_at_1"] == 0.0 and found["held_out_at_5"] == 1.0
    assert found["held_out_at_1_single"] == pytest.approx(2 / 16)
    assert found["held_out_at_1_oracle"] == 0.5
    assert found["held_out_curve_at_5"][-1] == {"samples": 8, "reranked": 1.0, "oracle": 1.0}


CAPTIONS = [
    "a red square on a white background",
    "a blue circle on a black background",
    "a red square left of a blue circle on a white background",
    "a red square above a blue circle on a white background",
]


def drawn(captions):
    rng = np.random.default_rng(0)
    images = np.stack([render(parse(caption), rng) for caption in captions])
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255


def test_shapes_scores_of_pictures_drawn_right_and_wrong():
    scenes = [parse(caption) for caption in CAPTIONS]
    splits = ["zero", "zero", "test", "zero"]
    right, wrong = drawn(CAPTIONS), drawn(CAPTIONS[1:] + CAPTIONS[:1])
    images = torch.stack([wrong, right, wrong, wrong], 1)
    scores = np.array([[0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]], float)
    found = measures.shapes_scores(images, scenes, splits, scores)
    assert found["one_object_single"] == pytest.approx(0.25)
    assert found["one_object_best_of_4"] == 1.0
    assert found["relation_best_of_4"] == 1.0 and found["relation_zero_best_of_4"] == 0.0
    assert set(found["table"]) == {"zero/one_object", "test/two_objects", "zero/two_objects"}
    assert found["table"]["test/two_objects"]["single"]["relation"] == pytest.approx(0.25)
    assert found["curves"]["zero/two_objects"][-1] == {
        "samples": 4, "reranked": 0.0, "oracle": 1.0,
    }  # fmt: skip


def test_reconstruction_right_of_true_and_blurred_pictures():
    pairs = ShapesPairs("test", size=40)
    images = torch.from_numpy(pairs.images).permute(0, 3, 1, 2) / 255
    assert measures.reconstruction_right(images, pairs.scenes) > 0.97
    ruined = torch.nn.functional.avg_pool2d(images, 15, 1, 7)
    assert measures.reconstruction_right(ruined, pairs.scenes) < 0.3
