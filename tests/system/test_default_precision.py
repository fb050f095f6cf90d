"""16 bits on a GPU and fp32 on the CPU, where no precision is asked for. No GPU computes here."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dalle_ext
from dalle import cli
from dalle.commands import presets
from dalle.commands import prior as prior_command
from dalle.commands.drawn import set_precision
from dalle.data.pairs import ArrayPairs
from dalle.demo.context import Demo
from dalle.demo.workspace import Workspace
from dalle.devices import default_precision
from dalle.dvae.blocks import Conv2d
from dalle.dvae.model import DiscreteVAE, DiscreteVAEConfig
from dalle.recipes import load_recipe
from dalle.train.config import LoopConfig
from dalle.train.dvae import DvaeTask, DvaeTrainConfig
from support.dvae import some_pairs
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
    for name in ("bf16", "fp16-scaled"):  # matrices of 16 bits: what fp32 ones are rounded to
        drawn = []
        for half in (False, True):
            prior = build().prior
            prior.config = dataclasses.replace(prior.config, precision=name)
            for block in prior.resblocks().values():
                block.dtype = prior.config.compute_dtype
            if half:
                prior.compute_in_(name)
            text = torch.zeros(2, 7, dtype=torch.int64)
            drawn.append(prior(text, torch.ones(2, 16, dtype=torch.int64)).image_logits)
        assert torch.equal(*drawn)
    # Drawn on the CPU in bf16: the picture's codes are those of a model so rounded.
    said = {}
    with dalle_ext.use_reference():
        for name in ("fp32", "bf16"):
            words = ["sample", CAPTION, "--model", folder, "--out", tmp_path / name]
            assert cli.main([str(w) for w in (*words, "--precision", name)]) == 0
            said[name] = json.loads((tmp_path / name / "samples.json").read_text())
    assert [said[name]["precision"] for name in said] == ["fp32", "bf16"]
    assert said["fp32"]["model"] == said["bf16"]["model"]  # fingerprints of what is in the folder


def dvae_task(precision, parts=1, stem="patch"):
    torch.manual_seed(0)
    sizes = {"group_count": 2, "n_hid": 16, "n_blk_per_group": 1, "n_init": 8, "vocab_size": 16}
    vae = DiscreteVAE(DiscreteVAEConfig(**sizes, stem=stem, patch=2))
    vae.train_precision = precision
    config = DvaeTrainConfig(image_size=8, batch_size=4, augment="none", lr_start=1e-3, parts=parts)
    return DvaeTask(vae, some_pairs(), config)


@pytest.mark.parametrize("stem", ["released", "patch"])
def test_a_dvae_trains_in_bf16_between_fp32_ends(stem):
    task, plain = dvae_task("bf16", stem=stem), dvae_task("fp32", stem=stem)
    seen = {}
    for name, part in task.model.named_modules():
        if isinstance(part, Conv2d):
            part.register_forward_hook(lambda _, __, y, name=name: seen.update({name: y.dtype}))
    found = [task.train_step(step) for step in range(3)]
    ends = {n for n, m in task.model.named_modules() if isinstance(m, Conv2d) and m.fp32}
    assert {n for n, dtype in seen.items() if dtype == torch.float32} == ends and len(ends) == 2
    assert {p.dtype for p in task.model.parameters()} == {torch.float32}
    for step, values in enumerate(found):  # an update differs in what 8 bits leave
        other = plain.train_step(step)
        assert float(values["loss"]) == pytest.approx(float(other["loss"]), rel=2e-2, abs=1e-2)
        assert float(values["loss"]) != float(other["loss"])
    images = torch.rand(2, 3, 8, 8)
    seen.clear()
    task.model.eval()
    tokens = task.model.encode(images)
    task.model.train_precision = "fp32"
    assert torch.equal(tokens, task.model.encode(images)) and set(seen.values()) == {torch.float32}


def test_parts_of_a_batch_are_in_bf16_too():
    """Autocast is of a thread; each part has one."""
    whole, parts = (dvae_task("bf16", n).train_step(0) for n in (1, 2))
    assert float(parts["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-3)
    assert float(parts["loss"]) != float(dvae_task("fp32", 2).train_step(0)["loss"])


def test_a_ranker_trains_in_bf16_and_scores_in_fp32():
    ranker = build().ranker.train()
    images = torch.rand(2, 3, 16, 16)
    plain = ranker.encode_images(images)
    ranker.train_precision = "bf16"
    half = ranker.encode_images(images)
    assert half.dtype == torch.float32 and not torch.equal(half, plain)
    assert torch.allclose(half, plain, atol=0.03)
    assert torch.allclose(half.norm(dim=1), torch.ones(2), atol=1e-6)
    scores = ranker.eval().scores([CAPTION, "a blue square"], images)
    ranker.train_precision = "fp32"
    assert torch.equal(scores, ranker.scores([CAPTION, "a blue square"], images))


def test_the_precision_fixes_a_training():
    """Another one is refused when it is resumed; fp32, as all before, is not named."""
    assert "precision" not in dvae_task("fp32").describe()["train"]
    assert dvae_task("bf16").describe()["train"]["precision"] == "bf16"


def test_of_the_commands(ampere):
    for asked, device, wanted in (
        ("auto", CPU, "fp32"), ("auto", CUDA, "bf16"), ("fp32", CUDA, "fp32"), ("bf16", CPU, "bf16")
    ):  # fmt: skip
        assert presets.precision(asked, device) == wanted
