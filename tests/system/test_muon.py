"""Muon: its update of a matrix, the parameters left to AdamW, and its saved state."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from dalle.errors import UsageError
from dalle.prior.config import PriorConfig
from dalle.prior.model import Prior
from dalle.train.muon import MuonAdamW, orthogonal
from dalle.train.prior_recipe import PriorTrainConfig, make_optimizer


def prior():
    torch.manual_seed(0)
    return Prior(PriorConfig(
        text_vocab=20, image_vocab=16, text_len=4, grid=(2, 2), d_model=16, num_heads=2,
        num_layers=2, kernel_size=3,
    ))  # fmt: skip


def give_gradients(model, seed=0):
    rng = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=rng)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_orthogonal_keeps_directions_and_levels_lengths(scale):
    rng = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, 8, 20, generator=rng)
    matrices[1, 4:] *= 0.02
    found = orthogonal(scale * matrices)
    for matrix, x in zip(matrices, found, strict=True):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        inside = u.T @ x @ vh.T
        off = inside - torch.diag(inside.diag())
        assert off.abs().max() < 1e-3
        assert inside.diag().min() > 0.43 and inside.diag().max() < 1.57
        assert s.max() / s.min() > 1.5
    assert torch.equal(orthogonal(torch.zeros(1, 2, 3)), torch.zeros(1, 2, 3))


@pytest.mark.parametrize("rows", [24, 8])
def test_first_update_is_lr_times_an_orthogonal_matrix_for_each_of_those_stacked(rows):
    weight = nn.Parameter(torch.zeros(3 * rows, 16))
    rng = torch.Generator().manual_seed(1)
    weight.grad = torch.randn(weight.shape, generator=rng)
    group = {"params": [weight], "muon": 3, "weight_decay": 0.0}
    MuonAdamW([group], muon_scale=2.0, lr=0.1).step()
    for part, gradient in zip(weight.detach().chunk(3), weight.grad.chunk(3), strict=True):
        u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
        lengths = u.T @ part @ vh.T / (-0.2 * max(1, rows / 16) ** 0.5)
        assert (lengths - torch.diag(lengths.diag())).abs().max() < 1e-3
        assert lengths.diag().min() > 0.43 and lengths.diag().max() < 1.57


def test_everything_but_the_matrices_of_the_blocks_moves_as_under_adamw():
    ours, theirs = prior(), prior()
    numbers = {"lr": 1e-2, "warmup_steps": 1, "optimizer": "muon"}
    muon = make_optimizer(ours, PriorTrainConfig(**numbers), 0)
    adamw = make_optimizer(theirs, PriorTrainConfig(**{**numbers, "optimizer": "adamw"}), 0)
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        muon.step()
        adamw.step()
    other = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        inside = parameter.dim() == 2 and name.startswith("layers.")
        assert torch.equal(parameter, other[name]) != inside, name


def test_state_comes_back_and_parts_change_nothing():
    models = [prior(), prior()]
    configs = [PriorTrainConfig(lr=1e-2, optimizer="muon", parts=parts) for parts in (1, 2)]
    first, second = (
        make_optimizer(model, config, 0) for model, config in zip(models, configs, strict=True)
    )
    give_gradients(models[0])
    first.step()
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimizer in zip(models, (first, second), strict=True):
        give_gradients(model, 1)
        optimizer.step()
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_what_it_cannot_do_is_refused():
    config = PriorTrainConfig(optimizer="muon", stochastic_rounding=True)
    with pytest.raises(UsageError, match="optimizer must be adamw16 for stochastic_rounding"):
        make_optimizer(prior(), config, 0)
    with pytest.raises(UsageError, match="muon_scale must be positive"):
        PriorTrainConfig(muon_scale=0.0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_later_groups_go_on(copied):
    optimizer = make_optimizer(prior(), PriorTrainConfig(optimizer="muon"), 0)
    optimizer = copied(optimizer)
    later = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [later]})
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert float(later.detach().max()) < 1
