"""Blur, reranking, reconstruction, what words get right, and the page that shows all results."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import dalle.evaluate as evaluate
from dalle.cli import main
from dalle.data.pairs import evenly_spaced
from dalle.data.shapes import split_scenes
from dalle.data.shapes_check import check_batch
from dalle.data.sources import load_pairs
from dalle.data.split import Subset
from dalle.dvae.model import DiscreteVAE
from dalle.errors import DataError, UsageError
from dalle.evaluate import paper, plots
from dalle.evaluate.cache import blurred
from dalle.evaluate.extractors import RankerExtractor
from dalle.evaluate.facts import chosen_scenes
from dalle.evaluate.intervals import over_seeds
from dalle.evaluate.sets import picture_hash
from dalle.evaluate.sweeps import for_checker, powers, scenes_of
from dalle.pipeline import Pipeline
from support.evaluation import RightFrom, make_eval_home, refused, shapes_pipeline

FEW = {"bootstrap": 4}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = make_eval_home(tmp_path_factory.mktemp("sweeps"))
    shapes_pipeline().save_pretrained(root / "shapes-pipe")
    return root


@pytest.fixture(autouse=True)
def here(home, monkeypatch):
    monkeypatch.chdir(home)


def test_blur_is_pils_on_both_sides_before_the_features(home, capsys):
    words = ["eval", "blur", "--real", "real", "--fake", "fake", "--weights", "pipe"]
    assert main([*words, "--radii", "0", "2", "--out", "out", "--bootstrap", "4"]) == 0
    assert "radius 2: FD-ranker" in capsys.readouterr().out
    result = json.loads((home / "out/blur.json").read_text())
    ranker = RankerExtractor(Pipeline.from_pretrained("pipe").ranker)
    for point, radius in zip(result["points"], (0, 2), strict=True):
        sets = []
        for name in ("real", "fake"):
            pictures = [Image.open(p) for p in sorted((home / name).glob("*.png"))]
            if radius:
                pictures = [p.filter(ImageFilter.GaussianBlur(radius)) for p in pictures]
            sets.append(ranker.features([np.asarray(p) for p in pictures]))
        assert point["radius"] == radius
        assert point["distance"] == pytest.approx(evaluate.frechet_distance(*sets), rel=1e-9)
        assert point["score"] > 1 and point["score_interval"][0] < point["score"]
    assert result["points"][0]["distance"] == evaluate.fid("real", "fake", weights="pipe")["value"]
    assert result["side"] == 16 and result["paper"]["fid"]["DALL-E"][0] == 28.4
    assert "paper's FID" in (home / "out/blur.md").read_text()
    assert Image.open(home / "out/blur.png").size[0] > 800


def test_a_distance_grows_with_the_blur_of_one_side(home):
    ranker = RankerExtractor(Pipeline.from_pretrained("pipe").ranker)
    noise = list(np.random.default_rng(5).integers(0, 256, (48, 16, 16, 3), np.uint8))
    plain = ranker.features(noise)
    values = [
        evaluate.frechet_distance(plain, ranker.features([blurred(x, 16, r) for x in noise]))
        for r in (0, 0.3, 0.6, 1, 2, 4)
    ]
    assert values[0] < 1e-9 and values == sorted(values)


def test_blur_stands_beside_another_set_of_the_paper():
    result = evaluate.blur("real", "fake", weights="pipe", radii=[0], beside="CUB", bootstrap=0)
    assert "Figure 9 b, of CUB" in result["text"]
    assert result["tables"][0]["rows"][0][-2:] == [56.2, 2.64]
    with pytest.raises(UsageError, match="^eval blur: beside must be one of MS-COCO, CUB, got 'x'"):
        evaluate.blur("real", "fake", beside="x")


@pytest.mark.parametrize(("name", "lines"), [("FID", [5]), ("FD-ranker", [1, 4])])
def test_published_metrics_share_the_axis_of_the_papers_curves(monkeypatch, name, lines):
    points = [{"radius": r, "distance": 30.0 + r, "score": None} for r in (0, 1)]
    figures = []
    monkeypatch.setattr(plots, "figure_png", lambda _, figure: figures.append(figure) or b"")
    metrics = {"distance": name, "score": "IS"}
    greys = {"distance": paper.FIGURE_9A_FID, "score": paper.FIGURE_9A_IS}
    plots.curves_png("t", points, "radius", "r", metrics, paper.RADII, greys)
    axes = figures[0].axes
    assert [len(axis.get_lines()) for axis in axes] == lines
    assert axes[-1].get_lines()[0].get_ydata().tolist() == list(paper.FIGURE_9A_FID["DALL-E"])


def test_without_captions_there_is_no_score_and_a_line_says_so(home):
    result = evaluate.blur("fake", "fake", weights="pipe", radii=(1,), out="nc", **FEW)
    assert result["points"][0]["score"] is None and result["points"][0]["distance"] < 1e-9
    assert any("no set has captions" in line for line in result["warnings"])


def test_best_of_n_is_of_the_first_n_candidates_of_one_drawing(home, monkeypatch):
    draws = []
    whole = RightFrom.generate
    monkeypatch.setattr(
        RightFrom, "generate", lambda self, *a, **k: draws.append(k) or whole(self, *a, **k)
    )
    options = {"num_candidates": 8, "image_size": 24, "count": 30, **FEW}
    result = evaluate.rerank("shapes:test", RightFrom.make(3), weights="shapes-pipe", out="rr",
                             **options)  # fmt: skip
    points = {point["candidates"]: point for point in result["points"]}
    assert list(points) == [1, 2, 4, 8]
    # Candidates 0 to 2 are wrong, all others right: two do not help, four do.
    assert [points[n]["checker_share"] for n in points] == [0, 0, 1, 1]
    assert points[4]["checker_interval"][1] == pytest.approx(1)
    assert points[1]["distance"] != points[4]["distance"] == pytest.approx(points[8]["distance"], 1)
    assert {d["num_candidates"] for d in draws} == {8}
    assert any("chose the samples" in line for line in result["warnings"])
    assert json.loads((home / "rr/rerank.json").read_text()) == result
    assert result["paper"]["fid"] == list(paper.FIGURE_9C_FID)
    assert powers(512) == list(paper.CANDIDATES) and powers(6) == [1, 2, 4, 6]


def test_rerank_as_a_command(home, capsys):
    words = ["eval", "rerank", "--real", "shapes:test", "--fake", "shapes-pipe", "--count", "8"]
    options = ["--num-candidates", "4", "--out", "rc", "--bootstrap", "2"]
    assert main([*words, *options]) == 0, capsys.readouterr().err
    assert "candidates 4: FD-ranker" in capsys.readouterr().out
    result = json.loads((home / "rc/rerank.json").read_text())
    points, wanted = result["points"], load_pairs("shapes", image_size=24, split="test")
    assert result["sets"]["real"]["fingerprint"] == picture_hash(
        Subset(wanted, evenly_spaced(len(wanted), 8))
    )
    assert [point["candidates"] for point in points] == [1, 2, 4]
    scores = [point["ranker_score"] for point in points]
    assert scores == sorted(scores)


def test_words_counts_each_fact_of_single_and_chosen_samples(home):
    made = RightFrom.make(first=1)
    options = {"count": 12, "num_candidates": 4}
    result = evaluate.words(made, out="w", seeds=(0, 1), **options)
    assert list(result["splits"]) == ["train", "test", "zero"]
    for found in result["splits"].values():
        assert {"one object", "two objects", "colour", "position", "count"} <= set(found)
        single = {fact: kinds["single"]["share"] for fact, kinds in found.items()}
        # The first sample has wrong colours; places of one object and all counts are right.
        assert single["one object"] == single["two objects"] == single["colour"] == 0
        assert single["count"] == single["background"] == 1
        assert all(kinds["best"]["share"] == 1 for kinds in found.values())
        assert found["one object"]["single"]["n"] == 12 and found["count"]["best"]["n"] == 24
        low, high = found["colour"]["best"]["interval"]
        assert low > 0.8 and high == pytest.approx(1)
    assert Image.open("w/words.png").size[0] > 1000
    with pytest.raises(UsageError, match="side of 24 or more for the checker, got 16"):
        evaluate.words("pipe")


@pytest.mark.parametrize(("side", "at"), [(72, 72), (120, 96), (264, 256)])
def test_the_checker_reads_large_pictures_at_a_size_that_suits_it(side, at):
    pairs = load_pairs("shapes", image_size=24, split="test")
    wide = [pairs.load(i).repeat(side // 24, 0).repeat(side // 24, 1) for i in range(6)]
    images = for_checker(np.stack(wide))
    assert images.shape == (6, at, at, 3)
    reports = check_batch(images, scenes_of(pairs.captions[:6]))
    assert all(report.all_right for report in reports)


def test_words_says_so_where_pictures_are_not_of_shapes(home, capsys):
    """A pipeline of another set: the checker reads no outline that it knows."""
    words = ["eval", "words", "--fake", "shapes-pipe", "--count", "8", "--seeds", "3"]
    options = ["--splits", "test", "--num-candidates", "1", "--out", "none"]
    assert main([*words, *options]) == 0
    heard = capsys.readouterr()
    line = "of 8 pictures show an outline of the set shapes; this table is for a pipeline that was"
    assert line in heard.err and f"eval words: warning: only 0 {line}" in heard.out
    assert line in json.loads((home / "none/words.json").read_text())["warnings"][0]
    right = evaluate.words(RightFrom.make(0), splits="test", seeds=(0,), count=8, num_candidates=1)
    assert right["warnings"] == []


def test_words_of_pictures_that_are_there(home):
    """True pictures are right in every fact, by the split of their captions."""
    result = evaluate.words("shapes:zero", image_size=24, count=40)
    assert list(result["splits"]) == ["zero"]
    assert all(kinds["single"]["share"] == 1 for kinds in result["splits"]["zero"].values())
    pairs = load_pairs("shapes", image_size=72, split="test")
    for i in range(6):  # of 36 pixels, which the checker does not read as they are
        path = home / f"odd-side/{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pairs.load(i)).resize((36, 36), Image.Resampling.BOX).save(path)
        path.with_suffix(".txt").write_text(pairs.captions[i])
    found = evaluate.words("odd-side")["splits"]["test"]
    assert all(kinds["single"]["share"] == 1 for kinds in found.values())
    with pytest.raises(DataError, match="captions must be of the set shapes, got others in real"):
        evaluate.words("real")


def test_scenes_of_a_split_are_half_of_one_object():
    scenes = chosen_scenes("zero", 7)
    assert [bool(s.relation) for s in scenes] == [False] * 4 + [True] * 3
    assert set(scenes) <= set(split_scenes("zero"))


def test_intervals_over_seeds():
    """Mean 0.5, standard deviation 0.1, three seeds: 0.5 +- 4.303 * 0.1 / sqrt 3."""
    assert over_seeds([0.4, 0.5, 0.6]) == pytest.approx([0.5 - 0.24843, 0.5 + 0.24843], abs=1e-4)
    assert over_seeds([0, 1]) == [0, 1]


def test_recon_measures_what_the_dvae_gives_back(home, capsys):
    assert main(["eval", "recon", "--data", "real", "--model", "pipe", "--out", "re"]) == 0
    assert "codes (24 data)" in capsys.readouterr().out
    result = json.loads((home / "re/recon.json").read_text())
    vae = DiscreteVAE.from_pretrained("pipe/vae")
    x = torch.stack([
        torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1) / 255
        for p in sorted((home / "real").glob("*.png"))
    ])  # fmt: skip
    tokens = vae.encode(x)
    error = (vae.decode(tokens).clamp(0, 1) - x).double().square().mean()
    assert result["psnr"] == pytest.approx(float(-10 * error.log10()), abs=1e-4)
    assert result["codes_used"] == len(tokens.unique()) and result["codes"] == 16
    assert result["intervals"]["psnr"][0] < result["psnr"] < result["intervals"]["psnr"][1]
    assert result["grid"] == [4, 4]


class Tags(HTMLParser):
    """Collects tags, pictures and links of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]


