"""A pipeline samples, sorts by score, primes with rows of a picture, loads from its folder."""

from __future__ import annotations

import json
import re
import shlex
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import dalle_ext
from dalle import cli
from dalle.errors import CheckpointError, DataError, UsageError
from dalle.pipeline import Pipeline
from dalle.prior.model import Prior
from dalle.prior.sampling import SamplingConfig
from dalle.ranker.model import ContrastiveRanker
from dalle.tokenizer import Tokenizer
from support.toy_pipeline import CAPTION, build

HOT = SamplingConfig(temperature=9.0)  # the toy repeats itself at 1


@pytest.fixture(scope="module", autouse=True)
def reference():
    with dalle_ext.use_reference():
        yield


@pytest.fixture(scope="module")
def pipeline():
    return build()


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(path)
    return path


def test_a_callers_autocast_changes_no_bit(pipeline):
    def everything():
        drawn = pipeline.generate(CAPTION, num_candidates=3, top=3, sampling=HOT)
        given = pipeline.prime_tokens(drawn.images[0], 1)
        keep = torch.zeros(pipeline.grid, dtype=torch.bool)
        keep[0] = True
        edit = pipeline.edit(drawn.images[0], CAPTION, keep=keep, num_candidates=2, top=2)
        return drawn.images, drawn.scores, given, edit.images, edit.scores

    wanted = everything()
    with torch.autocast("cpu", torch.bfloat16):
        found = everything()
    assert all(map(torch.equal, found, wanted))


def test_best_come_first_and_belong_to_their_codes(pipeline):
    found = pipeline.generate(CAPTION, num_candidates=12, top=5, seed=3)
    assert found.images.shape == (5, 3, 16, 16) and found.tokens.shape == (5, 4, 4)
    assert (found.scores.diff() <= 0).all()
    assert torch.equal(pipeline.decode(found.tokens), found.images)
    every = pipeline.decode(pipeline.sample([CAPTION], 12, seed=3))[0]
    scores = pipeline.ranker.scores([CAPTION] * 12, every)
    assert torch.equal(scores.sort(descending=True).values[:5], found.scores)
    assert torch.equal(every[found.order], found.images)


def test_seed_decides(pipeline):
    options = {"num_candidates": 4, "top": 4}
    first, again, other = (pipeline.generate(CAPTION, seed=s, **options) for s in (1, 1, 2))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)


def test_prompts_are_cleaned_as_captions_are():
    """The same pictures, and a ranker of any kind reads the clean caption."""
    pipeline, heard = build(ranker=False), []

    class Ranker:
        def scores(self, captions, images):
            heard.extend(captions)
            return torch.zeros(len(images))

    pipeline.ranker = Ranker()
    wanted = pipeline.generate(CAPTION, num_candidates=2, top=2, seed=5)
    found = pipeline.generate("\ufeffa\u2028red \ncircle\u00a0", num_candidates=2, top=2, seed=5)
    assert torch.equal(wanted.tokens, found.tokens)
    assert heard == [CAPTION] * 4


def test_candidates_come_in_chunks(pipeline, monkeypatch):
    monkeypatch.setattr("dalle.pipeline.SEQUENCES", 4)
    calls = []
    captions = [CAPTION, "a", "b"]
    tokens = pipeline.sample(captions, 6, HOT, progress=lambda *done: calls.append(done))
    assert tokens.shape == (3, 6, 4, 4)
    assert calls[-1] == (18, 18) and len(calls) == 6
    assert len({tuple(t.flatten().tolist()) for t in tokens.flatten(0, 1)}) == 18


