"""`dalle sample` draws as the pipeline says, keeps runs apart, and records of what and how."""

from __future__ import annotations

import html
import json
import os
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import dalle_ext
from dalle import cli, console
from dalle.demo.stages import prior_stage
from dalle.errors import CheckpointError, UsageError
from dalle.pipeline import Pipeline, write_config
from dalle.pretrained import fingerprint
from dalle.prior.sampling import SamplingConfig
from dalle.tokenizer import Tokenizer
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


def read(out):
    return json.loads((out / "samples.json").read_text())


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
        "temperature": 1.0, "top_k": None, "top_p": None, "cond_scale": 1.0, "cache_bits": None
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
    assert read(tmp_path / "a")["records"][0]["candidates"] == wanted.order.tolist()
    words = ["--temperature", 1, "--num-candidates", 9, "--top", 2, "--out", tmp_path / "b"]
    assert run("sample", CAPTION, "--model", folder, *words) == 0
    wanted = Pipeline.from_pretrained(folder).generate(CAPTION, temperature=1, num_candidates=9)
    assert read(tmp_path / "b")["records"][0]["candidates"] == wanted.order[:2].tolist()


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


def test_samples_json_says_of_what_and_how(folder, tmp_path):
    out = tmp_path / "out"
    words = [CAPTION, "a <b> & 'c'", "--model", folder, "--out", out, "--seed", 4, "--top", 2]
    assert run("sample", *words) == 0
    said, pipeline = read(out), Pipeline.from_pretrained(folder)
    assert said["model"]["path"] == str(folder)
    assert said["model"]["fingerprints"] == {
        "tokenizer": pipeline.tokenizer.fingerprint(),
        **{name: fingerprint(getattr(pipeline, name)) for name in ("vae", "prior", "ranker")},
    }
    assert SamplingConfig(**said["sampling"]) == WARM
    assert (said["num_candidates"], said["top"], said["seed"], said["prime"]) == (6, 2, 4, None)
    assert said["versions"]["torch"] == torch.__version__
    page = (out / "index.html").read_text()
    shown = re.findall(r'src="([^"]+)"', page)
    assert shown == [name for entry in said["records"] for name in entry["files"]]
    assert all(Image.open(out / name).size == (16, 16) for name in shown) and len(shown) == 4
    assert "a <b>" not in page and "a <b> & 'c'" in html.unescape(page) and "http" not in page
    assert f"{said['records'][0]['scores'][0]:.3f}" in page


def test_a_run_is_never_mixed_with_an_older_one(folder, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["sample", "--model", folder, "--out", out, "--top", 2]
    assert run(*words, "an older", "and one more") == 0
    (out / "00-an-older" / "mine.txt").write_text("kept")
    before = {path.name for path in out.rglob("*")}
    for name in ("out-2", "out-3"):
        assert run(*words, CAPTION) == 0
        assert f"{out} holds samples of an earlier run; these go to {tmp_path / name}" in (
            capsys.readouterr().err
        )
        assert [entry["caption"] for entry in read(tmp_path / name)["records"]] == [CAPTION]
    assert {path.name for path in out.rglob("*")} == before
    assert run(*words, CAPTION, "--overwrite") == 0
    assert f"6 pictures of an earlier run removed from {out}" in capsys.readouterr().err
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert left == {
        "00-a-red-circle.png", "00-a-red-circle/0.png", "00-a-red-circle/1.png",
        "00-an-older/mine.txt", "index.html", "samples.json",
    }  # fmt: skip


def test_an_earlier_run_is_kept_until_there_is_something_in_its_place(folder, tmp_path, capsys):
    words = ["sample", CAPTION, "--model", folder, "--out", tmp_path, "--overwrite"]
    assert run(*words) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run(*words, "--seed", -1) == 2
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"records": 3}',
        '{"records": [{"files": ["../x.png", "/etc/0.png", 5, null]}, 7]}',
        '[{"files": ["../../0-a/0.png", "00-a/../../x.png", "mine.png"]}]',
    ],
)
def test_overwriting_removes_only_pictures_of_a_run(folder, tmp_path, content):
    out = tmp_path / "out"
    out.mkdir()
    for path in (tmp_path / "x.png", out / "mine.png"):
        path.write_text("kept")
    (out / "samples.json").write_text(content)
    words = ["--model", folder, "--out", out, "--overwrite", "--top", 1, "--num-candidates", 1]
    assert run("sample", CAPTION, *words) == 0
    assert (tmp_path / "x.png").exists() and (out / "mine.png").exists()


