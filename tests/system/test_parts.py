"""Parts of a batch on threads give the numbers of the whole batch, the same bits each time."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import nn

from dalle.data.pairs import ArrayPairs
from dalle.dvae.model import DiscreteVAE, DiscreteVAEConfig
from dalle.errors import UsageError
from dalle.prior.config import PriorConfig
from dalle.prior.model import Prior
from dalle.ranker.model import ContrastiveRanker
from dalle.tokenizer import Tokenizer
from dalle.train.dvae import DvaeTask, DvaeTrainConfig
from dalle.train.parts import run_parts, slices, sum_parts
from dalle.train.prior import PriorTask
from dalle.train.prior_recipe import PriorTrainConfig
from dalle.train.ranker import RankerTask, RankerTrainConfig


def pairs():
    images = np.random.default_rng(0).integers(0, 255, (24, 16, 16, 3), dtype=np.uint8)
    words = ["red", "a green one", "two blue ones on a wall"]
    return ArrayPairs("toy", images, [f"{words[i % 3]} {i}" for i in range(24)])


def dvae_task(parts):
    torch.manual_seed(0)
    vae = DiscreteVAE(DiscreteVAEConfig(
        stem="patch", patch=4, n_hid=16, n_blk_per_group=1, n_init=8, vocab_size=32
    ))  # fmt: skip
    config = DvaeTrainConfig(
        image_size=16, batch_size=7, warm_start_steps=2, codebook_images=24, augment="none",
        distortion="mse", kl_weight=1.0, kl_steps=1, parts=parts,
    )  # fmt: skip
    return DvaeTask(vae, pairs(), config)


def prior_task(parts, **model):
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(pairs().captions, vocab_size=300)
    vae = dvae_task(1).model
    prior = Prior(PriorConfig(
        text_vocab=300, image_vocab=32, text_len=16, grid=(4, 4), d_model=16, num_heads=2,
        num_layers=2, kernel_size=3, **model,
    ))  # fmt: skip
    config = PriorTrainConfig(
        batch_size=7, augment="none", caption_dropout=0.2, token_dropout=0.2, bpe_dropout=0.0,
        image_init="codebook", parts=parts,
    )  # fmt: skip
    return PriorTask(prior, tokenizer, vae, pairs(), config)


def ranker_task(parts):
    task = prior_task(1)
    torch.manual_seed(0)
    ranker = ContrastiveRanker.from_preset(
        "tiny", tokenizer=task.tokenizer, image_size=16, grid=4, width=32, depth=1, embed_dim=16
    )
    config = RankerTrainConfig(batch_size=6, group=3, num_spliced=5, parts=parts)
    return RankerTask(ranker, pairs(), config, task.vae, steps=600)


@pytest.mark.parametrize("make", [dvae_task, prior_task, ranker_task])
def test_parts_train_as_the_whole_batch_and_with_the_same_bits_twice(make):
    whole, split, again = make(1), make(3), make(3)
    for step in range(4):
        values, found, same = (task.train_step(step) for task in (whole, split, again))
        assert set(values) == set(found)
        for key in set(values) - {"data_wait"}:  # seconds
            assert float(found[key]) == pytest.approx(float(values[key]), rel=1e-3, abs=1e-4), key
            assert float(found[key]) == float(same[key]), key
        for name, parameter in split.model.named_parameters():
            assert torch.equal(parameter, dict(again.model.named_parameters())[name])
            gradient = dict(whole.model.named_parameters())[name].grad
            if gradient is not None:
                scale = float(gradient.abs().max())
                torch.testing.assert_close(parameter.grad, gradient, atol=2e-3 * scale, rtol=0)


def test_parts_run_at_the_same_time_and_gradients_add_up():
    model = nn.Linear(3, 2).double()
    x, meet = torch.randn(5, 3).double(), threading.Barrier(2, timeout=20)

    def run(place):
        meet.wait()  # neither returns before the other has begun
        return model(x[place]).square().sum(), torch.tensor([place.start])

    found = run_parts(run, 5, 2, model)
    assert [int(start) for _, start in found] == [0, 2]
    (total,) = sum_parts([part[:1] for part in found])
    total.backward()
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_parameter_no_part_uses_has_no_gradient_and_an_error_comes_out():
    model = nn.ModuleDict({"used": nn.Linear(1, 1), "idle": nn.Linear(1, 1)})
    found = run_parts(lambda p: (model["used"](torch.ones(2, 1)[p]).sum(),), 2, 2, model)
    sum_parts(found)[0].backward()
    assert model["idle"].weight.grad is None and float(model["used"].weight.grad) == 2

    def fail(place):
        raise ValueError(f"part {place.start}")

    with pytest.raises(ValueError, match="part 0"):
        run_parts(fail, 2, 2, model)
    with torch.no_grad():
        (a,), (b,) = run_parts(lambda p: (model["used"](torch.ones(2, 1)[p]),), 2, 2, model)
    assert not (a.requires_grad or b.requires_grad)


def test_slices_are_in_order_and_never_empty():
    assert slices(5, 2) == [slice(0, 2), slice(2, 5)]
    assert slices(2, 4) == [slice(0, 1), slice(1, 2)]


@pytest.mark.parametrize("model", [{"dropout": 0.1}, {"precision": "fp16-scaled"}])
def test_what_threads_would_share_is_refused(model):
    with pytest.raises(UsageError, match="parts must be 1 with dropout or scaled gradients"):
        prior_task(2, **model)
    for make in (DvaeTrainConfig, PriorTrainConfig, RankerTrainConfig):
        with pytest.raises(UsageError, match="parts"):
            make(parts=0)


class Added(nn.Module):
    """Two tables that autograd gives one gradient, and one whose gradient is expanded."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.ones(3) * value) for value in (1.0, 2.0))

    def forward(self, x):
        return ((self.a + self.b) * x).sum(), self.a.sum() * x.sum()


def test_gradients_that_autograd_shares_are_added_once():
    x = torch.arange(18.0).view(6, 3)
    found = []
    for parts in (1, 2, 3):
        model = Added()
        both = sum_parts(run_parts(lambda place, model=model: model(x[place]), 6, parts, model))
        (both[0] + both[1]).backward()
        found.append(torch.stack([model.a.grad, model.b.grad]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_a_gradient_penalty_over_parts_is_refused_and_no_zero():
    model, x = nn.Linear(3, 1), torch.ones(4, 3)
    found = run_parts(lambda place: (model(x[place]).square(),), 4, 2, model)
    loss = torch.cat([part for (part,) in found]).sum()
    (grad,) = torch.autograd.grad(loss, model.weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="^dalle: gradients .* differentiated once"):
        torch.autograd.grad(grad.square().sum() + 0 * model.weight.sum(), model.weight)
