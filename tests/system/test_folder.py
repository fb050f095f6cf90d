"""Folders of pictures and captions: a labelled corpus of broken files (R19, R20)."""

from __future__ import annotations

import re
import struct
import tracemalloc
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dalle.data.folder import FolderPairs
from dalle.data.pairs import fingerprints, load_or_skip
from dalle.data.sources import load_pairs
from dalle.errors import DataError, UsageError
from support.pictures import JPEG, PNG, encode, photo


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_claiming(width, height):
    """A small valid-looking PNG whose header claims width x height grey pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(b"\0" * 10_000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def animated(fmt):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    return encode(frames[0], format=fmt, save_all=True, append_images=frames[1:])


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show it upright
    return encode(photo(40, 24), format="JPEG", exif=exif)


WEBP = encode(photo(), format="WEBP")
GREY16 = encode(
    Image.fromarray((np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)), format="PNG"
)
GOOD = {  # name -> (content, (height, width))
    "a.jpg": (JPEG, (24, 40)),
    "b.JPG": (JPEG, (24, 40)),
    "c.jpeg": (JPEG, (24, 40)),
    "d.png": (PNG, (24, 40)),
    "e.WebP": (WEBP, (24, 40)),
    "f_png_inside.jpg": (PNG, (24, 40)),
    "g_webp_inside.png": (WEBP, (24, 40)),
    "h_cmyk.jpg": (encode(photo(mode="CMYK"), format="JPEG"), (24, 40)),
    "i_grey.jpg": (encode(photo(mode="L"), format="JPEG"), (24, 40)),
    "j_grey16.png": (GREY16, (64, 64)),
    "k_palette.png": (encode(photo(mode="P"), format="PNG"), (24, 40)),
    "l_one_bit.png": (encode(photo(mode="1"), format="PNG"), (24, 40)),
    "m_alpha.png": (encode(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), format="PNG"), (8, 8)),
    "n_grey_alpha.png": (encode(Image.new("LA", (8, 8), (0, 0)), format="PNG"), (8, 8)),
    "o_animated.png": (animated("PNG"), (16, 16)),
    "p_animated.webp": (animated("WEBP"), (16, 16)),
    "q_rotated.jpg": (rotated(), (40, 24)),
    "r.with.dots.png": (PNG, (24, 40)),
    "deep/er/s.png": (PNG, (24, 40)),
    "t_progressive.jpg": (encode(photo(), format="JPEG", progressive=True), (24, 40)),
    "u_one_pixel.png": (encode(Image.new("RGB", (1, 1)), format="PNG"), (1, 1)),
}
noise = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
NOISE = encode(Image.fromarray(noise), format="PNG")  # mostly pixel data, unlike the ramp
NOISE_JPEG = encode(Image.fromarray(noise), format="JPEG", quality=95)
flipped = bytearray(NOISE)
flipped[len(NOISE) // 2] ^= 0xFF
BAD = {  # name -> (content, reason)
    "bad/00.jpg": (b"", "empty file"),
    "bad/01.jpg": (b"hello", "not a picture"),
    "bad/02.png": (b"\x89PNG\r\n\x1a\n", "unreadable header"),
    "bad/03.jpg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "picture of another format"),
    "bad/04.png": (animated("GIF"), "picture of another format"),
    "bad/05.jpg": (encode(photo(), format="BMP"), "picture of another format"),
    "bad/06.jpg": (encode(photo(), format="TIFF"), "picture of another format"),
    "bad/07.jpg": (JPEG[:-40], "does not decode"),
    "bad/08.jpg": (NOISE_JPEG[: len(NOISE_JPEG) // 2], "does not decode"),
    "bad/09.png": (NOISE[: len(NOISE) // 2], "does not decode"),
    "bad/10.png": (bytes(flipped), "does not decode"),
    "bad/11.png": (png_claiming(20_000, 20_000), "too many pixels"),  # 400 MP
    "bad/12.png": (png_claiming(13_000, 13_000), "too many pixels"),  # 169 MP
    "bad/13.png": (png_claiming(16_385, 10), "too many pixels"),
    "bad/14.png": (png_claiming(1000, 1000), "does not decode"),  # too little data
    "bad/15.png": (b"\0" * 5000, "not a picture"),
    "bad/16.webp": (b"RIFF\xff\xff\xff\xffWEBPVP8 ", "does not decode"),
    "bad/17.jpg": (b"#!/bin/sh\necho owned\n", "not a picture"),
    "bad/18.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%Bounding", "picture of another format"),
    "bad/19.png": (PNG[:8] + b"\xff\xff\xff\xff" + PNG[12:], "unreadable header"),
}
TEXTS = {  # caption content -> reason
    b"": "caption is empty",
    b" \n\t ": "caption is empty",
    b"caf\xe9": "caption is not UTF-8",
    b"\xff\xfea\0b\0": "caption is not UTF-8",
    b"x" * 70_000: "caption too long",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")

    def write(name, content, caption):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        if caption is not None:
            path.with_suffix(".txt").write_bytes(caption)

    for name, (content, _) in GOOD.items():
        write(name, content, f"caption of {name}".encode())
    for name, (content, _) in BAD.items():
        write(name, content, b"a caption")
    for i, text in enumerate(TEXTS):
        write(f"text/{i}.png", PNG, text)
    write("lonely/1.png", PNG, None)
    write("lonely/2.jpg", JPEG, None)
    (root / "lonely/3.txt").write_text("no picture")
    (root / "a.png").write_bytes(PNG)  # beside a.jpg, one caption
    (root / "notes.json").write_text("{}")
    (root / ".hidden.png").write_bytes(PNG)
    (root / "folder.png").mkdir()
    return root


def expected_counts(full):
    # A WebP that is cut off is known by its header.
    reasons = [r for n, (_, r) in BAD.items() if full or r != "does not decode" or "webp" in n]
    counts = Counter(reasons) + Counter(TEXTS.values())
    counts["picture without caption"] = 2
    counts["caption without picture"] = 1
    counts["second picture of a caption"] = 1
    counts["neither picture nor caption"] = 1
    return counts


def test_corpus_is_counted_exactly_as_labelled(corpus):
    pairs = FolderPairs(corpus, verify="full")
    assert pairs.skipped == expected_counts(full=True)
    assert len(BAD) + len(TEXTS) + len(GOOD) >= 40
    names = [str(path.relative_to(corpus)) for path in pairs.paths]
    assert names == sorted(names, key=lambda name: str((corpus / name).with_suffix("")))
    assert set(names) == set(GOOD)
    for i, name in enumerate(names):
        image = pairs.load(i)
        assert image.dtype == np.uint8 and image.shape == (*GOOD[name][1], 3), name
        assert pairs.captions[i] == f"caption of {name}"
    assert all(re.search("^[^\n]*: (image|caption) must [^\n]*$", line) for line in pairs.problems)


def test_header_check_leaves_the_rest_to_load(corpus):
    pairs = FolderPairs(corpus)
    assert pairs.skipped == expected_counts(full=False)
    before = pairs.skipped.total()
    images, kept = load_or_skip(pairs, range(len(pairs)))
    assert len(images) == len(kept) == len(GOOD)
    assert pairs.skipped.total() - before == len(pairs) - len(GOOD) > 0


def test_good_pictures_decode_to_the_right_pixels(corpus):
    pairs = FolderPairs(corpus)
    by_name = {path.name: i for i, path in enumerate(pairs.paths)}
    assert (pairs.load(by_name["d.png"]) == np.asarray(photo())).all()
    assert (pairs.load(by_name["m_alpha.png"]) == 255).all()  # shown over white
    assert (pairs.load(by_name["n_grey_alpha.png"]) == 255).all()
    assert (pairs.load(by_name["o_animated.png"]) == (255, 0, 0)).all()  # the first frame
    grey16 = pairs.load(by_name["j_grey16.png"])
    exact = np.arange(64 * 64).reshape(64, 64) * 16 / 257
    assert np.abs(grey16[..., 0] - exact).max() <= 0.5
    cmyk = pairs.load(by_name["h_cmyk.jpg"]).astype(int)
    assert np.abs(cmyk - np.asarray(photo()).astype(int)).mean() < 6
    upright = Image.fromarray(np.asarray(photo(40, 24))).transpose(Image.Transpose.ROTATE_270)
    turned = pairs.load(by_name["q_rotated.jpg"]).astype(int)
    assert np.abs(turned - np.asarray(upright).astype(int)).mean() < 6


def test_bombs_cost_no_memory(tmp_path):
    for i, (width, height) in enumerate([(20_000, 20_000), (13_000, 13_000), (2**31 - 1, 1)]):
        (tmp_path / f"{i}.png").write_bytes(png_claiming(width, height))
        (tmp_path / f"{i}.txt").write_text("a bomb")
    tracemalloc.start()
    with pytest.raises(DataError, match="3 x too many pixels"):
        FolderPairs(tmp_path, verify="full")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 << 20


def test_large_files_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("dalle.data.images.MAX_FILE_BYTES", 1000)
    (tmp_path / "a.png").write_bytes(b"\0" * 1001)
    (tmp_path / "a.txt").write_text("large")
    with pytest.raises(DataError, match="1 x file too large"):
        FolderPairs(tmp_path)


def test_a_file_that_goes_away_is_a_data_error(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "a.txt").write_text("here")
    pairs = load_pairs(str(tmp_path), image_size=32)
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="a.png: image must be a plain file, got: not a file"):
        pairs.load(0)


def test_fingerprints_name_what_has_changed(tmp_path):
    def found(**options):
        return fingerprints(FolderPairs(tmp_path / "here", **options))

    (tmp_path / "there").mkdir()
    for name, shade in (("a", 10), ("b", 200)):
        Image.new("L", (4, 4), shade).save(tmp_path / "there" / f"{name}.png")
        (tmp_path / "there" / f"{name}.txt").write_text(name)
    (tmp_path / "there").rename(tmp_path / "here")
    first = found()
    assert first == found(verify="none") == found(verify="full")
    picture, text = tmp_path / "here" / "a.png", tmp_path / "here" / "a.txt"
    content = picture.read_bytes()
    picture.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])  # same size
    second = found()
    assert second["captions"] == first["captions"] and second["pictures"] != first["pictures"]
    text.write_text("c")
    assert found()["captions"] != first["captions"] and found()["pictures"] == second["pictures"]
    (tmp_path / "here" / "b.txt").write_text("b\nd")
    third = found()
    text.write_text("c\nb")
    (tmp_path / "here" / "b.txt").write_text("d")  # the same words in the same order
    assert found()["captions"] != third["captions"]


def test_empty_folders_get_one_line(tmp_path):
    with pytest.raises(DataError, match=r"got no usable pair \(the folder is empty\)") as caught:
        FolderPairs(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "a.txt").write_text("alone")
    with pytest.raises(DataError, match="1 x caption without picture"):
        FolderPairs(tmp_path)
    with pytest.raises(DataError, match="must be a folder, got no such folder"):
        FolderPairs(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="split of a folder must be 'train', got 'test'"):
        load_pairs(str(tmp_path), image_size=32, split="test")
    with pytest.raises(UsageError, match="verify must be none, header or full, got 'deep'"):
        FolderPairs(tmp_path, verify="deep")


def test_truncated_loading_is_never_on(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "a.txt").write_text("here")
    with pytest.raises(DataError, match="LOAD_TRUNCATED_IMAGES is set"):
        FolderPairs(tmp_path).load(0)
