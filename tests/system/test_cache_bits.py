"""A cache of 8 bits: for column and causal layers alone, near the exact one, in any company.

It travels in `SamplingConfig`, from the command line to the PNG and back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import dalle_ext
from dalle import cli, masks
from dalle.commands.drawn import read_image
from dalle.data.images import png_text
from dalle.errors import UsageError
from dalle.pipeline import Pipeline
from dalle.prior.decode import Decoder, generate
from dalle.prior.model import Prior
from dalle.prior.sampling import SamplingConfig
from dalle.prior.step import candidate_bytes
from support.prior import make, sample
from support.toy_pipeline import CAPTION, build


@pytest.mark.parametrize("reference", [False, True])
def test_eight_bits_are_kept_of_column_and_causal_layers_alone(reference):
    kinds = "row", "column", "conv", "causal"
    model = make(attention=kinds, grid=(4, 3), num_layers=4)
    text, image = sample(model)
    with dalle_ext.use_reference() if reference else contextlib.nullcontext():
        plain, coded = (Decoder(model, 2, 3, cache_bits=bits) for bits in (None, 8))
        for index, kind in enumerate(kinds):
            cache = coded._step.caches[index]
            assert cache.bits == (8 if kind in ("column", "causal") else None)
        for bits, decoder in ((None, plain), (8, coded)):
            assert decoder.num_bytes == 6 * candidate_bytes(model.config, False, bits)
            decoder.set_text(text, image[:, :1])
        for slot in range(1, 12):
            previous = image[:, slot - 1, None].expand(2, 3)
            wanted, found = (decoder.step(slot, previous) for decoder in (plain, coded))
            assert not torch.equal(wanted, found)
            torch.testing.assert_close(found, wanted, atol=0.05, rtol=0.05)


def test_eight_bits_draw_the_same_in_any_company():
    model = make(attention=("column", "causal", "row"))
    text, _ = sample(model, batch=2)
    eight = SamplingConfig(cache_bits=8, cond_scale=2.0)
    whole = generate(model, text, num_samples=6, seed=4, sampling=eight)
    parts = [
        generate(model, text, num_samples=3, seed=4, sampling=eight, first_sample=first)
        for first in (0, 3)
    ]
    assert torch.equal(whole, torch.cat(parts, 1))
    alone = model.generate(
        text[1:], num_samples=6, seed=4, cache_bits=8, cond_scale=2.0, max_batch=1
    )
    assert torch.equal(whole[1:], alone)


@pytest.mark.parametrize("bits", [4, 16, 0, True, "8", 8.0])
def test_other_bits_are_refused(bits):
    with pytest.raises(UsageError, match=r"^Decoder: cache_bits must be 8 or left out, got"):
        Decoder(make(), 1, 1, cache_bits=bits)
    with pytest.raises(UsageError, match=r"^generate: cache_bits must be 8 or left out, got"):
        SamplingConfig(cache_bits=bits)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "pipeline"
    pipeline = build()
    c = dataclasses.replace(pipeline.prior.config, attention=("causal", "column"))
    torch.manual_seed(1)
    pipeline.prior = Prior(c).eval()
    torch.nn.init.normal_(pipeline.prior.image_head.weight)
    pipeline.save_pretrained(path)
    return path


def run(*words):
    return cli.main([str(word) for word in words])


def said(path):
    return json.loads(png_text(path.read_bytes(), path, "dalle"))


def test_a_picture_of_eight_bits_says_so_and_is_drawn_again(folder, tmp_path, capsys):
    words = ["sample", CAPTION, "--model", folder, "--num-candidates", 5, "--seed", 3]
    assert run(*words, "--cache-bits", 8, "--out", tmp_path / "eight") == 0
    record = json.loads((tmp_path / "eight/samples.json").read_text())
    assert record["sampling"]["cache_bits"] == 8
    assert "cache bits 8" in (tmp_path / "eight/index.html").read_text()
    pipeline = Pipeline.from_pretrained(folder)
    found = pipeline.generate(CAPTION, num_candidates=5, seed=3, cache_bits=8)
    assert record["records"][0]["candidates"] == found.order.tolist()
    for path in sorted((tmp_path / "eight").glob("*/[0-9].png")):
        assert said(path)["options"]["sampling"]["cache_bits"] == 8
        again = ["sample", "--again", path, "--model", folder, "--out", tmp_path / "again"]
        assert run(*again, "--overwrite") == 0
        drawn = next((tmp_path / "again").glob("*/0.png"))
        assert drawn.read_bytes() == path.read_bytes()
    capsys.readouterr()
    assert run("sample", "--again", path, "--cache-bits", 8) == 2
    assert run(*words, "--cache-bits", 4) == 2
    error = capsys.readouterr().err
    assert "must be left out beside again" in error
    assert "cache_bits must be 8 or left out, got 4" in error and "Traceback" not in error


def test_an_edit_of_eight_bits_is_that_of_the_command_line(folder, tmp_path):
    path = tmp_path / "photo.png"
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(path)
    words = ["edit", "--image", path, "--caption", CAPTION, "--model", folder, "--seed", 3]
    words += ["--box", "4,4,12,8", "--num-candidates", 5, "--cache-bits", 8]
    assert run(*words, "--out", tmp_path / "eight") == 0
    drawn = sorted((tmp_path / "eight").glob("*/[0-9].png"))
    pipeline = Pipeline.from_pretrained(folder)
    image, keep = read_image(path, 16), masks.outside_boxes([masks.parse_box("4,4,12,8")], 16, 16)
    found = pipeline.edit(
        image, CAPTION, keep=keep, num_candidates=5, top=len(drawn), seed=3, cache_bits=8
    )
    numbers = [said(path)["candidate"] for path in drawn]
    assert (
        numbers == found.order.tolist() and said(drawn[0])["options"]["sampling"]["cache_bits"] == 8
    )
    again = ["edit", "--again", drawn[0], "--image", path, "--model", folder]
    assert run(*again, "--out", tmp_path / "again") == 0
    assert next((tmp_path / "again").glob("*/0.png")).read_bytes() == drawn[0].read_bytes()