def test_a_picture_that_primes_is_not_overwritten(folder, tmp_path, capsys):
    words = ["sample", CAPTION, "--model", folder, "--out", tmp_path, "--num-candidates", 2]
    assert run(*words) == 0
    photo = tmp_path / "00-a-red-circle/1.png"
    assert run(*words, "--overwrite", "--prime-image", photo) == 2
    assert "must be none of the pictures that are read" in capsys.readouterr().err
    assert photo.exists()


def test_a_picture_alone_gives_half_of_the_rows(folder, tmp_path, capsys):
    photo = tmp_path / "photo.png"
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(photo)
    words = ["sample", CAPTION, "--model", folder, "--out", tmp_path / "out"]
    assert run(*words, "--prime-image", photo) == 0
    assert f"{photo} gives the top 2 of 4 rows of codes" in capsys.readouterr().err
    assert read(tmp_path / "out")["prime"] == {"image": str(photo), "rows": 2}
    pipeline = Pipeline.from_pretrained(folder)
    image = torch.from_numpy(noise).permute(2, 0, 1) / 255
    found = pipeline.generate(CAPTION, prime_image=image)
    assert (found.tokens[:, :2] == pipeline.vae.encode(image[None])[0, :2]).all()


def test_top_shrinks_to_the_candidates(folder, tmp_path, capsys):
    words = ["--model", folder, "--out", tmp_path, "--num-candidates", 3, "--top", 5]
    assert run("sample", CAPTION, *words) == 0
    assert "of 3 candidates all are kept, not 5" in capsys.readouterr().err
    assert len(read(tmp_path)["records"][0]["files"]) == 3
    for option in ("--top", "--num-candidates"):
        assert run("sample", CAPTION, "--model", folder, option, 0) == 2
        assert (
            f"sample: {option[2:].replace('-', '_')} must be 1 or more" in capsys.readouterr().err
        )


