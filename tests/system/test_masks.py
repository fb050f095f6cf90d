"""A mask keeps tokens whose pixels are all kept, of any size; one of another grid is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dalle import masks
from dalle.data.images import BadPicture, decode_mask
from dalle.errors import UsageError


def png(array, mode=None, kind="PNG", **options):
    buffer = io.BytesIO()
    image = Image.fromarray(array) if mode is None else Image.fromarray(array).convert(mode)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_rows_of_the_paper():
    assert [masks.default_rows(h) for h in (32, 16, 8, 4, 2)] == [15, 8, 4, 2, 1]
    keep = masks.top_rows((4, 3), 3)
    assert keep.tolist() == [[True] * 3] * 3 + [[False] * 3]
    for rows in (0, 4, -1):
        with pytest.raises(UsageError, match=f"keep_rows must be 1 to 3, got {rows}"):
            masks.top_rows((4, 3), rows)


def test_boxes_are_redrawn_and_reach_the_corner():
    keep = masks.outside_boxes([(1, 0, 3, 2), masks.parse_box("3, 2")], 5, 4)
    wanted = ["#..##", "#..##", "###..", "###.."]
    assert ["".join("#" if k else "." for k in row) for row in keep.tolist()] == wanted
    for box in ((0, 0, 6, 1), (-1, 0, 2, 2), (2, 0, 2, 2), (0, 3, 1, 5), (5, 0), (3, 1, 2, 2)):
        with pytest.raises(UsageError, match=r"^edit: box must have 0 <= x0 < x1 <= 5 and"):
            masks.outside_boxes([box], 5, 4)
    for text in ("", "1", "1,2,3", "1,2,3,4,5", "a,b", "1.5,2", "1,2,3,", "9" * 30 + ",1"):
        with pytest.raises(UsageError, match=r"^edit: box must be x0,y0,x1,y1 or x0,y0, got"):
            masks.parse_box(text)
    assert masks.parse_box("-1,2,3,4") == (-1, 2, 3, 4)


def test_a_token_is_kept_only_if_all_its_pixels_are():
    pixels = torch.ones(6, 6, dtype=torch.bool)
    pixels[2, 3] = pixels[5, 5] = False
    assert masks.whole_tokens(pixels, (3, 3)).tolist() == [
        [True, True, True], [True, False, True], [True, True, False]
    ]  # fmt: skip
    tokens, seen = masks.kept_tokens(pixels, (3, 3), 6)
    assert torch.equal(seen, pixels) and torch.equal(tokens, masks.whole_tokens(pixels, (3, 3)))
    again, covered = masks.kept_tokens(tokens.numpy(), (3, 3), 6)
    assert torch.equal(again, tokens) and torch.equal(masks.whole_tokens(covered, (3, 3)), tokens)
    assert int(covered.sum()) == 4 * int(tokens.sum())


@pytest.mark.parametrize("side", [1, 2, 3, 6, 7, 48])
def test_a_mask_of_any_size_takes_the_nearest_pixel(side):
    """As Pillow does."""
    mask = np.random.default_rng(side).random((12, 12)) < 0.5
    wanted = Image.fromarray(mask).resize((side, side), Image.Resampling.NEAREST)
    assert np.array_equal(masks.resized(mask, side).numpy(), np.asarray(wanted))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (torch.ones(4, 4, dtype=torch.bool), "leave a token to draw, got a mask that keeps all"),
        (torch.zeros(4, 4, dtype=torch.bool), "keep a whole token, got a mask that keeps none"),
        (torch.ones(3, 4, dtype=torch.bool), "of 4 x 4 tokens or 16 x 16 pixels, got 3 x 4"),
        (torch.ones(16, dtype=torch.bool), "of 4 x 4 tokens or 16 x 16 pixels, got 16"),
        (torch.ones(1, 4, 4, dtype=torch.bool), "tokens or 16 x 16 pixels, got 1 x 4 x 4"),
        (torch.tensor(True), "tokens or 16 x 16 pixels, got one value"),
        (torch.ones(4, 4), "a tensor of bool, got torch.float32"),
        (np.ones((4, 4)), "a tensor of bool, got float64"),
        ([[True] * 4] * 4, "a tensor of bool, got list"),
        (None, "a tensor of bool, got NoneType"),
    ],
)
def test_a_mask_of_something_else_gets_one_line(keep, message):
    with pytest.raises(UsageError, match="^edit: keep must ") as error:
        masks.kept_tokens(keep, (4, 4), 16)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_checkerboard_of_pixels_keeps_no_whole_token():
    pixels = torch.arange(16)[:, None] % 2 == torch.arange(16) % 2
    with pytest.raises(UsageError, match="must keep a whole token"):
        masks.kept_tokens(pixels, (4, 4), 16)


def test_a_mask_picture_marks_in_white_or_by_transparency():
    marked = np.random.default_rng(0).random((5, 7)) < 0.5
    white = (marked * 255).astype(np.uint8)
    for content in (
        png(white), png(white, "RGB"), png(white, "P"), png(white, "1"), png(white, "RGBA"),
        png(white, "RGB", "WEBP", lossless=True),
        png(np.where(marked, 128, 127).astype(np.uint8)),
        png(np.where(marked, 65535, 0).astype(np.uint16)),
    ):  # fmt: skip
        assert np.array_equal(decode_mask(content, "m.png"), marked)
    photo = np.random.default_rng(1).integers(0, 256, (5, 7, 4), np.uint8)
    photo[..., 3] = np.where(marked, 0, 255)  # what editors leave: a picture with a hole
    assert np.array_equal(decode_mask(png(photo), "m.png"), marked)
    for content in (b"", b"no picture", png(white)[:40]):
        with pytest.raises(BadPicture, match=r"^m\.png: image must"):
            decode_mask(content, "m.png")
