"""`dalle eval overlap` finds planted copies, and measures the distance without them."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import dalle.evaluate as evaluate
from dalle.cli import main
from dalle.data.pairs import ArrayPairs
from dalle.errors import DataError
from dalle.evaluate import detector, search
from support.copies_made import copied, picture
from support.evaluation import make_eval_home, refused, write_pictures

KINDS = ("cropped", "recoloured", "jpeg")
SMALL = {"steps": 40, "train_batch": 32, "detector_width": 8, "weights": "pipe"}


def saved(folder, images):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}.png")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """24 copies of the first of 80 pictures, among 40 others."""
    root = make_eval_home(tmp_path_factory.mktemp("overlap"))
    train = [picture(i, 48) for i in range(80)]
    saved(root / "train", train)
    copies = [copied(train[i], KINDS[i % 3], i) for i in range(24)]
    saved(root / "val", [*copies, *(picture(1000 + i, 48) for i in range(16))])
    write_pictures(root / "other", 3, seed=9)
    return root


@pytest.fixture(autouse=True)
def here(home, monkeypatch):
    monkeypatch.chdir(home)


def test_copies_are_found_and_left_out(home, capsys):
    words = ["eval", "overlap", "--real", "val", "--fake", "fake", "--seen", "train",
             "--weights", "pipe", "--steps", "110", "--train-batch", "32", "--detector-width", "8",
             "--detector-size", "24",
             "--out", "out"]  # fmt: skip
    assert main(words) == 0
    first = json.loads((home / "out/overlap.json").read_text())
    assert first["threshold"] is None and "choose a threshold" in capsys.readouterr().out
    low, high = first["points"][0]["distance_interval"]
    assert low < first["points"][0]["distance"] < high and set(first["sets"]) >= {"fake", "real"}
    assert first["extractor"]["name"] == "ranker"
    assert first["points"][0]["without"] is None and not (home / "out/overlapping.csv").exists()
    similarity = np.array(first["similarity"])
    right = np.array(first["nearest"])[:24] == np.arange(24)
    recoloured_or_jpeg = np.arange(24) % 3 > 0
    assert right[recoloured_or_jpeg].mean() >= 0.9 and right.mean() >= 0.75
    assert np.median(similarity[:24]) > np.quantile(similarity[24:], 0.9)
    # By the detector that was kept; a threshold between two similarities.
    middle = float(np.sort(similarity)[-12:-10].mean())
    more = ["--train", "out/detector", "--threshold", str(middle), "--radii", "0", "1"]
    assert main([*words, *more]) == 0
    result = json.loads((home / "out/overlap.json").read_text())
    assert result["similarity"] == first["similarity"]
    rows = list(csv.DictReader((home / "out/overlapping.csv").open()))
    assert len(rows) == len(result["overlapping"]) == 11 and result["share"] == 11 / 40
    assert rows[0]["real"].endswith(".png") and "train" in rows[0]["nearest"]
    sims = [float(row["similarity"]) for row in rows]
    assert sims == sorted(sims, reverse=True) and sims[-1] >= middle
    assert [p["radius"] for p in result["points"]] == [0, 1]
    # The distance without them is that of the rest by hand.
    gone = {row["real"].split("/")[-1] for row in rows}
    rest = [np.asarray(Image.open(p)) for p in sorted((home / "val").glob("*.png"))
            if p.name not in gone]  # fmt: skip
    saved(home / "rest", rest)
    wanted = evaluate.fid("rest", "fake", weights="pipe", bootstrap=0)["value"]
    assert result["points"][0]["without"] == pytest.approx(wanted, rel=1e-9)
    assert result["points"][0]["n_without"] == 29
    assert Image.open(home / "out/overlap-sheet.png").size[0] > 700
    assert result["pictures"] == ["overlap.png", "overlap-sheet.png"]


def test_near_copies_are_all_found(home):
    """50 planted copies (smaller, JPEG, a tenth cut off) among 150 others, by the same detector."""
    kinds = ("resized", "jpeg", "trimmed")
    near = [copied(picture(i, 48), kinds[i % 3], i) for i in range(50)]
    saved(home / "near", [*near, *(picture(2000 + i, 48) for i in range(150))])
    result = evaluate.overlap("near", "fake", seen="train", steps=110, train_batch=32,
                              detector_width=8, detector_size=24, weights="pipe")  # fmt: skip
    similarity = np.array(result["similarity"])
    assert (np.array(result["nearest"])[:50] == np.arange(50)).all()
    found = (similarity >= similarity[:50].min()).sum()
    assert 50 / found >= 0.98  # precision where recall is 1


def test_a_stopped_training_goes_on_to_the_same_bits(home, monkeypatch):
    monkeypatch.setattr(detector, "KEEP_EVERY", 3)
    options = {**SMALL, "steps": 8, "seen": "train"}
    whole = evaluate.overlap("val", "fake", cache=home / "a", **options)
    made, calls = detector.info_nce, []

    def stops(a, b):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return made(a, b)

    monkeypatch.setattr(detector, "info_nce", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate.overlap("val", "fake", cache=home / "b", **options)
    again = evaluate.overlap("val", "fake", cache=home / "b", **options)
    assert len(calls) == 5 + 5  # from step 3 of 8
    assert again["detector"]["fingerprint"] == whole["detector"]["fingerprint"]
    before = len(calls)
    evaluate.overlap("val", "fake", cache=home / "b", **options)
    assert len(calls) == before


def test_nearest_is_exact_in_any_chunks(monkeypatch):
    torch.manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(n, 7), dim=1) for n in (50, 33))
    b[20] = b[3]
    wanted = (a.double() @ b.double().T).max(1)
    for chunk in (1, 7, 4096):
        monkeypatch.setattr(search, "CHUNK", chunk)
        values, rows = evaluate.nearest(a, b)
        assert torch.allclose(values.double(), wanted.values, atol=1e-6)
        assert (rows != 20).all() and torch.equal(rows, wanted.indices)
    assert evaluate.nearest(a[:0], b)[0].shape == (0,)
    assert torch.equal(evaluate.nearest(a.numpy(), b.numpy())[1], wanted.indices)
    for bad, line in ((b[:0], "m >= 1"), (b / 0, "features must be finite, got NaN or infinity")):
        with pytest.raises(DataError, match=line):
            evaluate.nearest(a, bad)


def test_copies_have_the_size_and_vary():
    image = picture(0, 50)
    made = [detector.transformed(image, 24, np.random.default_rng(i)) for i in range(20)]
    assert {m.shape for m in made} == {(24, 24, 3)} and {m.dtype for m in made} == {np.dtype("u1")}
    assert len({m.tobytes() for m in made}) == 20
    same = detector.transformed(image, 24, np.random.default_rng(3))
    assert (same == made[3]).all()
    for thin in (picture(0, 8)[:1], picture(0, 8)[:, :1]):
        assert detector.transformed(thin, 24, np.random.default_rng(0)).shape == (24, 24, 3)


def test_sets_without_files_and_a_distance_that_cannot_be(home, monkeypatch):
    images = np.stack([picture(i, 24) for i in range(6)])
    pairs = ArrayPairs("six", images, [""] * 6)
    monkeypatch.setattr("dalle.evaluate.extractors.PIPELINES", ())
    options = {**SMALL, "steps": 2, "weights": None}
    result = evaluate.overlap(pairs, "fake", seen=pairs, threshold=-1.0, **options)
    assert [e["real"] for e in result["overlapping"]] != [] and result["share"] == 1.0
    assert {e["real"] for e in result["overlapping"]} == set("012345")
    assert result["points"] == [] and any("no distance" in line for line in result["warnings"])
    assert any("its own copy" in line for line in result["warnings"])
    # All are copies: nothing is left to measure.
    gone = evaluate.overlap(pairs, "fake", seen=pairs, threshold=0.0, **{**options, **SMALL})
    assert gone["tables"][0]["rows"][0] == [0.0, 6, 1.0]
    assert gone["points"][0]["without"] is None and "are left" in " ".join(gone["warnings"])


def test_sets_are_refused_before_the_training(home, capsys, monkeypatch):
    monkeypatch.setattr(detector, "train_detector", None)
    words = ["eval", "overlap", "--seen", "train", "--weights", "pipe", "--out", "no"]
    for real, fake, line in (
        ("broken", "fake", "real must hold pictures that can be used, got none"),
        ("val", "one", "fake at radius 0 must hold 2 or more pictures that can be used, got 1"),
    ):
        assert line in refused(capsys, [*words, "--real", real, "--fake", fake], 3)
    words = ["--real", "val", "--fake", "fake", "--seen", "broken"]
    said = refused(capsys, ["eval", "overlap", "--out", "no", *words], 3)
    assert said == "eval overlap: seen must hold pictures that can be used, got none"


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["--threshold", "1.5"], 2, "threshold must be a number from -1 to 1, got 1.5"),
        (["--threshold", "nan"], 2, "threshold must be"),
        (["--radii", "-1"], 2, "radius must be 0 or more"),
        (["--steps", "0"], 2, "steps must be 1 or more, got 0"),
        (["--train-batch", "1"], 2, "train_batch must be 2 or more, got 1"),
        (["--detector-size", "20"], 2, "image_size must be a multiple of 8"),
        (["--detector-width", "0"], 2, "width must be 4 to 512, got 0"),
        (["--seen", "empty"], 3, "seen must hold pictures, got none in empty"),
        (["--seen", "nowhere"], 3, "seen must be a folder"),
        (["--train", "one"], 3, "train must hold 2 or more pictures that can be used, got 1"),
        (["--train", "broken"], 3, "train must hold 2 or more pictures that can be used, got 0"),
        (["--train", "pipe/ranker"], 3, "train must hold pictures"),
        (["--train", "hurt"], 3, "eval overlap: train: hurt"),
        (["--weights", "nowhere"], 3, "weights must be there"),
        (["--extractor", "clip", "--steps", "1"], 2, "weights must be a folder with a CLIP"),
        (["--faiss"], 4, "faiss must be installed, got none"),
    ],
)
def test_bad_input_gets_one_line(home, capsys, words, code, line):
    if "--faiss" in words:
        try:
            import faiss  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("faiss is installed")
    if not (home / "hurt").exists():
        detector.CopyDetector(detector.DetectorConfig(16, 4, 8)).save_pretrained(home / "hurt")
        weights = home / "hurt/model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-8])
    base = ["eval", "overlap", "--real", "other", "--fake", "fake", "--out", "bad"]
    base += [] if "--weights" in words or "clip" in words else ["--weights", "pipe"]
    said = refused(capsys, [*base, *words], code)
    assert line in said and said.count("\n") == 0, said


def test_views_are_the_picture_and_its_crops():
    image = picture(1, 50)
    found = detector.views(image)
    assert len(found) == detector.VIEWS and (found[0] == image).all()
    assert {v.shape for v in found[1:]} == {(40, 40, 3)} and (found[4] == image[10:, 10:]).all()
    model = detector.CopyDetector(detector.DetectorConfig(16, 4, 8)).eval()
    both = detector.DetectorExtractor(model, cropped=True).features([image, image[:, ::-1].copy()])
    plain = detector.DetectorExtractor(model)
    assert both.shape == (2, 8 * detector.VIEWS)
    assert torch.allclose(both[0].reshape(-1, 8), plain.features(found), atol=1e-6)
    assert detector.views(picture(0, 8)[:1, :1])[5].shape == (1, 1, 3)
