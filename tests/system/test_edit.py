"""`dalle edit` redraws what masks, boxes and rows say, writes a run, and refuses the rest."""

from __future__ import annotations

import json
import os
import re
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import dalle_ext
from dalle import cli, masks
from dalle.commands import edit as command
from dalle.data.augment import center_crop, to_tensor
from dalle.data.images import png_text
from dalle.pipeline import Pipeline
from dalle.prior.sampling import SamplingConfig
from dalle.prior.step import candidate_bytes
from support.toy_pipeline import CAPTION, build

WARM = SamplingConfig(temperature=3.0)
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)


@pytest.fixture(scope="module", autouse=True)
def reference():
    with dalle_ext.use_reference():
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A pipeline, a photo of 24 x 16, its square, and masks."""
    path = tmp_path_factory.mktemp("home")
    build(sampling=WARM, num_candidates=12).save_pretrained(path / "pipeline")
    Image.fromarray(PIXELS).save(path / "photo.png")
    Image.fromarray(PIXELS[:, 4:20]).save(path / "square.png")
    hole = np.zeros((16, 24), np.uint8)
    hole[5:9, 9:12] = 255  # of the square's rows 1 and 2, column 1
    for name, mask in (
        ("hole", hole), ("square-hole", hole[:, 4:20]), ("white", hole | 255), ("black", hole & 0),
        ("large", np.kron(hole, np.ones((3, 3), np.uint8))), ("narrow", hole[:, :20]),
        ("half", hole[::2, ::2]), ("checks", (np.indices((16, 24)).sum(0) % 2 * 255)),
    ):  # fmt: skip
        Image.fromarray(mask.astype(np.uint8)).save(path / f"{name}.png")
    hole = np.dstack([PIXELS, 255 - hole])
    Image.fromarray(hole).save(path / "transparent.png")
    (path / "words.txt").write_text("words")
    return path


def run(home, *words, image="photo.png", caption=CAPTION, out="out"):
    first = ["edit", "--model", home / "pipeline", "--image", home / image, "--out", out]
    first += [] if caption is None else ["--caption", caption]
    return cli.main([str(word) for word in [*first, *words]])


def kept(out):
    return " ".join(json.loads((out / "samples.json").read_text())["keep"])


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], "#### #### .... ...."),  # 15 of 32 rows
        (["--keep-rows", 1], "#### .... .... ...."),
        (["--redraw-rows", 1], "#### #### #### ...."),
        (["--mask", "hole"], "#### #.## #.## ####"),
        (["--mask", "square-hole"], "#### #.## #.## ####"),
        (["--mask", "large"], "#### #.## #.## ####"),
        (["--mask", "half"], "#### #.## #.## ####"),
        (["--mask", "transparent"], "#### #.## #.## ####"),
        (["--mask", "hole", "--redraw-rows", 1], "#### #.## #.## ...."),
        (["--box", "8,4"], "#### ##.. ##.. ##.."),  # down to the corner
        (["--box", "4,4,8,8"], "#### #.## #### ####"),
        (["--box", "3,4,8,8"], "#### ..## #### ####"),
        (["--box", "0,0,4,4", "--box", "12,12,16,16"], ".### #### #### ###."),
        (["--box", "0,0,4,4", "12,12"], ".### #### #### ###."),
        (["--box", "1,1,3,2", "--box-units", "tokens"], "#### #..# #### ####"),
        (["--box", "2,2", "--box-units", "tokens", "--invert"], ".... .... ..## ..##"),
        (["--box", "0,4,9,8", "--box-units", "input"], "#### ..## #### ####"),
    ],
)
def test_what_is_redrawn(home, tmp_path, words, wanted):
    words = [home / f"{w}.png" if (home / f"{w}.png").exists() else w for w in words]
    assert run(home, *words, "--num-candidates", 3, out=tmp_path) == 0
    assert kept(tmp_path) == wanted
    pipeline = Pipeline.from_pretrained(home / "pipeline")
    image = to_tensor([center_crop(PIXELS, 16)])[0]
    keep = torch.tensor([[mark == "#" for mark in row] for row in wanted.split()])
    found = pipeline.edit(image, CAPTION, keep=keep, num_candidates=3)
    entry = json.loads((tmp_path / "samples.json").read_text())["records"][0]
    assert entry["candidates"] == list(dict.fromkeys(found.order.tolist()))
    shown = np.array(Image.open(tmp_path / entry["files"][0]))
    assert np.array_equal(shown, (found.images[0] * 255).round().byte().permute(1, 2, 0).numpy())


def test_a_run_is_written_as_by_sample(home, tmp_path, capsys):
    words = ["--mask", home / "hole.png", "--top", 3, "--seed", 5]
    assert run(home, *words, out=tmp_path / "out") == 0
    said = json.loads((tmp_path / "out/samples.json").read_text())
    assert (said["command"], said["num_candidates"], said["seed"]) == ("edit", 12, 5)
    page = (tmp_path / "out/index.html").read_text()
    assert "<title>dalle edit</title>" in page
    assert re.findall(r'src="([^"]+)"', page) == said["records"][0]["files"]
    assert (tmp_path / "out/00-a-red-circle.png").exists()
    shown = capsys.readouterr()
    assert "edit: 2 of 16 tokens are redrawn" in shown.err and "look at" in shown.out
    assert run(home, *words, out=tmp_path / "out") == 0
    assert (tmp_path / "out-2/samples.json").exists()
    before = (tmp_path / "out/00-a-red-circle/0.png").read_bytes()
    assert run(home, *words, "--overwrite", out=tmp_path / "out") == 0
    assert (tmp_path / "out/00-a-red-circle/0.png").read_bytes() == before


@pytest.mark.parametrize("image", ["photo.png", "square.png"])
def test_pasted_pixels_are_those_of_the_picture(home, tmp_path, image):
    words = ["--mask", home / "hole.png"] if image == "photo.png" else ["--box", "5,5,8,9"]
    assert run(home, *words, "--paste", "--top", 2, image=image, out=tmp_path) == 0
    own = np.ones((16, 16), bool)
    own[5:9, 5:8] = False  # as the mask says, though whole tokens are redrawn
    for path in tmp_path.glob("*/*.png"):
        found = np.array(Image.open(path))
        assert np.array_equal(found[own], PIXELS[:, 4:20][own])
        assert not np.array_equal(found[~own], PIXELS[:, 4:20][~own])


@pytest.mark.parametrize("words", [["--keep-rows", 2], ["--mask", "hole.png", "--paste"]])
def test_an_edit_is_drawn_again(home, tmp_path, words, capsys):
    words = [home / w if str(w).endswith(".png") else w for w in words]
    assert run(home, *words, "--top-p", 0.9, "--top", 3, out=tmp_path / "out") == 0
    for path in sorted((tmp_path / "out").glob("*/*.png")):
        text = png_text(path.read_bytes(), path, "dalle")
        assert str(home) not in text and json.loads(text)["options"]["image"]["keep"]
        out = tmp_path / path.stem
        again = ["edit", "--again", path, "--image", home / "square.png", "--out", out]
        again += ["--model", home / "pipeline"]
        assert cli.main([str(word) for word in again]) == 0
        assert (out / "00-a-red-circle/0.png").read_bytes() == path.read_bytes()
    other = [home / "hole.png" if w == home / "square.png" else w for w in again]
    capsys.readouterr()
    assert cli.main([str(word) for word in other]) == 3
    assert "edit: image must be the picture that was drawn from (SHA-256" in capsys.readouterr().err
    assert cli.main([str(word) for word in ["sample", "--again", path, "--out", out]]) == 3
    assert f"type dalle edit --again {path} --image PICTURE" in capsys.readouterr().err
    assert cli.main([str(word) for word in [*again, "--keep-rows", 1]]) == 2
    assert "edit: keep_rows must be left out beside again" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "?", "AAAA", "a" * 100_000, "bomb"])
def test_a_hostile_mask_in_a_picture_gets_one_line(home, tmp_path, capsys, text):
    if text == "bomb":
        text = masks.packed(torch.zeros(4096, 4096, dtype=torch.bool))
    assert run(home, "--top", 1, out=tmp_path / "out") == 0
    (path,) = (tmp_path / "out").glob("*/0.png")
    said = json.loads(png_text(path.read_bytes(), path, "dalle"))
    said["options"]["image"]["keep"] = text
    command.pictures.save_png(path, Image.open(path), said)
    again = ["edit", "--again", path, "--image", home / "square.png", "--out", tmp_path / "new"]
    capsys.readouterr()
    assert cli.main([str(word) for word in [*again, "--model", home / "pipeline"]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("edit: keep must be a mask ") and len(line) < 200


def test_packed_masks_come_back():
    for side in (1, 4, 7, 16):
        mask = torch.rand(side, side) < 0.5
        assert torch.equal(masks.unpacked(masks.packed(mask), side), mask)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mask", "white.png"], "keep must keep a whole token, got a mask that keeps none"),
        (["--mask", "checks.png"], "keep must keep a whole token, got a mask that keeps none"),
        (["--mask", "black.png"], "keep must leave a token to draw, got a mask that keeps all"),
        (
            ["--mask", "narrow.png"],
            "mask must be square or have the proportions of the picture (24",
        ),
        (["--mask", "words.txt"], "words.txt: image must be one of JPEG, PNG, WEBP"),
        (["--mask", "none.png"], "none.png: image must be a plain file"),
        (["--mask", "white.png", "--invert"], "keep must leave a token to draw"),
        (["--box", "0,0,17,4"], "box must have 0 <= x0 < x1 <= 16 and 0 <= y0 < y1 <= 16, got 0,0"),
        (["--box", "0,0,5,4", "--box-units", "tokens"], "box must have 0 <= x0 < x1 <= 4 and"),
        (["--box", "4,4,4,8"], "box must have 0 <= x0 < x1 <= 16"),
        (
            ["--box", "0,0,25,4", "--box-units", "input"],
            "box must have 0 <= x0 < x1 <= 24 and 0 <=",
        ),
        (["--box", "0,0,4,9", "--box-units", "input"], "keep must leave a token to draw"),
        (["--box=-1,0,4,4"], "box must have 0 <= x0 < x1 <= 16"),
        (["--box", "0,0"], "keep must keep a whole token"),
        (["--box", "1,2,3"], "box must be x0,y0,x1,y1 or x0,y0, got '1,2,3'"),
        (["--box", "a"], "box must be x0,y0,x1,y1 or x0,y0, got 'a'"),
        (["--keep-rows", 0], "keep_rows must be 1 to 3, got 0"),
        (["--keep-rows", 4], "keep_rows must be 1 to 3, got 4"),
        (["--redraw-rows", 4], "redraw_rows must be 1 to 3, got 4"),
        (["--redraw-rows", 1, "--keep-rows", 1], "redraw_rows must be left out beside keep_rows"),
        (["--invert"], "invert must be given with a mask or a box"),
        (["--caption", " "], "caption must hold a word, got ' '"),
        (["--caption", "a red circle " * 9], "caption must have at most 7 tokens, got more in"),
        (["--num-candidates", 0], "num_candidates must be 1 or more, got 0"),
        (["--top", 0], "top must be 1 or more, got 0"),
        (["--seed", -1], "seed must be 0 or more, got -1"),
        (["--image", "none.png"], "none.png: image must be a plain file"),
        (["--image", "words.txt"], "words.txt: image must be one of JPEG, PNG, WEBP"),
        (["--model", "nowhere"], "config.json: must be a readable file"),
    ],
)
def test_what_does_not_fit_gets_one_line(home, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(home)
    assert run(home, *words, out=tmp_path / "out") in (2, 3)
    shown = capsys.readouterr().err.splitlines()
    assert message in shown[-1] and not list((tmp_path / "out").rglob("*.png")), shown
    assert len([line for line in shown if "tokens" not in line or line == shown[-1]]) == 1


def test_candidates_that_do_not_fit_the_memory(home, tmp_path, capsys, monkeypatch):
    """So many as are weighted together; given rows alone are drawn in parts that fit."""
    each = candidate_bytes(build().prior.config, guided=False)
    for module in ("dalle.commands.fits", "dalle.memory", "dalle.prior.step"):
        monkeypatch.setattr(f"{module}.free_memory", lambda *_: 200_000)
    assert 1 <= 200_000 // each < 200
    words = ["--num-candidates", 200, "--top", 1]
    assert run(home, "--mask", home / "hole.png", *words, out=tmp_path / "a") == 4
    line = capsys.readouterr().err.splitlines()[-1]
    fits = 1 << (200_000 // each).bit_length() - 1
    assert line.startswith("edit: memory must hold ") and " for 200 candidates at a time" in line
    assert line.endswith(f"; --num-candidates {fits} would fit")
    assert run(home, *words, out=tmp_path / "b") == 0


def test_what_is_missing_gets_one_line(home, tmp_path, capsys):
    assert run(home, caption=None, out=tmp_path / "out") == 2
    assert "edit: caption must be given, got nothing" in capsys.readouterr().err
    for words in (["--box", "--paste"], ["--box", "0,0", "--box"], ["--box", "0,0", "--box", ""]):
        assert run(home, *words, out=tmp_path / "out") == 2
        assert "dalle edit: --box must have a value, got" in capsys.readouterr().err
    assert cli.main(["edit", "--caption", "a"]) == 2
    assert "dalle edit: --image must be given, got nothing" in capsys.readouterr().err


def test_boxes_may_stand_in_a_file(home, tmp_path):
    (tmp_path / "o.yaml").write_text('box: ["0,0,4,4", "12,12"]\npaste: true\n')
    assert run(home, "--config", tmp_path / "o.yaml", out=tmp_path / "a") == 0
    assert kept(tmp_path / "a") == ".### #### #### ###."
    words = ["--config", tmp_path / "o.yaml", "--box", "0,0,4,4"]  # the command line wins
    assert run(home, *words, out=tmp_path / "b") == 0
    assert kept(tmp_path / "b") == ".### #### #### ####"


@pytest.mark.parametrize("after", [2, 3, 15])
def test_control_c_writes_what_there_is(home, tmp_path, capsys, monkeypatch, after):
    """The first redrawn code is 5: a row ends after 3 codes, the first of two groups after 11."""
    monkeypatch.setattr("dalle.editing.GROUP", 6)
    calls = []

    class Shown:
        def __enter__(self):
            return lambda *call: (
                calls.append(call) or (len(calls) == after and os.kill(os.getpid(), signal.SIGINT))
            )

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(command, "progress_shown", lambda name: Shown())
    code = run(home, "--mask", home / "hole.png", "--top", 2, out=tmp_path)
    lines = capsys.readouterr().err.splitlines()
    found = list(tmp_path.rglob("*.png"))
    assert code == 6
    if after == 2:
        assert lines[-1] == "edit: stopped by SIGINT before the first row was finished"
        assert not found
        return
    done = 6 if after == 15 else 0
    assert lines[-1].startswith(f"edit: stopped by SIGINT after {done} of 12 candidates; what was")
    (entry,) = json.loads((tmp_path / "samples.json").read_text())["records"]
    assert (entry["finished"], entry["rows"]) == (done, 4 if done else 2) and len(found) >= 2
    (single,) = tmp_path.glob("*/0.png")
    text, pixels = png_text(single.read_bytes(), single, "dalle"), np.array(Image.open(single))
    assert (text is None) == (pixels[8:] == 128).all() == (done == 0)
