"""16 bits on a GPU and fp32 on the CPU, where no precision is asked for. No GPU computes here."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dalle_ext
from dalle import cli
from dalle.commands import prior as prior_command
from dalle.commands.sample import set_precision
from dalle.data.pairs import ArrayPairs
from dalle.demo.context import Demo
from dalle.demo.workspace import Workspace
from dalle.devices import default_precision
from dalle.dvae.model import DiscreteVAE
from dalle.recipes import load_recipe
from dalle.train.config import LoopConfig
from support.toy_pipeline import CAPTION, build

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "pipeline"
    build(num_candidates=2).save_pretrained(path)
    return path


def test_the_rule(monkeypatch):
    for supported, plain in ((True, "bf16"), (False, "fp32")):
        asked = []
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation, s=supported, a=asked: a.append(including_emulation) or s,
        )
        assert default_precision(CUDA) == plain and asked == [False]
        assert default_precision(CUDA, scaled=True) == "fp16-scaled"
        for other in (CPU, torch.device("mps")):
            assert default_precision(other) == default_precision(other, scaled=True) == "fp32"


@pytest.mark.parametrize(
    ("device", "recipe", "wanted"),
    [(CPU, "quick", "fp32"), (CPU, "paper", "fp32"), (CUDA, "quick", "bf16"),
     (CUDA, "paper", "fp16-scaled")],
)  # fmt: skip
def test_of_prior_train(folder, monkeypatch, ampere, device, recipe, wanted):
    monkeypatch.setattr(DiscreteVAE, "to", lambda self, device: self)
    pairs = ArrayPairs("two", np.zeros((2, 24, 24, 3), np.uint8), [CAPTION, "a blue square"])
    monkeypatch.setattr(prior_command.presets, "open_pairs", lambda *_: pairs)
    config = prior_command.PriorCommandConfig(
        data="shapes", tokenizer=folder / "tokenizer", vae=folder / "vae", recipe=recipe,
        image_size=24, validation=0.0, loop=LoopConfig(out=folder / "out", steps=4),
    )  # fmt: skip
    made = prior_command.plan(config, SimpleNamespace(device=device, size=1))
    assert made.config.precision == wanted
    # What the recipe has beside it stays possible: Muon and parts side by side with bf16.
    assert made.train.parts == (2 if recipe == "quick" else 1)
    assert made.train.optimizer == ("muon" if recipe == "quick" else "auto")


def test_of_the_demo_is_that_of_its_first_run(tmp_path, ampere):
    recipe, pipeline = load_recipe("shapes", "smoke"), build()

    def demo(device):
        made = Demo(Workspace("demo", tmp_path, {"data": "shapes"}, 0), recipe, None, device)
        return recipe.prior_config(pipeline.tokenizer, pipeline.vae, made.precision).precision

    assert demo(CUDA) == demo(CPU) == "bf16"  # a checkpoint of it goes on elsewhere


def test_of_sample(folder, tmp_path, ampere):
    for asked, trained, device, wanted in (
        ("auto", "fp32", CPU, "fp32"), ("auto", "fp32", CUDA, "bf16"),
        ("fp32", "fp32", CUDA, "fp32"), ("bf16", "fp32", CPU, "bf16"),
        ("auto", "fp16-scaled", CPU, "fp16-scaled"), ("auto", "fp16-scaled", CUDA, "fp16-scaled"),
        ("fp32", "fp16-scaled", CPU, "fp32"),
    ):  # fmt: skip
        pipeline = build()
        if trained != "fp32":
            pipeline.prior.compute_in_(trained)
        set_precision(pipeline, asked, device)
        config, block = pipeline.prior.config, pipeline.prior.layers[0].attention
        assert config.precision == wanted
        assert block.dtype == block.qkv.weight.dtype == config.compute_dtype == config.weight_dtype
        assert block.qkv.bias.dtype == block.norm.weight.dtype == torch.float32
    # Drawn on the CPU in bf16: the picture's codes are those of a model so rounded.
    said = {}
    with dalle_ext.use_reference():
        for name in ("fp32", "bf16"):
            words = ["sample", CAPTION, "--model", folder, "--out", tmp_path / name]
            assert cli.main([str(w) for w in (*words, "--precision", name)]) == 0
            said[name] = json.loads((tmp_path / name / "samples.json").read_text())
    assert [said[name]["precision"] for name in said] == ["fp32", "bf16"]
    assert said["fp32"]["model"] == said["bf16"]["model"]  # fingerprints of what is in the folder
