"""Training of the ranker: similar captions in a batch, spliced pictures, learning to choose."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from dalle import cli
from dalle.data.loader import StepLoader
from dalle.data.mixture import MixedPairs
from dalle.data.order import sampler_for
from dalle.data.pairs import ArrayPairs
from dalle.dvae.model import DiscreteVAE
from dalle.errors import UsageError
from dalle.ranker.model import ContrastiveRanker
from dalle.tokenizer import Tokenizer
from dalle.train import ranker as training
from dalle.train import read_captions
from dalle.train.config import LoopConfig
from dalle.train.loop import train
from dalle.train.ranker import RankerTrainConfig
from dalle.train.similar_captions import draw_similar
from support.ranker import SMALL, toy_pairs, toy_task


def test_training_teaches_which_half_and_which_colour(tmp_path):
    task = toy_task(SMALL)
    train(task, LoopConfig(out=tmp_path, steps=60, picture_every=60))
    fresh = toy_pairs(count=32, seed=1)
    captions = sorted(set(fresh.captions))
    images = torch.from_numpy(fresh.images).permute(0, 3, 1, 2) / 255
    scores = torch.stack([task.ranker.scores([c] * 32, images) for c in captions])
    named = [captions[i] for i in scores.argmax(0).tolist()]
    assert np.mean([a == b for a, b in zip(named, fresh.captions, strict=True)]) > 0.9
    assert list((tmp_path / "pictures").glob("views-*.png"))


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    whole = toy_task(SMALL)
    train(whole, LoopConfig(out=tmp_path / "a", steps=6, picture_every=0))
    first, second = toy_task(SMALL), toy_task(SMALL)
    train(first, LoopConfig(out=tmp_path / "b", steps=2, picture_every=0))
    train(second, LoopConfig(out=tmp_path / "b", steps=6, picture_every=0))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_numpys_integers_train_and_are_saved(tmp_path):
    i = np.int64
    config = RankerTrainConfig(batch_size=i(8), group=i(4), num_spliced=i(3))
    task = toy_task(config, seed=0, steps=i(2))
    train(task, LoopConfig(out=tmp_path, steps=i(2), seed=i(3), picture_every=i(0)))
    again = toy_task(RankerTrainConfig(batch_size=8, group=4, num_spliced=3), seed=0, steps=2)
    assert train(again, LoopConfig(out=tmp_path, steps=2, seed=3)).step == 2  # it resumes
    sizes = {"image_size": i(16), "grid": i(4), "width": i(32), "depth": i(1), "embed_dim": i(8)}
    ranker = ContrastiveRanker.from_preset("tiny", tokenizer=task.ranker.tokenizer, **sizes)
    ranker.save_pretrained(tmp_path / "saved")
    assert ContrastiveRanker.from_pretrained(tmp_path / "saved").config == ranker.config


def test_captions_of_a_large_set_are_read_and_the_losses_are_those_of_kept_ones(monkeypatch):
    def losses():
        task = toy_task(SMALL)
        return task, [float(task.train_step(step)["loss"]) for step in range(4)]

    kept, expected = losses()
    monkeypatch.setattr(read_captions, "MAX_KEPT", 159)
    read, found = losses()
    assert found == expected and kept.read is None
    assert read.read is not None and not hasattr(read, "text")
    monkeypatch.setattr(read_captions, "SAMPLE", 20)  # which words are rare is then estimated
    assert np.isfinite(losses()[1]).all()


def test_look_alikes_share_words_and_never_the_caption():
    task = toy_task(SMALL)
    rng = torch.Generator().manual_seed(0)
    items = draw_similar(task.caption_vectors, task.caption_ids, 64, 4, rng).view(16, 4)
    assert items.dtype == torch.int64 and int(items.max()) < 160
    for row in items.tolist():
        captions = [task.pairs.captions[i] for i in row]
        first = set(captions[0].split())
        for other in captions[1:]:
            assert other != captions[0]
            assert len(first & set(other.split())) == 3  # colour or side differs, not both


def mixed(several=False):
    """40 pictures with the weight .7 beside 120 with .2 and 5 with .1, of other words."""
    parts = [toy_pairs(count=count, seed=count) for count in (40, 120, 5)]
    for pairs, words in zip(parts, ("", "a photo of ", "drawn "), strict=True):
        pairs.captions = [words + text for text in pairs.captions]
        if several:
            pairs.several = {0: [f"{words}one", "two", "three", "four", "five", "six"]}
    return MixedPairs(parts, [0.7, 0.2, 0.1], ["a", "b", "c"])


@pytest.mark.parametrize("group", [1, 4])
def test_a_batch_has_as_many_of_each_source_as_the_order_of_all_trainings(group, monkeypatch):
    config = dataclasses.replace(SMALL, group=group)
    task, order = toy_task(config, pairs=mixed()), sampler_for(mixed(), 16, 0)
    monkeypatch.setattr(read_captions, "MAX_KEPT", 0)  # as of a set too large to keep its captions
    read, together = toy_task(config, pairs=mixed()), 0
    total, first_items = Counter(), set()
    for step in range(100):
        items = task.load(step)[1]
        sources = np.searchsorted([40, 160], items.numpy(), "right")
        assert sorted(sources) == sorted(np.searchsorted([40, 160], order.indices(step), "right"))
        total.update(sources.tolist())
        first_items |= set(items[::group].tolist())
        together += sum(len(set(row)) == 1 for row in sources.reshape(-1, group).tolist())
        if step < 10:
            assert torch.equal(read.load(step)[1], items)
        if group == 1:
            assert items.tolist() == order.indices(step).tolist()
    assert np.allclose([total[k] / 1600 for k in range(3)], [0.7, 0.2, 0.1], atol=0.03)
    assert together >= (100 * 16 if group == 1 else 200)  # at most two of four are of several
    assert first_items >= set(range(40))
    for row in items.view(-1, group).tolist():
        captions = [task.pairs.captions[item] for item in row]
        assert len(set(captions)) > 1 or group == 1


def test_without_weights_the_order_is_the_one_of_a_single_set():
    def batches(pairs):
        return [toy_task(SMALL, pairs=pairs).load(step)[1].tolist() for step in (0, 7)]

    parts = mixed().items_of
    whole = ArrayPairs("one", np.concatenate([p.images for p in parts]), mixed().captions[:])
    assert batches(MixedPairs(parts)) == batches(whole) != batches(mixed())


def test_a_part_with_a_larger_weight_has_its_captions_drawn_more_often():
    task = toy_task(SMALL, pairs=mixed(several=True))
    items = torch.tensor([0, 40, 160])
    rows = np.array([task.caption_rows(items, step).tolist() for step in range(40)])
    changes = [int((np.diff(rows[:, k]) != 0).sum()) for k in range(3)]
    epochs = [[task.parts.epoch(step, int(i)) for i in items] for step in (0, 10, 39)]
    assert epochs == [[0, 0, 0], [2, 0, 3], [10, 1, 12]]
    assert changes[0] > 6 > changes[1] and changes[2] > 6
    again = toy_task(SMALL, pairs=mixed(several=True))
    assert torch.equal(again._text_of(items, 39)[0], task._text_of(items, 39)[0])


def test_a_mixture_resumes_with_the_same_bits_for_any_number_of_workers(tmp_path):
    def run(out, steps, workers):
        task = toy_task(SMALL, pairs=mixed())
        task.loader = StepLoader("ranker train", task.load, task.pairs, workers=workers, pin=False)
        train(task, LoopConfig(out=tmp_path / out, steps=steps, picture_every=0))
        return task.model.state_dict()

    whole = run("whole", 6, 0)
    run("again", 2, 0)
    for name, tensor in run("again", 6, 2).items():
        assert torch.equal(tensor, whole[name]), name


def test_a_group_must_fit_the_smallest_source():
    config = dataclasses.replace(SMALL, batch_size=44, group=22)
    line = "ranker: group must be at most 21 for 5 pairs, got 22"
    with pytest.raises(UsageError, match=line):
        toy_task(config, pairs=mixed())
    one = MixedPairs([toy_pairs(count=40), toy_pairs(count=1)], [1e-9, 1.0])
    assert (toy_task(SMALL, pairs=one).load(0)[1] == 40).sum() >= 15


def test_splice_moves_a_rectangle_and_nothing_else():
    cells = torch.arange(3)[:, None, None].expand(3, 8, 8).contiguous()
    out = training.splice(cells, torch.Generator().manual_seed(1))
    for i in range(3):
        changed = out[i] != i
        assert set(out[i].unique().tolist()) == {i, (i - 1) % 3}
        rows, columns = changed.any(1).sum(), changed.any(0).sum()
        assert changed.sum() == rows * columns and 2 <= rows <= 4 and 2 <= columns <= 4
    assert torch.equal(cells[:, 0, 0], torch.arange(3))


def test_patches_and_pixels_are_inverse():
    images = torch.rand(2, 3, 12, 12)
    cells = training.patches(images, 4)
    assert cells.shape == (2, 4, 4, 27)
    assert torch.equal(training.pixels(cells), images)


def test_loss_is_that_of_two_cross_entropies():
    logits = torch.randn(5, 5)
    none_same = torch.eye(5, dtype=torch.bool)
    rows = -logits.log_softmax(1).diagonal().mean()
    columns = -logits.log_softmax(0).diagonal().mean()
    found = training.contrastive_loss(logits, none_same)
    torch.testing.assert_close(found, (rows + columns) / 2)


def test_twins_are_no_wrong_answers_and_spliced_ones_are():
    logits = torch.tensor([[5.0, 5.0], [5.0, 5.0]])
    apart, same = torch.eye(2, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool)
    assert training.contrastive_loss(logits, same) < 1e-3
    assert training.contrastive_loss(logits, apart) == pytest.approx(np.log(2), abs=1e-4)
    spliced = torch.full((2, 1), 5.0)
    assert training.contrastive_loss(logits, same, spliced) == pytest.approx(
        np.log(2) / 2, abs=1e-4
    )


class HalvingVAE(torch.nn.Module):
    """Codes are mean colours of 4-pixel cells in 64 levels; decoding paints them flat."""

    def encode(self, images):
        means = torch.nn.functional.avg_pool2d(images, 4)
        levels = (means * 3.999).long()
        return (levels * torch.tensor([16, 4, 1]).view(1, 3, 1, 1)).sum(1)

    def decode(self, tokens):
        parts = torch.stack([tokens // 16, tokens // 4 % 4, tokens % 4], 1).float() / 3
        return parts.repeat_interleave(4, 2).repeat_interleave(4, 3)


def test_with_a_vae_pictures_are_shown_as_it_gives_them_back():
    pairs = toy_pairs()
    config = RankerTrainConfig(batch_size=8, num_spliced=3, reconstructed=1.0)
    task = toy_task(config, pairs=pairs)
    task.vae = HalvingVAE()
    items, images, spliced = task.views(0)
    assert images.shape == (8, 3, 16, 16) and spliced.shape == (3, 3, 16, 16)
    wanted = torch.from_numpy(pairs.images[items.numpy()]).permute(0, 3, 1, 2) / 255
    again = task.vae.decode(task.vae.encode(wanted))
    torch.testing.assert_close(images, again, atol=0.5 / 255 + 1e-6, rtol=0)
    assert set(items.tolist()) <= set(task.vae_cache)
    assert torch.equal(task.views(0)[1], images) and not torch.equal(task.views(1)[1], images)
    task.train_step(0)


class CountingVAE(HalvingVAE):
    """Its codes tell how many pictures came at once, as last bits may."""

    def encode(self, images):
        return torch.full_like(super().encode(images), len(images) % 64)


@pytest.mark.parametrize("cached", [training.MAX_CACHED, 1])
def test_codes_do_not_depend_on_what_was_seen_before(monkeypatch, cached):
    """A resumed run has seen other pictures than the one that was never stopped."""
    monkeypatch.setattr(training, "MAX_CACHED", cached)
    tasks = [toy_task(dataclasses.replace(SMALL, reconstructed=1.0)) for _ in range(2)]
    for task in tasks:
        task.vae = CountingVAE()
    for step in range(3):
        tasks[0].views(step)
    for ours, theirs in zip(tasks[0].views(3), tasks[1].views(3), strict=True):
        assert torch.equal(ours, theirs)


def test_a_picture_that_does_not_decode_is_left_out():
    pairs = toy_pairs()

    class Broken(ArrayPairs):
        def load(self, i):
            from dalle.errors import DataError

            if i % 2:
                raise DataError("broken")
            return super().load(i)

    broken = Broken("toy", pairs.images, pairs.captions, Counter())
    task = toy_task(SMALL, pairs=broken)
    items, images, _ = task.views(0)
    assert len(items) == len(images) == 16 and not (items % 2).any()
    assert broken.skipped["does not decode"] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 10},
        {"group": 0},
        {"num_spliced": 97},
        {"reconstructed": 2.0},
        {"learning_rate": float("inf")},
        {"learning_rate": float("nan")},
        {"warmup": -1},
        {"weight_decay": float("nan")},
        {"clip_norm": 0.0},
    ],
)
def test_options_out_of_range_get_one_line(options):
    with pytest.raises(UsageError, match="must be"):
        RankerTrainConfig(**options)


def test_no_steps_are_refused():
    with pytest.raises(UsageError, match="ranker: steps must be .*, got 0"):
        toy_task(SMALL, steps=0)


def test_one_caption_is_not_enough():
    pairs = toy_pairs()
    same = ArrayPairs("same", pairs.images, ["a red circle"] * len(pairs))
    with pytest.raises(UsageError, match="two different captions"):
        toy_task(SMALL, pairs=same)


@pytest.fixture
def parts(tmp_path):
    """A folder of pictures, a tokenizer and a discrete VAE."""
    pairs = toy_pairs(count=12)
    (tmp_path / "pairs").mkdir()
    for i, caption in enumerate(pairs.captions):
        Image.fromarray(pairs.load(i)).save(tmp_path / f"pairs/{i}.png")
        (tmp_path / f"pairs/{i}.txt").write_text(caption)
    Tokenizer.train(pairs.captions, 270).save_pretrained(tmp_path / "tok")
    DiscreteVAE.from_preset("tiny", vocab_size=8, n_hid=8, n_init=8).save_pretrained(
        tmp_path / "vae"
    )
    return tmp_path


def test_the_command_trains_resumes_and_saves_what_a_pipeline_takes(parts, capsys):
    def run(out, **options):
        words = {
            "data": "pairs", "tokenizer": "tok", "vae": "vae", "out": out, "image-size": 16,
            "steps": 4, "batch-size": 8, "checkpoint-every": 2,
            "picture-every": 0, "device": "cpu", **options,
        }  # fmt: skip
        for key in {"data", "tokenizer", "vae", "out"} & set(words):
            words[key] = parts / str(words[key])
        return cli.main(
            ["ranker", "train", *(str(w) for k, v in words.items() for w in (f"--{k}", v))]
        )

    assert run("a") == 0
    said = capsys.readouterr().out  # how long it took, where that is a second or more
    assert re.match(r"ranker train: 4 updates( in \d+:\d\d)?, model in ", said), said
    weights = parts / "a" / "model" / "model.safetensors"
    whole = weights.read_bytes()
    for gone in (parts / "a" / "step-00000004", parts / "a" / "model"):
        shutil.rmtree(gone)
    assert run("a") == 0
    heard = capsys.readouterr()
    assert "ranker: resumed after step 2" in heard.err
    assert weights.read_bytes() == whole
    ranker = ContrastiveRanker.from_pretrained(parts / "a" / "model")
    assert ranker.scores(["red on the left"], torch.rand(1, 3, 16, 16)).isfinite().all()
    assert run("b", seed=1) == 0 and (parts / "b/model/model.safetensors").read_bytes() != whole
    for options, code, line in (
        (
            {"group": 50, "batch-size": 50, "validation": 0},
            2,
            "ranker: group must be at most 49 for 12 pairs, got 50",
        ),
        ({"image-size": 18}, 2, "image_size must be a multiple of 4, got 18"),
        ({"batch-size": 9}, 2, "ranker: batch_size must be at least 2 and a multiple of group = 4"),
        ({"preset": "tinny"}, 2, "did you mean tiny?"),
        ({"vae": "tok"}, 3, "class must be DiscreteVAE, got Tokenizer"),
        ({"data": "none"}, 3, "got '"),
    ):
        capsys.readouterr()
        assert run("c", **options) == code
        assert line in capsys.readouterr().err.splitlines()[-1]
    assert not list((parts).glob("c/**/*.*"))


def test_one_process_alone_trains_a_ranker(parts, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = f"ranker train --data pairs --image-size 16 --tokenizer tok --out {parts}/out"
    assert cli.main(words.split()) == 2
    assert "ranker train: processes must be 1, got WORLD_SIZE 2" in capsys.readouterr().err
