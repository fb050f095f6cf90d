"""Pictures as people have them: colour profiles become sRGB, AVIF is decoded upright."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from dalle.data import colours
from dalle.data.containers import parse_picture
from dalle.data.folder import FolderPairs
from dalle.data.images import BadPicture, decode
from support.pictures import encode, photo

WIDE = ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))  # Adobe RGB

VIVID = np.zeros((32, 32, 3), np.uint8) + np.uint8([30, 200, 60])
VIVID[:, 16:] = 220, 40, 30


def fixed(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(space="RGB ", primaries=WIDE, gamma=2.2):
    """A profile of a matrix and a gamma, version 2."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    tags = {"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249), "cprt": b"text\0\0\0\0none\0"}
    tags["desc"] = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78)
    if space == "RGB ":
        for letter, xyz in zip("rgb", primaries, strict=True):
            tags |= {f"{letter}XYZ": b"XYZ \0\0\0\0" + fixed(*xyz), f"{letter}TRC": curve}
    else:
        tags["kTRC"] = curve
    place, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += name.encode() + struct.pack(">II", place + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(
        ">I4sI4s4s4s", place + len(body), b"", 0x02400000, b"mntr", space.encode(), b"XYZ "
    )
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + body


def expected(picture, icc):
    """What Pillow itself makes of it."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    srgb = ImageCms.createProfile("sRGB")
    return np.asarray(ImageCms.profileToProfile(picture, source, srgb, outputMode="RGB"))


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG", "AVIF"])
def test_a_wide_profile_becomes_srgb(form):
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow decodes no AVIF")
    options = {"PNG": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    icc, picture = profile(), Image.fromarray(VIVID)
    content = encode(picture, format=form, icc_profile=icc, **options.get(form, {"quality": 100}))
    found = decode(content, "x").astype(int)
    plain = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    right = expected(Image.fromarray(plain.astype(np.uint8)), icc).astype(int)
    assert np.abs(found - right).max() <= 1 and np.abs(found - plain).max() > 20


def test_grey_alpha_and_palettes_have_profiles_too():
    grey = profile("GRAY", gamma=1.0)
    for mode in ("L", "LA"):
        picture = photo(mode="L")
        stored = (
            picture if mode == "L" else Image.merge("LA", (picture, Image.new("L", (40, 24), 255)))
        )
        found = decode(encode(stored, format="PNG", icc_profile=grey), "x")
        assert np.abs(found.astype(int) - expected(picture, grey)).max() <= 1
        assert found[12, 20, 0] > np.asarray(picture)[12, 20] + 30
    rgba = photo().convert("RGBA")
    rgba.putpixel((0, 0), (9, 9, 9, 0))
    found = decode(encode(rgba, format="PNG", icc_profile=profile()), "x")
    assert (found[0, 0] == 255).all()  # over white, whatever the profile
    right = expected(photo(), profile()).astype(int)
    assert np.abs(found.astype(int) - right)[1:].max() <= 1
    palette = photo().quantize(16)
    found = decode(encode(palette, format="PNG", icc_profile=profile()), "x")
    assert np.abs(found.astype(int) - expected(palette.convert("RGB"), profile())).max() <= 1
    wide = Image.fromarray((np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16))
    found = decode(encode(wide, format="PNG", icc_profile=grey), "x").astype(int)
    eight = Image.fromarray(((np.asarray(wide).astype(int) + 128) // 257).astype(np.uint8))
    assert np.abs(found - expected(eight, grey)).max() <= 1


def test_a_profile_that_is_srgb_or_of_no_use_changes_nothing():
    picture, srgb = photo(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    damaged = bytearray(profile())
    damaged[140:260] = b"\xff" * 120
    for icc in (srgb, b"no profile", profile("GRAY"), bytes(damaged), profile()[:100]):
        found = decode(encode(picture, format="PNG", icc_profile=icc), "x")
        np.testing.assert_array_equal(found, np.asarray(picture))
    cmyk = encode(photo(mode="CMYK"), format="JPEG", icc_profile=profile())
    assert np.abs(decode(cmyk, "x").astype(int) - np.asarray(picture)).mean() < 6
    assert colours._transform(srgb, "RGB") is None and colours._transform(profile(), "RGB")


def test_profiles_in_pieces_and_too_large_ones(monkeypatch):
    icc = profile() + bytes(70_000)
    icc = struct.pack(">I", len(icc)) + icc[4:]  # of two segments in a JPEG
    content = encode(photo(), format="JPEG", icc_profile=icc, quality=95)
    assert content.count(b"ICC_PROFILE\0") == 2 and parse_picture(content).profile == icc
    png = encode(photo(), format="PNG", icc_profile=icc)
    assert parse_picture(png).profile == icc
    monkeypatch.setattr("dalle.data.containers.MAX_ICC", 60_000)
    assert parse_picture(content).profile == parse_picture(png).profile == b""
    bomb = zlib.compress(bytes(10 << 20))
    chunk = b"iCCPx\0\0" + bomb
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    whole = encode(photo(), format="PNG")
    np.testing.assert_array_equal(decode(whole[:33] + chunk + whole[33:], "x"), np.asarray(photo()))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow decodes no AVIF")
def test_avif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(photo(), format="AVIF", exif=exif, quality=100)
    assert decode(turned, "x").shape == (40, 24, 3)
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    assert (decode(encode(clear, format="AVIF"), "x") >= 254).all()
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    moving = encode(frames[0], format="AVIF", save_all=True, append_images=frames[1:])
    assert decode(moving, "x")[8, 8].tolist()[0] > 240
    (tmp_path / "a.avif").write_bytes(turned)
    (tmp_path / "a.txt").write_text("a picture")
    assert FolderPairs(tmp_path).load(0).shape == (40, 24, 3)
    with pytest.raises(BadPicture, match="picture of another format"):
        decode(turned[:40], "x")
    with pytest.raises(BadPicture, match="image must decode whole|picture of another format"):
        decode(turned[: len(turned) // 2], "x")
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    with pytest.raises(BadPicture, match=r"picture of another format \(HEIC\)"):
        decode(heic, "x")
