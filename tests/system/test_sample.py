"""`dalle sample` draws as the pipeline says, and what a pipeline says is kept in its folder."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import dalle_ext
from dalle import cli
from dalle.demo.stages import prior_stage
from dalle.errors import CheckpointError, UsageError
from dalle.pipeline import Pipeline, write_config
from dalle.prior.sampling import SamplingConfig
from support.toy_pipeline import CAPTION, build

WARM = SamplingConfig(temperature=9.0, top_k=7, top_p=0.9, cond_scale=1.5)


@pytest.fixture(scope="module", autouse=True)
def reference():
    with dalle_ext.use_reference():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline that is drawn from at temperature 9, of the 7 likeliest codes."""
    path = tmp_path_factory.mktemp("model") / "pipeline"
    build(sampling=WARM, num_candidates=6).save_pretrained(path)
    return path


def run(*words):
    return cli.main([str(word) for word in words])


def test_a_pipeline_keeps_how_it_is_drawn_from(folder):
    pipeline, plain = Pipeline.from_pretrained(folder), build()
    assert pipeline.sampling == WARM and pipeline.num_candidates == 6
    tokens = pipeline.sample([CAPTION])
    assert torch.equal(tokens, plain.sample([CAPTION], 6, WARM))
    assert not torch.equal(tokens, plain.sample([CAPTION], 6))
    found = pipeline.generate(CAPTION)
    assert sorted(found.order.tolist()) == list(range(6))  # six candidates, and so many kept
    assert torch.equal(found.tokens, tokens[0, found.order])
    # What a call says takes the place of what the pipeline says, the rest stays.
    found = pipeline.generate(CAPTION, num_candidates=3, top_k=2)
    changed = SamplingConfig(temperature=9.0, top_k=2, top_p=0.9, cond_scale=1.5)
    assert torch.equal(found.tokens, plain.sample([CAPTION], 3, changed)[0, found.order])
    everything = {"temperature": 1.0, "top_k": 16, "top_p": 1.0, "cond_scale": 1.0}
    found = pipeline.generate(CAPTION, num_candidates=6, **everything)
    assert torch.equal(found.tokens, plain.sample([CAPTION], 6)[0, found.order])


def test_an_older_pipeline_is_drawn_from_as_before(folder, tmp_path, monkeypatch):
    build(ranker=False).save_pretrained(tmp_path)
    head = json.loads((tmp_path / "config.json").read_text())
    assert head.pop("sampling") == {
        "temperature": 1.0, "top_k": None, "top_p": None, "cond_scale": 1.0
    }  # fmt: skip
    assert head.pop("num_candidates") is None
    (tmp_path / "config.json").write_text(json.dumps(head))
    pipeline = Pipeline.from_pretrained(tmp_path)
    assert pipeline.sampling == SamplingConfig() and pipeline.num_candidates is None
    assert pipeline.sample([CAPTION]).shape[1] == 512
    assert pipeline.generate(CAPTION, num_candidates=9).images.shape[0] == 8


@pytest.mark.parametrize(
    "head",
    [
        {"sampling": None},
        {"sampling": [1]},
        {"sampling": {"temperature": -1}},
        {"sampling": {"temperature": "hot"}},
        {"sampling": {"top_k": 0}},
        {"sampling": {"cond_scale": 1e300}},
        {"sampling": {"heat": 1}},
        {"num_candidates": 0},
        {"num_candidates": "8"},
        {"num_candidates": True},
        {"num_candidates": 10**12},
    ],
)
def test_damaged_options_get_one_line(folder, tmp_path, head):
    for part in ("tokenizer", "vae", "prior", "ranker"):
        (tmp_path / part).symlink_to(folder / part)
    write_config(tmp_path, ranker=True)
    before = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(before | head))
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}: .*{next(iter(head))}") as error:
        Pipeline.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_options_out_of_range_are_refused_before_they_are_kept():
    for options in ({"num_candidates": 0}, {"sampling": SamplingConfig(temperature=1e9)}):
        with pytest.raises(UsageError, match="must be"):
            build(ranker=False, **options)


def test_sample_draws_as_the_pipeline_says_and_flags_change_it(folder, tmp_path):
    assert run("sample", CAPTION, "--model", folder, "--out", tmp_path / "a") == 0
    wanted = Pipeline.from_pretrained(folder).generate(CAPTION)
    records = json.loads((tmp_path / "a/samples.json").read_text())
    assert records[0]["candidates"] == wanted.order.tolist()
    words = ["--temperature", 1, "--num-candidates", 9, "--top", 2, "--out", tmp_path / "b"]
    assert run("sample", CAPTION, "--model", folder, *words) == 0
    wanted = Pipeline.from_pretrained(folder).generate(CAPTION, temperature=1, num_candidates=9)
    records = json.loads((tmp_path / "b/samples.json").read_text())
    assert records[0]["candidates"] == wanted.order[:2].tolist()


def test_the_demo_keeps_its_recipe(tmp_path):
    space = SimpleNamespace(trained=lambda part: True, pipeline=tmp_path)
    recipe = SimpleNamespace(sampling=WARM, num_candidates=5)
    prior_stage(SimpleNamespace(space=space, recipe=recipe))
    head = json.loads((tmp_path / "config.json").read_text())
    assert SamplingConfig(**head["sampling"]) == WARM and head["num_candidates"] == 5


def test_pipeline_make_keeps_the_flags(folder, tmp_path):
    parts = [word for n in ("tokenizer", "vae", "prior") for word in (f"--{n}", folder / n)]
    words = ["--out", tmp_path / "out", "--temperature", 0.5, "--top-p", 0.8]
    assert run("pipeline", "make", *parts, *words, "--num-candidates", 12) == 0
    made = Pipeline.from_pretrained(tmp_path / "out")
    assert made.sampling == SamplingConfig(temperature=0.5, top_p=0.8)
    assert made.num_candidates == 12
    again = [*parts, "--out", tmp_path / "other"]
    assert run("pipeline", "make", *again, "--num-candidates", 0) == 2
