"""Pictures with damaged metadata are read right, and every refused picture names its reason."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from dalle.data.containers import parse_picture, tiff_orientation
from dalle.data.images import BadPicture, decode

WIDE = np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, np.ones((8, 8), np.uint8))
WIDE = np.stack([WIDE, 255 - WIDE, WIDE // 2], -1)  # (16, 24, 3), no two of its turns alike


def encode(image, fmt="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


FILES = {
    "JPEG": encode(Image.fromarray(WIDE), "JPEG", quality=95, subsampling=0),
    "PNG": encode(Image.fromarray(WIDE)),
    "WEBP": encode(Image.fromarray(WIDE), "WEBP", lossless=True),
}


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, depth, colour, rows, *chunks):
    """A PNG of raw rows (bytes each), `chunks` before the pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", head, *chunks, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    )


def with_chunks(content, *chunks):
    return content[:33] + b"".join(chunks) + content[33:]


def with_segments(content, *segments):
    parts = [bytes([0xFF, n]) + struct.pack(">H", len(body) + 2) + body for n, body in segments]
    return content[:2] + b"".join(parts) + content[2:]


def with_exif(kind, block):
    """The picture of FILES with an EXIF block, whatever it holds."""
    content = FILES[kind]
    if kind == "JPEG":
        return with_segments(content, (0xE1, b"Exif\0\0" + block))
    if kind == "PNG":
        return with_chunks(content, chunk(b"eXIf", block))
    pixels = content[12:]
    head = b"VP8X" + struct.pack("<I", 10) + b"\x08\0\0\0" + b"\x17\0\0" + b"\x0f\0\0"
    body = (
        head + pixels + b"EXIF" + struct.pack("<I", len(block)) + block + b"\0" * (len(block) % 2)
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def random_block(rng, orientation):
    """An EXIF block whose other tags have any type, count and value, and lead anywhere."""
    order = rng.choice("<>")
    entries = []
    for _ in range(rng.randrange(12)):
        tag = rng.choice([0x010E, 0x011A, 0x0128, 0x0132, 0x8769, 0x8825, 0x927C, 0x02BC, 0xA005])
        tag = rng.choice([tag, rng.randrange(0x0113, 65536)])
        number = rng.choice([0, 1, 2, 5, 300, 2**32 - 1])
        value = rng.choice([rng.randbytes(4), struct.pack(order + "I", rng.randrange(400))])
        entries.append(struct.pack(order + "HHI", tag, rng.randrange(20), number) + value)
    place = rng.randrange(len(entries) + 1)
    entries.insert(place, struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return head + struct.pack(order + "H", len(entries)) + b"".join(entries) + rng.randbytes(40)


def turned(pixels, orientation):
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = orientation
    return np.asarray(ImageOps.exif_transpose(image))


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.filterwarnings("error")
def test_orientation_is_read_whatever_the_other_tags_hold(kind):
    plain = decode(FILES[kind], "plain")
    upright = {n: turned(plain, n) for n in range(1, 9)}
    assert len({image.tobytes() + bytes(image.shape) for image in upright.values()}) == 8
    rng = random.Random(kind)
    for _ in range(1500):
        orientation = rng.randint(1, 8)
        found = decode(with_exif(kind, random_block(rng, orientation)), "x")
        assert np.array_equal(found, upright[orientation])


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.filterwarnings("error")
def test_a_damaged_exif_block_spoils_no_pixels(kind):
    plain = decode(FILES[kind], "plain")
    known = {turned(plain, n).tobytes() for n in range(1, 9)}
    rng = random.Random(kind)
    for _ in range(300):
        block = bytearray(random_block(rng, 1))
        for _ in range(rng.randrange(4)):
            block[rng.randrange(len(block))] = rng.randrange(256)
        block = bytes(block[: rng.randrange(len(block) + 1)])
        assert decode(with_exif(kind, block), "x").tobytes() in known


def test_only_an_orientation_counts_as_one():
    def block(kind=3, number=1, value=6, order=">", tag=0x0112):
        value = struct.pack(order + {1: "Bxxx", 3: "Hxx", 4: "I", 5: "I", 2: "I"}[kind], value)
        entry = struct.pack(order + "HHI", tag, kind, number) + value
        head = b"MM\0*" if order == ">" else b"II*\0"
        return head + struct.pack(order + "IH", 8, 1) + entry

    assert [tiff_orientation(block(kind)) for kind in (1, 3, 4)] == [6, 6, 6]
    assert tiff_orientation(block(order="<")) == 6
    assert tiff_orientation(b"Exif\0\0" + block()) == 6
    for other in (block(value=0), block(value=9), block(number=2), block(kind=5), block(kind=2),
                  block(tag=0x0111), b"", block()[:20], b"MM\0+" + block()[4:]):  # fmt: skip
        assert tiff_orientation(other) is None


def test_orientation_of_other_places():
    tiff = b"MM\0*" + struct.pack(">IHHHIHH", 8, 1, 0x0112, 3, 1, 6, 0)
    exif, jpeg, plain_png = b"Exif\0\0" + tiff, FILES["JPEG"], FILES["PNG"]
    xmp = b"<x:xmpmeta><rdf:Description tiff:Orientation='8'/></x:xmpmeta>"
    profile = b"\nexif\n%8d\n" % (len(tiff) + 6) + (b"Exif\0\0" + tiff).hex().encode() + b"\n"
    xap = b"http://ns.adobe.com/xap/1.0/\0"
    text = b"Raw profile type exif\0"
    for content, wanted in {
        with_segments(jpeg, (0xE1, xap + xmp)): 8,
        with_segments(jpeg, (0xE1, xap + xmp), (0xE1, exif)): 6,
        with_segments(jpeg, (0xE0, b"x"), (0xED, b"8BIM"), (0xE1, exif)): 6,
        with_segments(jpeg, (0xE1, b"Exif\0\0"), (0xE1, exif)): 6,
        with_segments(jpeg, (0xE1, exif[:15]), (0xE1, b"Exif\0\0" + exif[15:])): 6,  # goes on
        with_chunks(plain_png, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)): 8,
        with_chunks(plain_png, chunk(b"tEXt", text + profile)): 6,
        with_chunks(plain_png, chunk(b"zTXt", text + b"\0" + zlib.compress(profile))): 6,
        plain_png[:-12] + chunk(b"eXIf", tiff) + plain_png[-12:]: 6,  # behind the pixels
        with_exif("WEBP", exif): 6,
    }.items():
        assert parse_picture(content).orientation == wanted
        plain = decode(FILES["PNG" if content[:4] == b"\x89PNG" else "JPEG"], "plain")
        if content[:4] != b"RIFF":
            assert np.array_equal(decode(content, "x"), turned(plain, wanted))


@pytest.mark.filterwarnings("error")
def test_any_amount_of_metadata_is_no_fault_of_a_picture():
    noise = random.Random(0).randbytes(3 << 20)
    text, zeros = zlib.compress(noise), zlib.compress(b"\0" * (80 << 20))
    for body in (
        [chunk(b"tEXt", b"k\0" + noise), chunk(b"tEXt", b"k\0" + noise)],
        [chunk(b"zTXt", b"k\0\0" + text), chunk(b"zTXt", b"k\0\0" + zeros)],
        [chunk(b"iTXt", b"k\0\1\0\0\0" + zeros)],
        [chunk(b"iCCP", b"p\0\0" + text)],
        [chunk(b"iCCP", b"p\0\0" + zeros)],
        [chunk(b"zTXt", b"Raw profile type exif\0\0" + zeros)],
        [chunk(b"pHYs", b""), chunk(b"gAMA", b"1"), chunk(b"cHRM", b"12345"), chunk(b"tIME", b"")],
        [chunk(b"acTL", b""), chunk(b"fcTL", b"\0"), chunk(b"sBIT", b""), chunk(b"aaAa", b"x")],
        [chunk(b"tEXt", b"k\0v")[:-4] + b"\0\0\0\0"],  # a wrong check sum
    ):
        assert np.array_equal(decode(with_chunks(FILES["PNG"], *body), "x"), WIDE)
    plain = decode(FILES["JPEG"], "plain")
    icc = b"ICC_PROFILE\0"
    for segments in (
        [(0xE2, icc + bytes([i + 1, 60]) + noise[i : i + 60000]) for i in range(60)],
        [(0xE2, icc), (0xE2, b"MPF\0" + noise[:500]), (0xED, b"Photoshop 3.0\0" + noise[:999])],
        [(0xFE, noise[:65000])] * 40,
        [(0xE0, b"JFIF\0"), (0xEE, b"Adobe"), (0xE1, b""), (0xEF, noise[:9])],
    ):
        assert np.array_equal(decode(with_segments(FILES["JPEG"], *segments), "x"), plain)


def test_the_transparent_colour_of_a_png():
    """One colour of grey and RGB files, of every depth: shown white, and no other colour is."""

    def key(*values):
        return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))

    grey16 = [struct.pack(">4H", 0, 1000, 1001, 65535)]
    found = decode(png(4, 1, 16, 0, grey16, key(1000)), "x")[0]
    assert found.tolist() == [[0] * 3, [255] * 3, [4] * 3, [255] * 3]
    for depth, row, value, wanted in (
        (8, bytes([7, 8, 9, 200]), 8, [7, 255, 9, 200]),
        (4, b"\x0f\x37", 3, [0, 255, 255, 119]),
        (2, b"\x1b", 2, [0, 85, 255, 255]),
        (1, b"\x50", 0, [255, 255, 255, 255]),
        (1, b"\x50", 1, [0, 255, 0, 255]),
        (8, bytes([7, 8, 9, 200]), 0x0108, [7, 255, 9, 200]),  # bits above the sample's
    ):
        found = decode(png(4, 1, depth, 0, [row], key(value)), "x")
        assert found[0, :, 1].tolist() == wanted, (depth, value)
    assert decode(png(4, 1, 1, 0, [b"\x50"], key(1)), "x")[0, :, 0].tolist() == [0, 255, 0, 255]
    row = bytes([1, 2, 3, 1, 2, 4, 3, 2, 1])
    assert decode(png(3, 1, 8, 2, [row], key(1, 2, 3)), "x")[0].tolist() == [
        [255] * 3, [1, 2, 4], [3, 2, 1]]  # fmt: skip
    row = struct.pack(">6H", 65535, 0, 256, 65535, 512, 0)
    found = decode(png(2, 1, 16, 2, [row], key(65535, 0, 256)), "x")[0]
    assert found.tolist() == [[255] * 3, [255, 2, 0]]
    for short in (b"", b"\1"):  # passed over, as what is not there
        assert decode(png(1, 1, 16, 0, [b"\1\1"], chunk(b"tRNS", short)), "x")[0, 0, 0] == 1


