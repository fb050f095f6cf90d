"""Grids show each picture at its position, and a file is written completely or not at all."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from dalle import pictures
from dalle.errors import EnvironmentProblem, UsageError


def test_each_picture_stands_at_its_place():
    images = torch.rand(5, 3, 6, 7)
    sheet = np.asarray(pictures.grid(images, columns=3, scale=2))
    assert sheet.shape == (4 + 2 * (12 + 4), 4 + 3 * (14 + 4), 3)
    for i in range(5):
        row, col = divmod(i, 3)
        cell = sheet[4 + row * 16 :, 4 + col * 18 :][:12:2, :14:2]
        assert np.array_equal(cell, pictures.to_uint8(images[i]))


def test_labels_draw_below_and_leave_the_pictures_alone():
    images = torch.zeros(2, 3, 40, 40)
    sheet = np.asarray(pictures.grid(images, columns=2, labels=["a red circle on a lawn", "b"]))
    assert (sheet[4:44, 4:44] == 0).all() and (sheet[4:44, 48:88] == 0).all()
    assert (sheet[44:] < 128).any()


def test_colours_outside_are_clamped_not_wrapped():
    images = torch.tensor([-0.5, 0.5, 1.5]).view(3, 1, 1).expand(3, 2, 2)
    assert pictures.to_uint8(images)[0, 0].tolist() == [0, 128, 255]


def test_beside_interleaves():
    left, right = torch.zeros(3, 3, 2, 2), torch.ones(3, 3, 2, 2)
    assert pictures.beside([left, right])[:, 0, 0, 0].tolist() == [0, 1, 0, 1, 0, 1]


def test_rows_of_sets_stand_below_each_other():
    left, right = torch.rand(3, 3, 2, 5), torch.rand(3, 3, 2, 5)
    rows = pictures.rows_of(left, right)
    assert rows.shape == (3, 4, 15)
    assert torch.equal(rows[:, 2:, 5:10], right[1])


def test_png_reads_back_and_leaves_no_part(tmp_path):
    image = pictures.grid(torch.rand(2, 3, 4, 4), columns=2)
    path = pictures.save_png(tmp_path / "new" / "a.png", image)
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(image))
    assert os.listdir(path.parent) == ["a.png"]


def test_full_disk_keeps_the_older_file(tmp_path, monkeypatch):
    pictures.save_bytes(tmp_path / "a.json", b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentProblem, match="must be writable, got No space left"):
        pictures.save_bytes(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_folder_that_is_a_file_gets_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="must be writable"):
        pictures.save_bytes(tmp_path / "file" / "a.png", b"")


@pytest.mark.parametrize(
    ("images", "options"),
    [
        (torch.zeros(3, 4, 4), {"columns": 1}),
        (torch.zeros(1, 1, 4, 4), {"columns": 1}),
        (torch.zeros(1, 3, 4, 4), {"columns": 0}),
        (torch.zeros(1, 3, 4, 4), {"columns": 1, "labels": ["a", "b"]}),
    ],
)
def test_bad_input_gets_one_line(images, options):
    with pytest.raises(UsageError, match="must be"):
        pictures.grid(images, **options)


def test_sets_of_two_shapes_are_refused():
    with pytest.raises(UsageError, match="one shape"):
        pictures.beside([torch.zeros(1, 3, 2, 2), torch.zeros(2, 3, 2, 2)])
