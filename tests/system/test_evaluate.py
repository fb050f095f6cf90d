"""`dalle eval` measures sets of all kinds, keeps features, names a distance after its network."""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import dalle.evaluate as evaluate
from dalle.cli import main
from dalle.errors import DataError, UsageError
from dalle.evaluate import cache, drawings
from dalle.evaluate.ballots import Rule
from dalle.evaluate.extractors import Extractor, RankerExtractor, load_extractor
from dalle.evaluate.inception import InceptionTorchvision
from dalle.evaluate.session import Session, Setup
from dalle.evaluate.sets import Pictures
from dalle.optional import load_module
from dalle.pipeline import Pipeline
from support.evaluation import make_eval_home, refused


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_eval_home(tmp_path_factory.mktemp("eval"))


@pytest.fixture(autouse=True)
def here(home, monkeypatch):
    monkeypatch.chdir(home)


def test_a_distance_has_the_name_of_its_network_and_all_that_defines_it(home, capsys):
    words = ["eval", "fid", "--real", "real", "--fake", "fake", "--extractor", "ranker"]
    assert main([*words, "--weights", "pipe", "--out", "out", "--infinite"]) == 0
    heard = capsys.readouterr().out
    assert "FD-ranker" in heard and "FID" not in heard
    result = json.loads((home / "out/fid.json").read_text())
    assert result["metric"] == "FD-ranker" and result["n"] == {"real": 24, "fake": 30}
    assert result["interval"][0] < result["value"] < result["interval"][1]
    assert len(result["warnings"]) == 2 and "10,000" in result["warnings"][0]
    assert result["extractor"]["name"] == "ranker" and "16 x 16" in result["resize"]
    prints = [result["sets"][name]["fingerprint"] for name in ("real", "fake")]
    assert len(set(prints)) == 2 and result["seed"] == 0 and "value" in result["infinite"]
    assert Image.open(home / "out/fid.png").size[0] > 500
    assert "| FD-ranker |" in (home / "out/fid.md").read_text()
    # The value is that of the features by hand.
    ranker = Pipeline.from_pretrained("pipe").ranker
    sets = [
        RankerExtractor(ranker).features(
            [np.asarray(Image.open(p)) for p in sorted((home / name).glob("*.png"))]
        )
        for name in ("real", "fake")
    ]
    assert result["value"] == pytest.approx(evaluate.frechet_distance(*sets), rel=1e-9)


def test_the_function_gives_what_the_command_writes(home):
    got = evaluate.fid("real", "fake", weights="pipe", bootstrap=0)
    assert got["interval"] is None and got["metric"] == "FD-ranker"
    again = evaluate.fid("real", "fake", weights="pipe", out=home / "o", bootstrap=5)
    assert got["value"] == again["value"] == json.loads((home / "o/fid.json").read_text())["value"]


def test_a_pipeline_draws_the_captions_of_the_real_set(home):
    options = {"num_candidates": 2, "count": 12, "bootstrap": 0}
    got = evaluate.fid("real", "pipe", **options)
    drawn = got["sets"]["fake"]
    assert drawn["kind"] == "pipeline" and drawn["pictures"] == 12
    assert drawn["drawn"]["num_candidates"] == 2
    for same in (home / "pipe", Pipeline.from_pretrained("pipe")):
        again = evaluate.fid(home / "real", same, weights="pipe", **options)
        assert again["value"] == got["value"] and again["sets"]["fake"]["kind"] == "pipeline"
    (home / "captions.txt").write_text("a\nb\n\nc\n")
    given = evaluate.features("pipe", captions=home / "captions.txt", num_candidates=1)
    assert given["n"] == {"data": 3}
    # Captions repeat in the set, pictures do not.
    pipeline = Pipeline.from_pretrained("pipe")
    made = drawings.draw("t", pipeline, ["a", "a", "b"], [1, 4])
    assert len(np.unique(made.images.reshape(6, -1), axis=0)) >= 4
    # The best of the first n is what n candidates alone would have kept.
    alone = pipeline.generate("b", num_candidates=1, top=1)
    assert (made.images[2, 0] == drawings.to_uint8(alone.images)[0]).all()
    best = pipeline.generate("b", num_candidates=4, top=1)
    assert (made.images[2, 1] == drawings.to_uint8(best.images)[0]).all()