def test_palettes_with_transparency():
    palette = chunk(b"PLTE", bytes([10, 20, 30, 0, 0, 0, 200, 100, 0]))
    wanted = {
        b"": [[10, 20, 30], [0] * 3, [200, 100, 0]],
        b"\xff\0": [[10, 20, 30], [255] * 3, [200, 100, 0]],
        b"\x80\x80\x80": [[132, 137, 142], [127] * 3, [227, 177, 127]],
        b"\0" * 9: [[255] * 3] * 3,  # longer than the palette
    }
    for alphas, colours in wanted.items():
        chunks = [palette, chunk(b"tRNS", alphas)] if alphas else [palette]
        for depth, row in ((8, b"\0\1\2"), (2, b"\x18")):
            found = decode(png(3, 1, depth, 3, [row], *chunks), "x")[0]
            assert np.abs(found.astype(int) - colours).max() <= 1, (alphas, depth)


def test_sixteen_bits_and_alpha():
    row = struct.pack(">6H", 65535, 0, 0x8000, 0x1234, 0x5678, 0x9ABC)
    found = decode(png(2, 1, 16, 2, [row]), "x")[0].astype(int)
    assert np.abs(found - [[255, 0, 128], [18, 86, 154]]).max() <= 1
    row = struct.pack(">4H", 0, 65535, 0, 0x8000)  # grey and alpha
    found = decode(png(2, 1, 16, 4, [row]), "x")[0, :, 0].astype(int)
    assert np.abs(found - [0, 127]).max() <= 1
    row = struct.pack(">4H", 65535, 0, 0, 0x8000)
    found = decode(png(1, 1, 16, 6, [row]), "x")[0, 0].astype(int)
    assert np.abs(found - [255, 127, 127]).max() <= 1
    assert decode(encode(Image.new("LA", (1, 1), (0, 64))), "x")[0, 0, 0] == 191
    glass = Image.new("RGBA", (9, 9), (0, 0, 255, 128))
    assert (
        np.abs(decode(encode(glass, "WEBP", lossless=True), "x")[4, 4] - [127, 127, 255.0]).max()
        <= 1
    )