def test_a_candidate_is_the_same_picture_however_it_is_drawn(pipeline, monkeypatch):
    """Alone, among other captions, in chunks of another size; and no other seed draws it."""
    captions = [CAPTION, "a", "a blue square"]
    sample = partial(pipeline.sample, sampling=HOT)  # the toy repeats itself at 1
    together, other = (sample(captions, 7, seed=seed) for seed in (0, 1))
    assert len(torch.cat([together, other]).view(42, 16).unique(dim=0)) == 42
    for sequences in (1, 3, 4, 21):
        monkeypatch.setattr("dalle.pipeline.SEQUENCES", sequences)
        assert torch.equal(sample(captions[::-1], 7, seed=0).flip(0), together)
    for number in (0, 3, 6):
        alone = sample([captions[1]], np.int64(1), seed=np.uint8(0), first_candidate=number)
        assert torch.equal(alone[0, 0], together[1, number])
    again = sample([CAPTION, CAPTION], 3, first_candidate=(0, 3))
    assert torch.equal(again.flatten(0, 1), together[0, :6])
    found = pipeline.generate("a", num_candidates=np.int32(7), top=np.int32(7), temperature=9.0)
    assert torch.equal(found.tokens, together[1][found.order])


def test_a_list_of_captions_gives_each_its_own_pictures(pipeline, monkeypatch):
    options = {"num_candidates": 5, "top": 3, "seed": 2, "temperature": 9.0}
    image, calls = torch.rand(3, 16, 16), []
    captions = (CAPTION, "a blue square", CAPTION)
    for more in ({}, {"prime_image": image, "prime_rows": 1}):
        alone = [pipeline.generate(caption, **options, **more) for caption in captions]
        for sequences in (256, 4):
            monkeypatch.setattr("dalle.pipeline.SEQUENCES", sequences)
            together = pipeline.generate(
                captions, progress=lambda *done: calls.append(done), **options, **more
            )
            assert isinstance(together, list) and calls[-1] == (15, 15)
            for one, other in zip(together, alone, strict=True):
                for name in ("images", "scores", "tokens", "order"):
                    assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert not torch.equal(alone[0].images, alone[1].images)
        assert torch.equal(alone[0].images, alone[2].images)
    assert len(pipeline.generate([CAPTION], num_candidates=1, top=1)) == 1
    assert pipeline.generate([]) == []
    for bad, line in (
        (["a", 3], "caption must hold strings, got 3"),
        (3, "caption must be a string or a list of strings, got int"),
        ({"a"}, "caption must be a string or a list of strings, got set"),
    ):
        with pytest.raises(UsageError, match=f"^pipeline: {line}"):
            pipeline.generate(bad)


def test_no_caption_and_one_that_is_no_list(pipeline):
    assert pipeline.sample([], 3).shape == (0, 3, 4, 4)
    assert pipeline.decode(pipeline.sample([], 3)).shape == (0, 3, 3, 16, 16)
    with pytest.raises(UsageError, match="captions must be a list of strings, got 'ab'"):
        pipeline.sample("ab", 1)


def test_without_a_ranker_the_order_is_that_of_sampling():
    found = build(ranker=False).generate(CAPTION, num_candidates=4, top=3)
    assert found.order.tolist() == [0, 1, 2] and found.scores.isnan().all()


def test_priming_keeps_the_given_rows(pipeline):
    image = torch.rand(3, 16, 16)
    found = pipeline.generate(CAPTION, num_candidates=6, top=6, prime_image=image, prime_rows=2)
    given = pipeline.vae.encode(image[None])[0, :2]
    assert (found.tokens[:, :2] == given).all()
    assert not (found.tokens[:, 2:] == found.tokens[:1, 2:]).all()


def test_saved_and_loaded_draws_the_same(pipeline, folder):
    again = Pipeline.from_pretrained(folder)
    first = pipeline.generate(CAPTION, num_candidates=4, top=2)
    second = again.generate(CAPTION, num_candidates=4, top=2)
    assert torch.equal(first.images, second.images) and torch.equal(first.scores, second.scores)


def test_a_pipeline_without_ranker_is_saved_without(tmp_path):
    build(ranker=False).save_pretrained(tmp_path)
    assert Pipeline.from_pretrained(tmp_path).ranker is None
    assert not (tmp_path / "ranker").exists()