def test_samples_of_dalle_sample_are_a_set(home):
    assert main(
        ["sample", "a red circle", "a blue square", "--model", "pipe", "--num-candidates", "4",
         "--top", "3", "--out", "samples"]
    ) == 0  # fmt: skip
    found = evaluate.features("samples", weights="pipe")
    assert found["n"] == {"data": 6}
    assert evaluate.features("samples", weights="pipe", first_only=True)["n"] == {"data": 2}
    score = evaluate.clip_score("samples", weights="pipe", bootstrap=0)
    records = json.loads((home / "samples/samples.json").read_text())["records"]
    wanted = np.mean([max(s, 0) for r in records for s in r["scores"]])
    assert score["value"] == pytest.approx(100 * wanted, rel=1e-2)  # PNGs are rounded to 8 bits
    assert score["metric"] == "ranker score"


def test_features_are_kept_and_a_stopped_run_goes_on(home, monkeypatch, capsys):
    monkeypatch.setattr(cache, "PART", 10)
    calls, stop_at = [], [3]
    whole = RankerExtractor.features

    def counted(self, images):
        calls.append(len(images))
        if len(calls) in stop_at:
            stop_at.clear()
            raise KeyboardInterrupt
        return whole(self, images)

    monkeypatch.setattr(RankerExtractor, "features", counted)
    options = {"weights": "pipe", "cache": home / "kept", "batch_size": 5}
    with pytest.raises(KeyboardInterrupt):
        evaluate.features("real", **options)
    assert calls == [5, 5, 5]
    stop_at.append(4)
    words = ["eval", "features", "--data", "real", "--weights", "pipe", "--batch-size", "5"]
    said = refused(capsys, [*words, "--cache", str(home / "kept"), "--out", "kept-out"], 6)
    assert said.endswith(f"are kept in {home / 'kept'}, and the same command goes on")
    del calls[:]
    first = evaluate.features("real", **options)
    assert calls == [5, 5, 4] and first["cached_parts"] == 1
    del calls[:]
    assert torch.equal(evaluate.features("real", **options)["features"], first["features"])
    assert calls == []
    damaged = sorted((home / "kept/features").rglob("*.safetensors"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    again = evaluate.features("real", **options)
    assert torch.equal(again["features"], first["features"]) and calls == [5, 5]
    assert "is damaged and is computed again" in capsys.readouterr().err
    # Other pictures or another network: another place.
    Image.new("RGB", (16, 16)).save(home / "real/000.png")
    assert not torch.equal(evaluate.features("real", **options)["features"], first["features"])


def test_features_of_captions_are_kept_too(home, monkeypatch):
    calls, whole = [], RankerExtractor.text_features
    monkeypatch.setattr(
        RankerExtractor, "text_features", lambda self, c: calls.append(len(c)) or whole(self, c)
    )
    monkeypatch.setattr("dalle.evaluate.scores.TEXTS", 2)
    options = {"weights": "pipe", "cache": home / "texts", "bootstrap": 0}
    values = [evaluate.clip_score("real", **options)["value"] for _ in range(2)]
    assert calls == [2, 2, 1] and values[0] == values[1]


def test_features_command_writes_what_can_be_read(home, capsys):
    assert main(["eval", "features", "--data", "fake", "--weights", "pipe", "--out", "f"]) == 0
    assert "(30 data)" in capsys.readouterr().out
    read = load_file(home / "f/features.safetensors")
    assert read["features"].shape == (30, 16) and read["items"].tolist() == list(range(30))
    for name in ("features.json", "features.png", "features.md"):
        assert (home / "f" / name).stat().st_size > 100


@pytest.mark.parametrize("verb", ["kid", "is", "prc"])
def test_each_verb_leaves_its_files(home, verb, capsys):
    words = ["eval", verb, "--real", "real", "--fake", "fake", "--weights", "pipe"]
    assert main([*words, "--out", f"of-{verb}", "--bootstrap", "10"]) == 0, capsys.readouterr()
    result = json.loads((home / f"of-{verb}/{verb}.json").read_text())
    names = {"kid": "KD-ranker", "is": "IS-ranker", "prc": "precision and recall"}
    assert result["metric"] == names[verb]
    assert {p.name for p in (home / f"of-{verb}").iterdir()} == {
        f"{verb}.json", f"{verb}.md", f"{verb}.png"}  # fmt: skip
    assert "10,000" in result["warnings"][0]
    assert f" {'are' if verb == 'prc' else 'is'} " in result["warnings"][0]
    if verb == "is":  # the captions of the real set are the classes
        assert result["classes"]["count"] == 5 and 1 <= result["value"] <= 5


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("real must hold 2 or more pictures that can be used, got 1 in one", 3, "--real one"),
        ("real must hold pictures, got none in empty", 3, "--real empty"),
        ("real must hold 2 or more pictures that can be used, got 0", 3, "--real broken"),
        ("fake must be a folder of pictures", 3, "--fake nowhere"),
        ("real must hold pictures, got the codes of pictures in codes; take the set", 3,
         "--real codes"),
        ("weights: pipe/vae/config.json: class must be ContrastiveRanker, got DiscreteVAE", 3,
         "--weights pipe/vae"),
        ("weights must be there, got no such path: nowhere", 3, "--weights nowhere"),
        ("(did you mean ranker?)", 2, "--extractor rankr"),
        ("fetch https://github.com/toshas", 2, "--extractor inception-tf"),
        ("put it at weights/inception-torchvision.safetensors", 2,
         "--extractor inception-torchvision"),
        ("weights must be those of inception-tf, got pipe/vae/model.safetensors", 3,
         "--extractor inception-tf --weights pipe/vae/model.safetensors"),
        ("must be a safetensors file, got: ", 3, "--extractor inception-tf --weights real/000.png"),
        ("may run code when read", 2, "--extractor inception-tf --weights x.pth"),
        ("weights must be a folder with a CLIP", 2, "--extractor clip"),
        ("count must be 1 or more, got 0", 2, "--count 0"),
        ("bootstrap must be 0 or more, got -1", 2, "--bootstrap -1"),
        ("fake must hold 20 or more pictures for infinite, got 5", 3, "--infinite --count 5"),
        ("got fake/000.png: it is a file", 4, "--out fake/000.png"),
    ],
)  # fmt: skip
def test_what_does_not_fit_gets_one_line(home, capsys, line, code, words):
    (home / "x.pth").write_bytes(b"x")
    if "codes" in words:
        encode = "data encode --data real --vae pipe/vae --out codes --image-size 16"
        assert main(encode.split()) == 0
    given = {"--real": "real", "--fake": "fake", "--weights": "pipe", "--out": "bad"}
    options = words.split()
    if "--extractor" in words:
        del given["--weights"]
    base = [x for name, value in given.items() if name not in options for x in (name, value)]
    said = refused(capsys, ["eval", "fid", *base, *options], code)
    assert said.startswith("eval fid: ") and line in said, said