def test_progress_is_shown_within_a_caption(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(console, "SECONDS", -1.0)
    assert run("sample", CAPTION, "--model", folder, "--out", tmp_path) == 0
    lines = re.findall(r"sample 1/1: (\d+) % \| ETA [0-9:]+", capsys.readouterr().err)
    assert lines == [str(100 * done // 16) for done in range(1, 17)]
    pipeline, calls = build(ranker=False), []
    monkeypatch.setattr("dalle.pipeline.SEQUENCES", 4)
    pipeline.sample([CAPTION, "b"], 6, code_progress=lambda *call: calls.append(call))
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[0] == (4, 12 * 16) and calls[-1] == (12 * 16, 12 * 16) and len(calls) == 4 * 16


def test_a_prompt_has_only_punctuation_that_training_has(tmp_path, capsys):
    pipeline = build()
    assert pipeline.tokenizer.marks == ""
    wanted = pipeline.generate("A red circle", num_candidates=3)
    for prompt in ("a red: circle", "a red-circle!", " «A red» circle. \U0001f600"):
        found = pipeline.generate(prompt, num_candidates=3)
        assert torch.equal(found.tokens, wanted.tokens)
        assert torch.equal(found.scores, wanted.scores)
    assert pipeline.tokenizer.shape("?!") == "?!"  # nothing would be left
    pipeline.save_pretrained(tmp_path / "pipeline")
    words = ["--model", tmp_path / "pipeline", "--num-candidates", 3, "--out", tmp_path / "out"]
    assert run("sample", "A red: circle", *words) == 0
    assert (
        "caption 1 is drawn as 'A red circle', spelt as in the training" in capsys.readouterr().err
    )
    (entry,) = read(tmp_path / "out")["records"]
    assert (entry["caption"], entry["drawn_as"]) == ("A red: circle", "A red circle")
    assert entry["candidates"] == wanted.order.tolist()


def test_marks_of_the_captions_are_kept_with_the_tokenizer(tmp_path):
    tokenizer = Tokenizer.train(["it's red-hot", "10 € (ten)"], 300)
    assert tokenizer.marks == "'()-€"
    tokenizer.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.marks == tokenizer.marks
    assert again.shape("It's 5€: red-hot, $5") == "It's 5€ red-hot 5"
    head = json.loads((tmp_path / "config.json").read_text())
    del head["config"]["marks"]  # of an older version
    (tmp_path / "config.json").write_text(json.dumps(head))
    older = Tokenizer.from_pretrained(tmp_path)
    assert older.shape("red: hot") == "red: hot" and older.fingerprint() == again.fingerprint()


def test_the_model_is_found_where_train_and_demo_leave_it(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["sample", CAPTION, "--num-candidates", 1]
    assert run(*words) == 3
    assert (
        "sample: model must be given, got nothing, and there is none in run/pipeline nor in "
        "out/demo/pipeline"
    ) in capsys.readouterr().err
    for found in ("out/demo/pipeline", "run/pipeline"):
        (tmp_path / found).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / found).symlink_to(folder)
        assert run(*words) == 0
        assert f"sample: model {found}" in capsys.readouterr().err
    assert read(tmp_path / "run/samples-2")["records"]


def test_rerank_leaves_out_sheets_of_commands(folder, tmp_path, capsys):
    """Grids of `sample`, sorted.png, contact.png of `data make-shapes`, and no other picture."""
    out = tmp_path / "out"
    words = ["--model", folder, "--out", out, "--top", 2]
    assert run("sample", CAPTION, "b", *words) == 0
    made = ["data", "make-shapes", "--out", out / "deep", "--count", 2]
    assert run(*made) == 0
    Image.new("RGB", (9, 9)).save(out / "01-b" / "sorted.png")  # no scores.json lies beside
    singles = {f"{name}/{i}.png" for name in ("00-a-red-circle", "01-b") for i in (0, 1)}
    singles |= {"01-b/sorted.png", "deep/pairs/000000.png", "deep/pairs/000001.png"}
    words = ["rerank", CAPTION, "--data", out, "--ranker", folder / "ranker"]
    for sheets, target in ((3, out), (4, tmp_path / "ranked")):
        assert run(*words, "--out", target) == 0
        assert (
            f"rerank: contact sheets left out: {sheets}, such as {out}" in capsys.readouterr().err
        )
        report = json.loads((target / "scores.json").read_text())
        assert {entry["file"] for entry in report["ranking"]} == singles
        assert report["skipped"] == {"contact sheet": sheets}
    assert run(*words[:3], tmp_path / "ranked", *words[4:]) == 3
    assert "data must hold single pictures, got contact sheets only" in capsys.readouterr().err


def test_rerank_finds_the_ranker_of_the_pipeline(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (9, 9)).save("0.png")
    assert run("rerank", CAPTION, "--images", ".") == 3  # the option's name before
    assert (
        "rerank: ranker must be given, got nothing, and there is none in run/pipeline/ranker"
        in (capsys.readouterr().err)
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run/pipeline").symlink_to(folder)
    assert run("rerank", CAPTION, "--data", ".") == 0
    assert (tmp_path / "run/rerank/scores.json").exists()


@pytest.mark.parametrize(
    ("codes", "words", "finished", "rows"),
    [
        (1, [], [], []),  # not even a row
        (9, [], [0], [2]),
        (40, ["--max-batch", 4, "--num-candidates", 11], [8], [4]),
        (16 + 14, [], [None, 0], [None, 3]),
    ],
)
def test_stopped_by_the_keyboard_it_leaves_what_there_is(
    folder, tmp_path, monkeypatch, capsys, codes, words, finished, rows
):
    calls, stream = [], Pipeline.stream

    def stopped(self, caption, *, cancel, code_progress, **options):
        def count(done, total):
            calls.append(done)
            if len(calls) == codes:
                os.kill(os.getpid(), signal.SIGINT)

        return stream(self, caption, cancel=cancel, code_progress=count, **options)

    monkeypatch.setattr(Pipeline, "stream", stopped)
    out = tmp_path / "out"
    command = ["sample", CAPTION, "b", "--model", folder, "--out", out, "--top", 2, *words]
    assert run(*command) == 6
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        said
        == f"sample: stopped by SIGINT; what was drawn of {len(rows)} of 2 captions is in {out}"
    )
    if not rows:
        assert not (out / "samples.json").exists()
        return
    records = read(out)["records"]
    assert [entry.get("finished") for entry in records] == finished
    assert [entry.get("rows") for entry in records] == rows
    page = (out / "index.html").read_text()
    for entry in records:
        assert len(entry["files"]) == 2
        assert all(Image.open(out / name).size == (16, 16) for name in entry["files"])
        assert all(name in page for name in entry["files"])
    if rows[-1] < 4:  # grey below, and above as it would have been
        picture = np.asarray(Image.open(out / records[-1]["files"][0]))
        assert (picture[4 * rows[-1] :] == 128).all() and picture[: 4 * rows[-1]].std() > 0
    else:
        monkeypatch.setattr(Pipeline, "stream", stream)
        wanted = Pipeline.from_pretrained(folder).generate(CAPTION, num_candidates=8, top=2)
        assert records[0]["candidates"] == wanted.order.tolist()