@pytest.mark.parametrize(
    "content", ["[]", "null", "{", "{}", '{"class": "Prior"}', '{"class": "Pipeline"}']
)
def test_foreign_folder_gets_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    for part in (Pipeline, Tokenizer):
        with pytest.raises(CheckpointError, match="must be") as error:
            part.from_pretrained(tmp_path)
        assert "None" not in str(error.value)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="image_vocab must be the vae's 32, got 16"):
        build(codes=32)


@pytest.mark.parametrize(
    "options",
    [
        {"num_candidates": 4, "top": 5},
        {"num_candidates": 0, "top": 0},
        {"num_candidates": 10**12, "top": 1},
        {"num_candidates": 2, "top": 1, "prime_rows": 1},
        {"num_candidates": 2, "top": 1, "prime_rows": 4, "prime_image": torch.zeros(3, 16, 16)},
        {"num_candidates": 2, "top": 1, "prime_rows": 1, "prime_image": torch.zeros(3, 8, 8)},
        {"prime_image": torch.full((3, 16, 16), 255.0)},
        {"prime_image": torch.full((3, 16, 16), torch.nan)},
        {"prime_image": torch.zeros(3, 16, 16, dtype=torch.uint8)},
        {"cancel": True},
        {"progress": 3},
    ],
)
def test_options_out_of_range_get_one_line(pipeline, options):
    with pytest.raises(UsageError, match="^(pipeline|generate): .* must (be|hold)"):
        pipeline.generate(CAPTION, **options)


def run(*words):
    return cli.main([str(word) for word in words])