def test_a_score_over_captions_needs_some(home):
    bare = Pictures("bare", [home / "real/000.png"] * 4, [""] * 4)
    with pytest.raises(DataError, match="^eval is: captions must be there .* got none in bare"):
        evaluate.is_(bare, weights="pipe")


def test_features_that_are_not_finite_are_refused(home):
    class Broken:
        name = distance = kernel = score = resize = classes = "broken"
        dimensions, fingerprint = 2, "x"

        def features(self, images):
            return torch.full((len(images), 2), torch.nan)

        def probabilities(self, features, captions):
            return features

    assert isinstance(Broken(), Extractor)
    with pytest.raises(DataError, match="features of real must be finite, got NaN .* in 24 of 24"):
        evaluate.fid("real", "fake", extractor=Broken())
    with pytest.raises(UsageError, match="extractor must be ranker or clip, got broken"):
        evaluate.clip_score("real", extractor=Broken())
    with pytest.raises(UsageError, match="option must be one of .*, got colour"):
        evaluate.fid("real", "fake", colour=1)
    with pytest.raises(UsageError, match=r"got batchsize \(did you mean batch_size\?\)$"):
        evaluate.fid("real", "fake", batchsize=1)
    for call, line in (
        (lambda: evaluate.fid(3, "fake"), "real must be a path, a Pairs or a Pipeline, got int"),
        (lambda: evaluate.fid("real", "fake", weights=3), "weights must be a path, got int"),
        (lambda: evaluate.recon("real", 7), "model must be a path, a DiscreteVAE or a Pipeline"),
        (lambda: evaluate.rerank("real", "pipe", candidates="12"), "candidates must be a list of"),
        (lambda: evaluate.words("pipe", splits="tset"), "split must be one of train, test, zero"),
        (lambda: evaluate.words("pipe", splits=3), "splits must be of train, test, zero, got 3"),
        (lambda: evaluate.fid("", "fake"), "real must be a path or a name, got an empty one"),
        (lambda: evaluate.fid("real", "fake", out=3), "out must be a path, got int"),
        (lambda: evaluate.fid("real", "fake", cache=None), "cache must be a path, got NoneType"),
        (lambda: evaluate.fid("real", "fake", device=3), "device must be auto, cpu or another's"),
        (lambda: load_extractor("ranker", "pipe", device="x"), "device: must be auto, cpu or"),
        (lambda: evaluate.report(None), "eval report: out must be a path, got NoneType"),
        (lambda: evaluate.votes("real", "real", votes=3), "votes must be a path, got int"),
        (lambda: evaluate.votes("real", "real", rule=3), "rule must be a ballots.Rule, got int"),
        (lambda: evaluate.votes("real", "real", rule=Rule("x")), "disagreement must be a number"),
    ):
        with pytest.raises(UsageError, match=line):
            call()
    with pytest.raises(DataError, match="every picture must have a caption, got 30 of 30 without"):
        evaluate.clip_score("fake", weights="pipe")


