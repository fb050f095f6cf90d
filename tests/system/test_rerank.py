"""A ranker scores pairs, saves its weights and tokenizer; a CLIP model has the same interface."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from dalle.errors import CheckpointError, EnvironmentProblem, UsageError
from dalle.ranker.blocks import RankerConfig
from dalle.ranker.model import ContrastiveRanker, ImageTextRanker, TransformersCLIP, load_ranker
from dalle.tokenizer import Tokenizer

CAPTIONS = ["a red circle", "a blue square above a red circle", "grey"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS * 3, vocab_size=300)


@pytest.fixture
def ranker(tokenizer):
    torch.manual_seed(0)
    return ContrastiveRanker.from_preset(
        "tiny", tokenizer=tokenizer, image_size=16, width=32, depth=1, embed_dim=16
    ).eval()


def test_scores_are_cosines_of_each_pair(ranker):
    images = torch.rand(3, 3, 16, 16)
    scores = ranker.scores(CAPTIONS, images)
    assert scores.shape == (3,) and scores.dtype == torch.float32
    text = ranker.encode_text(ranker.tokenizer.encode(CAPTIONS, 32))
    wanted = torch.cosine_similarity(text, ranker.encode_images(images))
    torch.testing.assert_close(scores, wanted.detach())
    assert isinstance(ranker, ImageTextRanker)


def test_a_pair_scores_the_same_in_any_company(ranker):
    images = torch.rand(300, 3, 16, 16)
    captions = [CAPTIONS[i % 3] for i in range(300)]
    together = ranker.scores(captions, images)
    alone = torch.cat([ranker.scores([captions[i]], images[i : i + 1]) for i in (0, 1, 2, 299)])
    torch.testing.assert_close(together[[0, 1, 2, 299]], alone)


def test_places_in_the_picture_matter(ranker):
    image = torch.rand(1, 3, 16, 16)
    mirrored = ranker.encode_images(image.flip(3))
    assert not torch.allclose(ranker.encode_images(image), mirrored, atol=1e-3)


def test_padding_and_nothing_to_score(ranker):
    short = ranker.tokenizer.encode(CAPTIONS[:1], 32)
    torch.testing.assert_close(ranker.encode_text(short), ranker.encode_text(short[:, :8]))
    assert torch.isfinite(ranker.scores([""], torch.rand(1, 3, 16, 16))).all()
    assert ranker.scores([], torch.zeros(0, 3, 16, 16)).shape == (0,)


def test_saved_and_loaded_scores_the_same(ranker, tmp_path):
    images = torch.rand(3, 3, 16, 16)
    ranker.save_pretrained(tmp_path / "r")
    again = load_ranker(tmp_path / "r")
    assert torch.equal(ranker.scores(CAPTIONS, images), again.scores(CAPTIONS, images))


def test_truncated_weights_get_one_line(ranker, tmp_path):
    ranker.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        ContrastiveRanker.from_pretrained(tmp_path)


def test_folder_of_another_model_gets_one_line(ranker, tmp_path):
    ranker.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("ContrastiveRanker", "Prior"))
    with pytest.raises(CheckpointError, match="class must be ContrastiveRanker, got Prior"):
        load_ranker(tmp_path)


@pytest.mark.parametrize(
    ("captions", "shape"), [(CAPTIONS, (2, 3, 16, 16)), (CAPTIONS, (3, 3, 8, 8))]
)
def test_pairs_that_do_not_fit_get_one_line(ranker, captions, shape):
    with pytest.raises(UsageError, match="must be"):
        ranker.scores(captions, torch.zeros(shape))


@pytest.mark.parametrize(
    "options",
    [{"width": 33}, {"grid": 5}, {"grid": 6}, {"depth": 0}, {"colour": 1}, {"vocab_size": 10}],
)
def test_options_out_of_range_get_one_line(tokenizer, options):
    with pytest.raises(UsageError, match="must be"):
        ContrastiveRanker.from_preset("tiny", tokenizer=tokenizer, image_size=16, **options)


def test_unknown_preset_gets_one_line(tokenizer):
    with pytest.raises(UsageError, match="preset must be one of tiny, small, base, got 'huge'"):
        ContrastiveRanker.from_preset("huge", tokenizer=tokenizer, image_size=16)


@pytest.mark.parametrize("preset", ["tiny", "small", "base"])
def test_presets_build(tokenizer, preset):
    with torch.device("meta"):
        ranker = ContrastiveRanker.from_preset(preset, tokenizer=tokenizer, image_size=64)
    assert isinstance(ranker.config, RankerConfig)


class FakeBatch(dict):
    def to(self, device):
        return self


class FakeProcessor:
    @classmethod
    def from_pretrained(cls, directory, local_files_only):
        assert local_files_only
        return cls()

    def __call__(self, *, text, images, do_rescale, **_):
        assert not do_rescale
        lengths = torch.tensor([[float(len(word)), 1.0] for word in text])
        return FakeBatch(text=lengths, pixels=torch.stack(images))


class FakeCLIP(torch.nn.Module):
    """Picture vector (mean colour, 1), caption vector (length, 1)."""

    @classmethod
    def from_pretrained(cls, directory, local_files_only):
        if "missing" in directory:
            raise OSError("no file named model.safetensors\nmore lines")
        return cls()

    def forward(self, text, pixels):
        bright = pixels.mean((1, 2, 3))
        image_embeds = torch.stack([bright, torch.ones_like(bright)], 1)
        return types.SimpleNamespace(text_embeds=text, image_embeds=image_embeds)


@pytest.fixture
def fake_transformers(monkeypatch):
    fake = types.ModuleType("transformers")
    fake.CLIPModel, fake.CLIPProcessor = FakeCLIP, FakeProcessor
    monkeypatch.setitem(sys.modules, "transformers", fake)


def test_clip_scores_by_cosine(fake_transformers, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    clip = load_ranker(tmp_path)
    assert isinstance(clip, TransformersCLIP) and isinstance(clip, ImageTextRanker)
    scores = clip.scores(["a", "bb"] * 40, torch.ones(80, 3, 4, 4))
    assert scores[0] == pytest.approx(1.0) and scores[1] == pytest.approx(3 / 10**0.5)


def test_clip_of_a_wrong_folder_gets_one_line(fake_transformers):
    with pytest.raises(CheckpointError, match="got: no file named model.safetensors$"):
        TransformersCLIP("missing")


def test_clip_without_the_extra_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'dalle-ext\[clip\]'"):
        TransformersCLIP("anywhere")
