"""A dVAE keeps the size that it was trained on, and every command takes its pictures at it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from dalle.commands import dvae as dvae_command
from dalle.commands.encode import EncodeConfig, encode
from dalle.dvae.model import DiscreteVAE
from dalle.dvae.picture_size import remember_size, side_for, trained_size
from dalle.errors import UsageError
from dalle.evaluate.reconstruction import recon
from dalle.train.fine_tune import load_start
from support.dvae import make_task
from support.prior import make_parts
from support.toy_pipeline import build


def pictures(folder, count=6, side=40):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


def test_a_training_leaves_its_size_in_the_model_folder(tmp_path):
    task = make_task()
    assert trained_size(task.model) == task.config.image_size
    task.model.save_pretrained(tmp_path / "vae")
    loaded = DiscreteVAE.from_pretrained(tmp_path / "vae")
    assert trained_size(loaded) == task.config.image_size
    start = load_start(DiscreteVAE, tmp_path / "vae")  # of `--init-from`
    assert trained_size(start) == task.config.image_size and "init_from" in start.trained_on


def test_where_the_model_does_not_say_it_its_run_or_its_pipeline_does(tmp_path):
    pipeline = build()
    pipeline.save_pretrained(tmp_path / "pipeline")
    folder = tmp_path / "pipeline/vae"
    vae = DiscreteVAE.from_pretrained(folder)
    assert not vae.trained_on and trained_size(vae) == 0
    assert trained_size(vae, folder) == pipeline.image_size
    config = tmp_path / "pipeline/config.yaml"
    for text, size in {
        f"image-size: {4 * vae.factor}": 4 * vae.factor,
        "image-size: none": pipeline.image_size,
        f"image-size: {vae.factor + 1}": pipeline.image_size,  # of no whole token
    }.items():
        config.write_text(text)
        assert trained_size(vae, folder) == size
    config.unlink()
    (tmp_path / "pipeline/prior/config.json").write_text('{"config": {"grid": ["x", 3]}}')
    assert trained_size(vae, folder) == 0
    remember_size(vae, 2 * vae.factor)
    assert trained_size(vae, folder) == 2 * vae.factor


@pytest.mark.parametrize("said", ["-8", "1e3", "", "9" * 9, "²"])
def test_a_size_that_is_none_is_unknown(said):
    vae = make_parts()[1]
    vae.trained_on = {"image_size": said}
    assert trained_size(vae) == 0


def test_an_unknown_size_is_said_and_another_may_be_asked_for(tmp_path, capsys):
    vae = make_parts()[1]
    assert vae.factor == 2
    assert side_for("data encode", vae, tmp_path / "vae") == 256
    assert side_for("data encode", vae, otherwise=9) == 8
    first, second = capsys.readouterr().err.splitlines()
    assert first == (
        f"data encode: {tmp_path / 'vae'} does not say on which size it was trained; pictures are "
        "of 256 x 256 pixels, --image-size takes another size"
    )
    assert second.startswith("data encode: the dVAE does not say on which size it was trained; ")
    remember_size(vae, 12)
    assert side_for("data encode", vae) == 12 and side_for("data encode", vae, asked=6) == 6
    with pytest.raises(UsageError, match=r"^data encode: image_size must be a multiple of 2, .*7$"):
        side_for("data encode", vae, asked=7)
    assert capsys.readouterr().err == ""


def test_codes_reconstructions_and_measures_are_of_that_size(tmp_path, capsys):
    vae = make_parts()[1]
    remember_size(vae, 12)
    vae.save_pretrained(tmp_path / "vae")
    data = str(pictures(tmp_path / "pairs"))
    encode(EncodeConfig(data=data, vae=tmp_path / "vae", out=tmp_path / "codes"))
    head = json.loads((tmp_path / "codes/codes.json").read_text())
    assert (head["image_size"], head["grid"]) == (12, [6, 6])
    config = dvae_command.ReconstructConfig(
        data=data, model=tmp_path / "vae", out=tmp_path / "sheet.png", limit=3
    )
    dvae_command.reconstruct(config)
    result = recon(data, tmp_path / "vae", cache=tmp_path / "cache", bootstrap=0)
    assert result["side"] == 12 and recon(data, vae, cache=tmp_path / "cache")["side"] == 12
    assert "does not say" not in capsys.readouterr().err


def test_a_size_does_not_change_what_a_training_is():
    """So a checkpoint of before goes on."""
    task = make_task()
    before = task.describe()
    remember_size(task.model, 2 * task.config.image_size)
    assert task.describe() == before