def random_weights(state):
    """Fills a state dict: variances 1, the rest small."""
    for name, tensor in state.items():
        if "var" in name:
            tensor.fill_(1)
        elif tensor.is_floating_point():
            tensor.uniform_(-0.05, 0.05)
        else:
            tensor.zero_()
    return state


def test_inception_networks_are_the_ones_of_their_packages(home, monkeypatch, no_sockets):
    """With random weights: pool features and logits agree with the packages' own forward pass."""
    models = load_module("torchvision.models", "test", "eval")
    torch.manual_seed(0)
    with torch.device("meta"):
        network = models.inception_v3(weights=None, aux_logits=True, init_weights=False)
    network = network.to_empty(device="cpu").eval()
    random_weights(network.state_dict())
    save_file(network.state_dict(), home / "tv.safetensors")
    mine = load_extractor("inception-torchvision", home / "tv.safetensors")
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    found = mine.features([image])
    wide = Image.fromarray(image).resize((299, 299), Image.Resampling.BILINEAR)
    x = torch.from_numpy(np.array(wide)).permute(2, 0, 1)[None] / 255
    network.transform_input = True  # torchvision's own form of DM-GAN's affine
    with torch.no_grad():
        wanted = network(x).softmax(1)
    torch.testing.assert_close(mine.probabilities(found, []), wanted.double(), rtol=1e-4, atol=1e-6)
    assert mine.distance == "FID (torchvision weights)" and found.shape == (1, 2048)
    assert isinstance(mine, InceptionTorchvision)

    module = load_module("torch_fidelity.feature_extractor_inceptionv3", "test", "eval")
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
    kind = module.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch, torch.device("meta"):
        patch.setattr(kind, "load_state_dict", lambda *_: None)
        network = kind("t", ["2048"])
    weights = random_weights(network.to_empty(device="cpu").state_dict())
    save_file({n: t for n, t in weights.items() if "tracked" not in n}, home / "tf.safetensors")
    del network, mine
    mine = load_extractor("inception-tf", home / "tf.safetensors")
    other = image[:, ::-1][:30].copy()
    found = mine.features([other, image])
    mine.network.features_list = ["2048", "logits_unbiased"]
    with torch.no_grad():
        pool, logits = mine.network(torch.from_numpy(image).permute(2, 0, 1)[None])
    torch.testing.assert_close(found[1:], pool)
    torch.testing.assert_close(
        mine.probabilities(found[1:], []), logits.double().softmax(1), rtol=1e-4, atol=1e-7
    )
    assert (mine.distance, mine.kernel, mine.score) == ("FID", "KID", "IS")
    assert evaluate.fid("real", "fake", weights="pipe", bootstrap=0)["value"] > 0
    assert no_sockets == []  # nothing was fetched