def test_four_colours():
    """CMYK as Adobe writes it, and the same planes said to be YCCK."""
    content = encode(Image.new("CMYK", (8, 8), (90, 140, 60, 40)), "JPEG", quality=100)
    exact = (255 - np.array([90, 140, 60])) * (255 - 40) / 255
    assert np.abs(decode(content, "x")[0, 0] - exact).max() <= 2
    at = content.index(b"Adobe") + 11
    assert content[at] == 0
    ycck = content[:at] + b"\2" + content[at + 1 :]
    stored = Image.new("YCbCr", (1, 1), (255 - 90, 255 - 140, 255 - 60))  # stored inverted
    exact = 255 - np.array(stored.convert("RGB").getpixel((0, 0)))  # libjpeg: C = 255 - R
    exact = exact * (255 - 40) / 255
    assert np.abs(decode(ycck, "x")[0, 0] - exact).max() <= 3


def test_pictures_of_several():
    """The first frame of an animation, and the first picture of a multi-picture JPEG."""
    two = [Image.fromarray(WIDE), Image.fromarray(255 - WIDE)]
    several = {"save_all": True, "append_images": two[1:]}
    assert np.array_equal(decode(encode(two[0], "PNG", **several), "x"), WIDE)
    still = encode(two[0], "PNG", default_image=True, **several)  # its still is no frame
    assert np.array_equal(decode(still, "x"), WIDE)
    assert np.array_equal(decode(encode(two[0], "WEBP", lossless=True, **several), "x"), WIDE)
    multi = encode(two[0], "MPO", quality=95, subsampling=0, **several)
    assert np.abs(decode(multi, "x").astype(int) - WIDE).max() < 12