def test_report_shows_every_result_and_nothing_from_outside(home, capsys):
    for call in (
        lambda: evaluate.fid("real", "fake", weights="pipe", out="rep", **FEW),
        lambda: evaluate.kid("real", "fake", weights="pipe", out="rep", **FEW),
        lambda: evaluate.words("shapes:zero", image_size=24, count=8, out="rep/a #1"),
    ):
        call()
    (home / "rep/other.json").write_text('{"title": "not ours"}')
    (home / "rep/broken.json").write_text("{")
    evil = json.loads((home / "rep/fid.json").read_text())
    evil |= {"title": "<script>alert(1)</script>", "pictures": ["../fake/000.png", "fid.png"]}
    (home / "rep/evil.json").write_text(json.dumps(evil))
    assert main(["eval", "report", "--out", "rep"]) == 0
    assert "evil, fid, kid, a #1/words; look at rep/index.html" in capsys.readouterr().out
    text = (home / "rep/index.html").read_text()
    page = Tags(text)
    assert page.tags.count("h2") == 4 and "script" not in page.tags and "not ours" not in text
    assert page.sources == ["fid.png", "fid.png", "kid.png", "a%20%231/words.png"]
    assert not re.search(r"(src|href)=.?(https?:|//)", text)
    assert "FD-ranker" in text and "SHA-256" in text and "10,000" in text


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("eval blur: radius must be 0 or more and at most 10000, got -1", 2,
         "blur --real real --fake fake --weights pipe --radii 1 -1"),
        ("eval blur: side must be 1 or more, got 0", 2,
         "blur --real real --fake fake --weights pipe --side 0"),
        ("eval blur: fake must hold pictures that can be used, got none", 3,
         "blur --real real --fake broken --weights pipe"),
        ("eval rerank: candidates must be at most the 4 that are drawn, got 8", 2,
         "rerank --real real --fake pipe --num-candidates 4 --candidates 1 8"),
        ("eval rerank: candidates must be 1 or more, got 0", 2,
         "rerank --real real --fake pipe --num-candidates 4 --candidates 0"),
        ("eval rerank: num_candidates must be 1 or more, got 0", 2,
         "rerank --real real --fake pipe --num-candidates 0"),
        ("eval rerank: fake must be the folder of a pipeline, got fake", 2,
         "rerank --real real --fake fake --weights pipe"),
        ("eval rerank: captions must be given for a pipeline, as a file or by a real set", 2,
         "rerank --real fake --fake pipe"),
        ("eval rerank: bootstrap must be at most 10000, got 99999", 2,
         "rerank --real real --fake pipe --bootstrap 99999"),
        ("eval words: split must be one of train, test, zero, got 'tset'", 2,
         "words --fake shapes-pipe --splits tset"),
        ("eval words: seeds must be different numbers, one or more, got [1, 1]", 2,
         "words --fake shapes-pipe --seeds 1 1"),
        ("eval words: num_candidates must be 1 or more, got 0", 2,
         "words --fake shapes-pipe --num-candidates 0"),
        ("eval words: captions must be those of the splits for a pipeline, got a file", 2,
         "words --fake shapes-pipe --captions real/000.txt"),
        ("eval words: captions must be of the splits train, test, got none in shapes:zero", 3,
         "words --fake shapes:zero --splits train test --count 9"),
        ("eval recon: side must be 1 or more, got 0", 2,
         "recon --data real --model pipe --side 0"),
        ("eval recon: memory must hold 1.3 TiB for 24 pictures of 16384 pixels, got", 4,
         "recon --data real --model pipe --side 16384"),
        ("eval blur: memory must hold 36.0 GiB for 24 pictures of 16384 pixels, got", 4,
         "blur --real real --fake fake --weights pipe --side 16384"),
        ("eval recon: side must be a multiple of 4, got 15", 2,
         "recon --data real --model pipe --side 15"),
        ("eval recon: data must hold pictures, got none in empty", 3,
         "recon --data empty --model pipe"),
        ("eval recon: model: pipe/prior/config.json: class must be DiscreteVAE, got Prior", 3,
         "recon --data real --model pipe/prior"),
        ("eval report: out must hold results of dalle eval, got none in empty", 3,
         "report --out empty"),
    ],
)  # fmt: skip
def test_what_does_not_fit_gets_one_line(home, capsys, line, code, words):
    said = refused(capsys, ["eval", *words.split()], code)
    assert said.startswith(line), said