def test_a_session_opens_built_in_sets_by_name_and_split(home):
    session = Session("t", Setup(image_size=24, count=7))
    for spec, kind in (("shapes:zero", "built-in"), ("real", "folder")):
        opened = session.take("real", spec)
        assert (opened.kind, len(opened)) == (kind, 7)
    with pytest.raises(UsageError, match="split must be one of train, test, zero, got 'none'"):
        session.take("real", "shapes:none")


class FakeCLIP(torch.nn.Module):
    """Picture vector (mean colour, 1), caption vector (length, 1)."""

    def __init__(self):
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.0))

    @classmethod
    def from_pretrained(cls, directory, local_files_only):
        return cls()

    def forward(self, text, pixels):
        bright = pixels.mean((1, 2, 3))
        return types.SimpleNamespace(
            text_embeds=text, image_embeds=torch.stack([bright, torch.ones_like(bright)], 1)
        )


class FakeBatch(dict):
    def to(self, device):
        return self


class FakeProcessor:
    @classmethod
    def from_pretrained(cls, directory, local_files_only):
        return cls()

    def __call__(self, *, text, images, do_rescale, **_):
        assert not do_rescale
        lengths = torch.tensor([[float(len(word)), 1.0] for word in text])
        return FakeBatch(text=lengths, pixels=torch.stack(images))


def test_a_clip_of_transformers_gives_distances_of_its_name(home, monkeypatch):
    fake = types.ModuleType("transformers")
    fake.CLIPModel, fake.CLIPProcessor = FakeCLIP, FakeProcessor
    monkeypatch.setitem(sys.modules, "transformers", fake)
    options = {"extractor": "clip", "weights": home / "pipe", "bootstrap": 0}
    result = evaluate.fid("real", "fake", **options)
    assert result["metric"] == "FD-clip" and result["extractor"]["dimensions"] == 2
    bright = [
        np.array([np.asarray(Image.open(p)).mean() / 255 for p in sorted((home / s).glob("*.png"))])
        for s in ("real", "fake")
    ]
    vectors = [np.stack([b, np.ones_like(b)], 1) for b in bright]
    vectors = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in vectors]
    assert result["value"] == pytest.approx(evaluate.frechet_distance(*vectors), rel=1e-3)
    score = evaluate.clip_score("real", **options)
    assert score["metric"] == "CLIP score" and 0 < score["value"] < 100
    classes = evaluate.is_("fake", real="real", **options)
    assert classes["metric"] == "IS-clip" and classes["value"] == pytest.approx(1, abs=1e-3)


def test_an_interval_of_a_distance_does_not_go_below_zero(home):
    result = evaluate.fid("real", "real", weights="pipe", bootstrap=20)
    assert result["value"] < 1e-9 and result["interval"][0] == 0 < result["interval"][1]


def test_a_judge_that_chose_the_samples_itself_is_named(home):
    result = evaluate.kid("real", "pipe", num_candidates=2, count=6, bootstrap=0)
    assert any("chose the samples" in line for line in result["warnings"])
    alone = evaluate.kid("real", "pipe", num_candidates=1, count=6, bootstrap=0)
    assert not any("chose the samples" in line for line in alone["warnings"])