def test_what_lies_between_the_segments_of_a_jpeg_is_passed_over():
    plain = decode(FILES["JPEG"], "plain")
    head, rest = FILES["JPEG"][:2], FILES["JPEG"][2:]
    segment = b"\xff\xfe\0\3x"
    for between in (
        b"\0" * 999,
        b"\xff\0ab",
        b"\xff" * 9,
        b"\0" * (9 << 20),
    ):
        assert np.array_equal(decode(head + segment + between + rest, "x"), plain), between[:9]
    assert refused(head + segment + b"\0" * (9 << 20))[0] == "unreadable header"


def refused(content):
    with pytest.raises(BadPicture) as caught:
        decode(content, "a.png")
    line = str(caught.value)
    assert line.startswith("a.png: image must ") and "\n" not in line and "Error" not in line
    return caught.value.reason, line


def test_every_refusal_names_its_reason():
    png_file, jpeg = FILES["PNG"], FILES["JPEG"]
    frame = jpeg.index(b"\xff\xc0")
    many = png_file[:16] + struct.pack(">II", 9000, 9000) + png_file[24:]
    cases = {
        b"<!DOCTYPE html><p>404": ("not a picture", "it begins with '<!DOCTYPE html>"),
        b"version https://git-lfs": ("not a picture", "begins with 'version https://"),
        encode(Image.fromarray(WIDE), "GIF"): ("picture of another format", "(GIF)"),
        encode(Image.fromarray(WIDE), "TIFF"): ("picture of another format", "(TIFF)"),
        b"\0\0\0\x20ftypavif\0\0\0\0": ("picture of another format", "(AVIF)"),
        png(0, 9, 8, 0, []): ("no pixels", "(0 x 9)"),
        png(9, 0, 8, 2, []): ("no pixels", "(9 x 0)"),
        jpeg[: frame + 5] + b"\0\0" + jpeg[frame + 7 :]: ("no pixels", "(24 x 0)"),
        jpeg[: frame + 4] + b"\x0c" + jpeg[frame + 5 :]: ("unreadable header", "12-bit"),
        many: ("too many pixels", "(9000 x 9000)"),
        with_chunks(png_file, chunk(b"tEXt", b"") * 100_001): ("too many pieces", ""),
        jpeg[:2] + b"\xff\xfe\0\2" * 100_001 + jpeg[2:]: ("too many pieces", ""),
        FILES["WEBP"] + b"ABCD\0\0\0\0" * 100_001: ("too many pieces", "at most 100000"),
        png_file[:20]: ("unreadable header", ""),
        png_file[:8]: ("unreadable header", "truncated"),
        png_file[:60]: ("does not decode", ""),
        png_file[:45] + b"\xff" + png_file[46:]: ("does not decode", ""),
        jpeg[:-30]: ("does not decode", "truncated"),
        jpeg[: frame + 3]: ("unreadable header", "truncated"),
        jpeg[: frame + 9] + b"\2" + jpeg[frame + 10 :]: ("unreadable header", "2-layer"),
        FILES["WEBP"][:-20]: ("does not decode", "truncated"),
        FILES["WEBP"][:16]: ("does not decode", "truncated"),
        b"RIFF\x10\0\0\0WEBPVP8 \4\0\0\0abcd": ("unreadable header", ""),
    }
    for content, (reason, words) in cases.items():
        found, line = refused(content)
        assert found == reason and words in line, line


def test_damaged_files_are_refused_or_decoded_and_nothing_else():
    rng = random.Random(1)
    for i in range(600):
        content = bytearray(FILES[("JPEG", "PNG", "WEBP")[i % 3]])
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        try:
            image = decode(bytes(content[: rng.randint(1, 2 * len(content))]), "x")
        except BadPicture as problem:
            assert "\n" not in str(problem)
        else:
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
