"""Listings 1 and 2 of the paper, number by number, and pictures to tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dalle_ext
from dalle.data import augment
from dalle.data.augment import center_crop, dvae_crop, prior_crop, to_tensor
from dalle.errors import DataError, UsageError


class Recorder:
    """Stands in for a Generator: answers from `choose`, notes the bounds it was asked for."""

    def __init__(self, choose, coin=0.9):
        self.choose, self.coin, self.asked = choose, coin, []

    def integers(self, low, high, endpoint=False):
        self.asked.append((low, high + 1 if endpoint else high))
        return self.choose(low, self.asked[-1][1])

    def random(self):
        return self.coin


def lowest(low, end):
    return low


def highest(low, end):
    return end - 1


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_listing_1_draws_in_its_ranges():
    for height, width, resized in [(500, 600, (288, 385)), (300, 300, (288, 301)),
                                   (260, 400, (260, 261)), (256, 256, (256, 257))]:  # fmt: skip
        for choose in (lowest, highest):
            rng = Recorder(choose)
            assert dvae_crop(picture(height, width), 256, rng).shape == (256, 256, 3)
            shorter = min(height, width)
            assert rng.asked[0] == (0, height - shorter + 1)
            assert rng.asked[1] == (0, width - shorter + 1)
            assert rng.asked[2] == resized
            side = choose(*resized)
            assert rng.asked[3] == rng.asked[4] == (0, side - 256 + 1)


def test_listing_2_draws_in_its_ranges():
    for height, width in [(256, 256), (300, 500), (511, 256), (257, 258), (1000, 301)]:
        for choose in (lowest, highest):
            rng = Recorder(choose)
            assert prior_crop(picture(height, width), 256, rng).shape == (256, 256, 3)
            s = min(height, width)
            for asked, extent in zip(rng.asked, (height, width), strict=False):
                low = 3 * (extent - s) // 8
                assert asked == (low, max(low + 1, 5 * (extent - s) // 8))
            assert rng.asked[2] == (256, min(s, 288) + 1)


def test_listings_cut_what_they_drew():
    image = picture(40, 64)
    rng = Recorder(lowest)
    resized = dalle_ext.area_resize(image[:, :40], 36, 36)  # s = 40, t = 9/8 of 32
    assert (dvae_crop(image, 32, rng) == resized[:32, :32]).all()
    mirrored = dvae_crop(image, 32, Recorder(lowest, coin=0.1))
    assert (mirrored == resized[:32, :32][:, ::-1]).all()
    start = 3 * (64 - 40) // 8
    resized = dalle_ext.area_resize(image[:, start : start + 40], 32, 32)
    assert (prior_crop(image, 32, Recorder(lowest)) == resized).all()


def test_mirror_images_only_for_the_dvae():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, :4] = 255
    left = [dvae_crop(image, 32, np.random.default_rng(i))[0, 0, 0] > 128 for i in range(400)]
    assert 140 < sum(left) < 260  # one half, 6 sigma
    assert all(prior_crop(image, 32, np.random.default_rng(i))[0, 0, 0] for i in range(50))


@pytest.mark.parametrize("crop", [dvae_crop, prior_crop])
def test_crops_are_pure_functions_of_the_generator(crop):
    image = picture(70, 90)
    first = crop(image, 32, np.random.default_rng(5))
    assert (first == crop(image.copy(), 32, np.random.default_rng(5))).all()
    assert not np.shares_memory(first, image) and first.flags.c_contiguous
    others = [crop(image, 32, np.random.default_rng(i)).tobytes() for i in range(20)]
    assert len(set(others)) > 15


@pytest.mark.parametrize("crop", [dvae_crop, prior_crop])
def test_small_pictures_are_refused(crop):
    with pytest.raises(DataError, match="image must have sides of at least 256, got 255 x 400"):
        crop(picture(255, 400), 256, np.random.default_rng(0))
    with pytest.raises(DataError, match=r"image must be \(H, W, 3\) uint8"):
        crop(picture(64, 64)[:, :, 0], 32, np.random.default_rng(0))
    with pytest.raises(UsageError, match="size must be at least 1, got 0"):
        crop(picture(64, 64), 0, np.random.default_rng(0))


def test_center_crop():
    image = picture(10, 31)
    assert (center_crop(image, 10) == image[:, 10:20]).all()
    assert center_crop(image, 24).shape == (24, 24, 3)
    same = picture(32, 32)
    assert (center_crop(same, 32) == same).all()
    assert not np.shares_memory(center_crop(same, 32), same)


def test_resize_is_the_library_area_resize(monkeypatch):
    asked = []
    monkeypatch.setattr(
        augment.dalle_ext,
        "area_resize",
        lambda image, h, w: asked.append((image.shape, h, w)) or np.zeros((h, w, 3), np.uint8),
    )
    center_crop(picture(40, 50), 20)
    assert asked == [((40, 40, 3), 20, 20)]


def test_to_tensor():
    images = [picture(4, 6, seed) for seed in range(3)]
    got = to_tensor(images)
    assert got.shape == (3, 3, 4, 6) and got.dtype == torch.float32 and got.is_contiguous()
    for i, image in enumerate(images):
        expected = torch.from_numpy(image).permute(2, 0, 1).double() / 255
        assert (got[i].double() - expected).abs().max() < 1e-7
    assert to_tensor(np.stack(images)).equal(got)
    white = to_tensor([np.full((2, 2, 3), 255, np.uint8)])
    assert white.max() == white.min() == 1


def test_to_tensor_refuses():
    for bad in ([], [picture(4, 4), picture(4, 5)], [picture(4, 4).astype(np.float32)]):
        with pytest.raises(DataError, match="to_tensor: images must be"):
            to_tensor(bad)
