"""A drawn PNG says how it was drawn; `--again` draws it bit for bit, and trusts no file."""

from __future__ import annotations

import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import dalle_ext
from dalle import cli, pictures
from dalle.data.images import BadPicture, png_text
from dalle.pipeline import Pipeline
from dalle.prior.sampling import SamplingConfig
from support.toy_pipeline import CAPTION, build

WARM = SamplingConfig(temperature=3.0, top_k=9, cond_scale=1.5)


@pytest.fixture(scope="module", autouse=True)
def reference():
    with dalle_ext.use_reference():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "pipeline"
    build(sampling=WARM).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    noise = np.random.default_rng(0).integers(0, 256, (16, 20, 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path


def run(*words):
    return cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def drawn(folder, photo, tmp_path_factory):
    """Folders of runs of `dalle sample`: plain, and with a prime."""
    root = tmp_path_factory.mktemp("runs")
    words = ["sample", "--model", folder, "--num-candidates", 9, "--top", 3, "--seed", 6]
    assert run(*words, CAPTION, "a blue square \u5706", "--out", root / "plain") == 0
    primed = ["--prime-image", photo, "--prime-rows", 1, "--top-p", 0.9, "--precision", "bf16"]
    assert run(*words, CAPTION, *primed, "--out", root / "primed") == 0
    return root


def said(path):
    return json.loads(png_text(path.read_bytes(), path, "dalle"))


def single(out):
    (path,) = out.glob("*/0.png")
    return path


def test_a_picture_says_how_it_was_drawn(drawn, folder, photo):
    records = json.loads((drawn / "plain/samples.json").read_text())["records"]
    models = set()
    for entry in records:
        for place, name in enumerate(entry["files"]):
            found = said(drawn / "plain" / name)
            assert (found["caption"], found["seed"]) == (entry["caption"], 6)
            assert found["candidate"] == entry["candidates"][place]
            assert found["scores"] == {"ranker": entry["scores"][place]}
            assert SamplingConfig(**found["options"]["sampling"]) == WARM
            assert found["options"]["num_candidates"] == 9 and found["command"] == "sample"
            assert found["versions"]["torch"] == torch.__version__
            models.add(found["model"]["pipeline"])
    assert len(models) == 1
    sheet = said(drawn / "plain/00-a-red-circle.png")
    assert sheet["sheet"] is True and sheet["candidates"] == records[0]["candidates"]
    primed = said(single(drawn / "primed"))
    assert primed["options"]["image"]["rows"] == 1 and primed["options"]["precision"] == "bf16"
    for path in drawn.rglob("*.png"):  # no path, of this machine or another
        text = png_text(path.read_bytes(), path, "dalle")
        assert str(folder) not in text and str(photo) not in text and "/" not in text


def test_a_sheet_of_rerank_says_what_it_shows(drawn, folder, tmp_path, capsys):
    words = ["a red circle", "--data", drawn / "plain", "--ranker", folder / "ranker", "--top", 2]
    assert run("rerank", *words, "--out", tmp_path) == 0
    found, report = (
        said(tmp_path / "sorted.png"),
        json.loads((tmp_path / "scores.json").read_text()),
    )
    assert found["ranking"] == report["ranking"][:2] and found["caption"] == "a red circle"
    assert found["model"]["ranker"] == said(single(drawn / "primed"))["model"]["ranker"]
    assert str(drawn) not in json.dumps(found)
    assert run("sample", "--again", tmp_path / "sorted.png", "--model", folder) == 3
    assert "a sheet of many pictures: take a single one" in capsys.readouterr().err


def test_again_draws_every_picture_bit_for_bit(drawn, folder, photo, tmp_path, capsys):
    names = sorted(drawn.glob("plain/*/[0-9].png"))
    assert len(names) == 6
    for path in [*names, single(drawn / "primed")]:
        more = ["--prime-image", photo] if "primed" in str(path) else []
        out = tmp_path / path.parent.name / path.stem / path.parent.parent.name
        assert run("sample", "--again", path, "--model", folder, "--out", out, *more) == 0
        assert single(out).read_bytes() == path.read_bytes()
        entry = json.loads((out / "samples.json").read_text())["records"][0]
        assert entry["candidates"] == [said(path)["candidate"]]
        assert (out / "index.html").exists() and "note" not in capsys.readouterr().err


def test_again_needs_the_same_model(drawn, folder, tmp_path, capsys):
    other = Pipeline.from_pretrained(folder)
    path = single(drawn / "primed").parent / "1.png"
    with torch.no_grad():
        other.prior.image_head.bias[0] += 1e-6
    other.save_pretrained(tmp_path / "other")
    plain = sorted(drawn.glob("plain/*/0.png"))[0]
    words = ["sample", "--again", plain, "--model", tmp_path / "other", "--out", tmp_path / "out"]
    assert run(*words) == 3
    (line,) = capsys.readouterr().err.splitlines()
    wanted = said(plain)["model"]["pipeline"]
    assert line.startswith(f"sample: model must be the one that drew the picture ({wanted}), got ")
    assert not list((tmp_path / "out").rglob("*.png")) and path.exists()
    unranked = Pipeline.from_pretrained(folder)
    unranked.ranker = None  # it decides no pixel
    unranked.save_pretrained(tmp_path / "unranked")
    words = ["sample", "--again", plain, "--model", tmp_path / "unranked"]
    assert run(*words, "--out", tmp_path / "out") == 0
    assert single(tmp_path / "out").read_bytes() == plain.read_bytes()


def test_again_says_where_the_pixels_differ(drawn, folder, tmp_path, capsys):
    plain = sorted(drawn.glob("plain/*/0.png"))[0]
    content = said(plain) | {"pixels": "SHA-256 00", "versions": {"dalle": "0.1", "torch": "1.0"}}
    odd = pictures.save_png(tmp_path / "odd.png", Image.open(plain), content)
    assert run("sample", "--again", odd, "--model", folder, "--out", tmp_path / "out") == 0
    assert (
        "note: the pixels differ from those of the picture, drawn with dalle 0.1, torch 1.0 on"
        in (capsys.readouterr().err)
    )
    found = said(single(tmp_path / "out"))
    assert found["pixels"] == said(plain)["pixels"] and found["scores"] == said(plain)["scores"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([CAPTION], "captions must be left out beside again, whose picture says it, got ("),
        (["--seed", 3], "seed must be left out beside again, whose picture says it, got 3"),
        (
            ["--temperature", 2],
            "sampling must be left out beside again, whose picture says it, got temperature 2.0",
        ),
        (["--num-candidates", 4], "num_candidates must be left out beside again"),
        (["--prime-image", "photo"], "prime_image must be left out, got {photo}: "),
        (["--out", "own", "--overwrite"], "must be none of the pictures that are read"),
    ],
)
def test_options_that_again_does_not_take(drawn, folder, photo, tmp_path, capsys, words, message):
    plain = sorted(drawn.glob("plain/*/0.png"))[0]
    places = {"photo": photo, "own": drawn / "plain"}
    words = [places.get(word, word) for word in words]
    before = {path: path.read_bytes() for path in drawn.rglob("*.png")}
    if "--out" not in words:
        words += ["--out", tmp_path / "out"]
    assert run("sample", *words, "--again", plain, "--model", folder) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message.format(photo=photo) in line and line.startswith("sample: ")
    assert before == {path: path.read_bytes() for path in drawn.rglob("*.png")}


def test_again_needs_the_picture_that_was_drawn_from(drawn, folder, photo, tmp_path, capsys):
    words = ["sample", "--again", single(drawn / "primed"), "--model", folder]
    words += ["--out", tmp_path / "out"]
    assert run(*words) == 2
    assert "sample: prime_image must be given, got nothing: " in capsys.readouterr().err
    pixels = np.array(Image.open(photo))
    pixels[3, 5, 0] ^= 1
    Image.fromarray(pixels).save(tmp_path / "other.png")
    assert run(*words, "--prime-image", tmp_path / "other.png") == 3
    assert "sample: prime_image must be the picture that was drawn from (SHA-256 " in (
        capsys.readouterr().err
    )
    assert not list((tmp_path / "out").rglob("*.png"))


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_text(content, *chunks):
    return content[:33] + b"".join(chunks) + content[33:]


def hostile(good):
    """Name -> a file's bytes, and what the line says."""
    image = Image.new("RGB", (4, 4))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    plain = buffer.getvalue()

    def text(value):
        return with_text(plain, chunk(b"tEXt", b"dalle\0" + value))

    def changed(**changes):
        return text(json.dumps(good | changes).encode())

    options = good["options"]
    huge = zlib.compress(b"[" * (40 << 20), 9)
    return {
        "nothing": (plain, "which has no text 'dalle'"),
        "jpeg": (b"\xff\xd8\xff\xe0" + bytes(40), "image must be a PNG, got: not a PNG (JPEG)"),
        "words": (b"hello", "image must be a PNG, got: not a PNG (no picture)"),
        "empty": (b"", "image must hold bytes"),
        "cut": (plain[:40], "image must have a readable header"),
        "json": (text(b"{"), "whose text 'dalle' is no JSON: "),
        "list": (text(b"[1]"), "whose text 'dalle' is no JSON object"),
        "deep": (text(b"[" * 100_000), "whose text 'dalle' is no JSON: it is nested too deeply"),
        "long": (text(b'"' + b"a" * (2 << 20) + b'"'), "has more than 1048576 letters"),
        "bomb": (
            with_text(plain, chunk(b"zTXt", b"dalle\0\0" + huge)),
            "image must have readable text",
        ),
        "format": (changed(format=2), "whose format is 2 and not 1"),
        "none": (text(b"{}"), "whose format is None and not 1"),
        "sheet": (changed(sheet=True), "a sheet of many pictures: take a single one"),
        "more": (changed(more=1), "PictureRecord has no option 'more'"),
        "caption": (changed(caption=7), "caption must be a string, got 7"),
        "seed": (changed(seed=-1), "seed must be 0 .. 2^63 - 1, got -1"),
        "digits": (text(json.dumps(good).replace("6,", "6" * 5000 + ",", 1).encode()), "no JSON"),
        "candidate": (changed(candidate=2**63), "candidate must be 0 or more"),
        "text": (changed(candidate="1"), "candidate must be an integer, got '1'"),
        "score": (changed(scores={"ranker": float("nan")}), "must be a finite number, got nan"),
        "options": (changed(options=None), "options: config must be a mapping"),
        "heat": (
            changed(options=options | {"sampling": {"temperature": float("inf")}}),
            "temperature must be 0 or more, got inf",
        ),
        "precision": (changed(options=options | {"precision": "int1"}), "precision must be one of"),
        "weights": (changed(options=options | {"weights": "int1"}), "weights must be one of"),
        "device": (changed(options=options | {"device": "moon"}), "device: must be auto, cpu or"),
        "edit": (changed(command="edit"), "type dalle edit --again "),
        "command": (changed(command="rm"), "command must be one of sample, edit"),
    }  # fmt: skip


def test_hostile_files_get_one_line(drawn, folder, tmp_path, capsys):
    good = said(sorted(drawn.glob("plain/*/0.png"))[0])
    words = ["--model", folder, "--out", tmp_path / "out"]
    for name, (content, message) in hostile(good).items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(content)
        code = run("sample", "--again", path, *words)
        shown = capsys.readouterr().err
        assert code in (2, 3) and message in shown and shown.count("\n") == 1, (name, code, shown)
        assert not list((tmp_path / "out").rglob("*.png")), name
    for path in (tmp_path / "missing.png", tmp_path):
        assert run("sample", "--again", path, *words) == 3
        assert "image must be a plain file" in capsys.readouterr().err


def test_text_of_every_kind_is_read(tmp_path):
    for kind in ("add_text", "add_itxt"):
        info = PngImagePlugin.PngInfo()
        getattr(info, kind)("dalle", '{"a": 1}')
        Image.new("L", (2, 2)).save(tmp_path / "x.png", pnginfo=info)
        assert png_text((tmp_path / "x.png").read_bytes(), "x.png", "dalle") == '{"a": 1}'
        assert png_text((tmp_path / "x.png").read_bytes(), "x.png", "other") is None
    path = pictures.save_png(tmp_path / "y.png", Image.new("L", (2, 2)), {"é": "\udce9\u5706"})
    content = path.read_bytes()
    assert json.loads(png_text(content, path, "dalle")) == {"é": "\udce9\u5706"}
    at = content.index(b"tEXt") - 4
    size = 12 + int.from_bytes(content[at : at + 4], "big")
    moved = content[:at] + content[at + size : -12] + content[at : at + size] + content[-12:]
    assert json.loads(png_text(moved, path, "dalle")) == {"é": "\udce9\u5706"}  # as editors do
    many = with_text(content, *[chunk(b"abCd", b"")] * 100_001)
    with pytest.raises(BadPicture, match="have at most 100000 segments or chunks"):
        png_text(many, path, "dalle")