def test_sample_writes_grids_pictures_and_json(folder, tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("a blue square\n\n")
    photo = tmp_path / "photo.png"
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(photo)
    out = tmp_path / "out"
    code = run(
        "sample", CAPTION, "--model", folder, "--file", tmp_path / "captions.txt", "--out", out,
        "--num-candidates", 4, "--top", 2, "--seed", 5, "--prime-image", photo, "--prime-rows", 1,
        "--device", "cpu",
    )  # fmt: skip
    assert code == 0, capsys.readouterr().err
    records = json.loads((out / "samples.json").read_text())["records"]
    assert [r["caption"] for r in records] == [CAPTION, "a blue square"]
    assert [r["seed"] for r in records] == [5, 5]
    for record in records:
        assert len(record["scores"]) == len(record["files"]) == 2
        for file in record["files"]:
            assert Image.open(out / file).size == (16, 16)
    assert len(list(out.glob("*.png"))) == 2


def test_sample_without_captions_or_model_gets_one_line(folder, tmp_path, capsys):
    assert run("sample", "--model", folder) == 2
    assert "sample: captions must be at least one" in capsys.readouterr().err
    assert run("sample", CAPTION, "--model", tmp_path) == 3
    assert run("sample", CAPTION, "--model", folder, "--device", "abacus") == 2
    assert "device: must be auto, cpu" in capsys.readouterr().err
    assert run("sample", "--file", tmp_path / "none.txt", "--model", folder) == 3


def make(folder, out, **other):
    parts = {name: folder / name for name in ("tokenizer", "vae", "prior", "ranker")} | other
    words = [(f"--{name}", path) for name, path in parts.items() if path is not None]
    return run("pipeline", "make", *(word for pair in words for word in pair), "--out", out)


def test_pipeline_make_puts_trained_parts_together(pipeline, folder, tmp_path, capsys):
    out = tmp_path / "deep" / "made"
    assert make(folder, out) == 0
    said = capsys.readouterr().out
    assert f"pictures of 16 x 16 pixels, with a ranker, in {out}" in said
    words = shlex.split(said.splitlines()[-1])[4:]  # what it says to type now
    assert words == ["sample", "A CAPTION", "--model", str(out)]
    assert run(*words, "--num-candidates", 2, "--top", 1, "--out", tmp_path / "drawn") == 0
    both = pipeline, Pipeline.from_pretrained(out)
    first, second = (p.generate("a", num_candidates=4, top=2) for p in both)
    assert torch.equal(first.images, second.images) and torch.equal(first.scores, second.scores)
    assert sorted(p.name for p in out.parent.iterdir()) == ["made"]
    assert make(folder, tmp_path / "bare", ranker=None) == 0
    assert Pipeline.from_pretrained(tmp_path / "bare").ranker is None


def test_pipeline_make_refuses_and_writes_nothing(folder, tmp_path, capsys, monkeypatch):
    other = build(codes=32, prior_codes=32)
    big = {"image_size": 32, "grid": 4, "width": 32, "depth": 1, "embed_dim": 16}
    ContrastiveRanker.from_preset("tiny", tokenizer=other.tokenizer, **big).save_pretrained(
        tmp_path / "big"
    )
    other.vae.save_pretrained(tmp_path / "vae")
    out = tmp_path / "out"
    for parts, code, line in (
        ({"vae": tmp_path / "vae"}, 2, "the prior's image_vocab must be the vae's 32, got 16"),
        ({"ranker": tmp_path / "big"}, 2, "the ranker's image_size must be 16, which .* got 32"),
        ({"prior": folder / "vae"}, 3, "class must be Prior, got DiscreteVAE"),
        ({"vae": tmp_path / "none"}, 3, "none/config.json"),
    ):
        assert make(folder, out, **parts) == code
        said = capsys.readouterr().err
        assert re.search(line, said) and said.count("\n") == 1
    assert make(folder, folder) == 2
    assert "out must be new or empty, got files in" in capsys.readouterr().err

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dalle.pipeline.write_config", full)
    assert make(folder, out) == 4
    assert f"{out} must be writable, got No space left on device" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big", "vae"]


def test_a_pipeline_half_written_over_another_is_none(tmp_path, monkeypatch):
    build(ranker=False).save_pretrained(tmp_path)
    monkeypatch.setattr(Prior, "save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(ranker=False).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="config.json"):
        Pipeline.from_pretrained(tmp_path)


def test_rerank_sorts_a_folder_and_counts_what_it_skips(folder, pipeline, tmp_path, capsys):
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "deep/c.png"):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(images / name)
    (images / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    words = ["rerank", CAPTION, "--images", images, "--ranker", folder / "ranker", "--out", out]
    assert run(*words, "--device", "cpu") == 0, capsys.readouterr().err
    report = json.loads((out / "scores.json").read_text())
    assert report["skipped"] == {"not a picture": 1}
    scores = [entry["score"] for entry in report["ranking"]]
    assert scores == sorted(scores, reverse=True) and len(scores) == 3
    first = np.asarray(Image.open(images / report["ranking"][0]["file"]))
    wanted = pipeline.ranker.scores(
        [CAPTION], torch.from_numpy(first.copy()).permute(2, 0, 1)[None] / 255
    )
    assert scores[0] == pytest.approx(float(wanted), abs=1e-4)
    assert Image.open(out / "sorted.png").width > 48


def test_rerank_of_nothing_gets_one_line(folder, tmp_path, capsys):
    words = ["rerank", CAPTION, "--images", tmp_path, "--ranker", folder / "ranker"]
    assert run(*words) == 3
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert run(*words) == 3
    assert run(*words[:-1], tmp_path) == 3
    assert run("rerank", " ", *words[2:]) == 2
    assert "caption must hold a word" in capsys.readouterr().err


def test_a_picture_that_does_not_decode_names_itself(tmp_path):
    from dalle.commands.drawn import read_image

    (tmp_path / "x.png").write_bytes(b"x")
    with pytest.raises(DataError, match="x.png: image must be one of JPEG, PNG, WEBP"):
        read_image(tmp_path / "x.png", 16)
