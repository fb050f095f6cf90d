"""What fp16 keeps with one scale for all blocks, and with a scale for each (`dalle.precision`)."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from dalle.precision.compare import ONE, OWN, kept_gradients, mean_of_late_half, quantile_of
from dalle.precision.plots import kept_figure


class Grow(torch.autograd.Function):
    """x; the gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.ends = nn.Linear(8, 8), None

    def forward(self, x):
        x, y = self.ends.enter(x)
        y = y.half() @ self.linear.weight.half().t() + self.linear.bias.half()
        return x + 0.1 * self.ends.leave(y)


class Model(nn.Module):
    """16 blocks; from each to the one before it the gradient grows by `factor`."""

    def __init__(self, factor):
        super().__init__()
        torch.manual_seed(0)
        self.factor, self.blocks = factor, nn.ModuleList(Block() for _ in range(16))

    def resblocks(self):
        return {str(i): block for i, block in enumerate(self.blocks)}

    def forward(self, x):
        for block in self.blocks:
            x = Grow.apply(block(x), self.factor)
        return SimpleNamespace(loss=x.square().mean() / self.factor**7)


def kept(factor):
    return kept_gradients(Model(factor), [torch.randn(64, 8, generator=torch.manual_seed(1))])


def test_gradients_that_grow_are_lost_with_one_scale_and_kept_with_own():
    found = kept(8.0)
    assert len(set(found[ONE]["block_scale"])) == 1
    assert found[OWN]["block_scale"][0] == found[ONE]["block_scale"][0]
    assert found[OWN]["block_scale"][-1] > found[ONE]["block_scale"][0] + 20
    lost = {name: mean_of_late_half(found[name]["block_underflow"]) for name in (ONE, OWN)}
    assert lost[ONE] > 0.5 and lost[OWN] < 0.01
    wrong = {name: mean_of_late_half(found[name]["error"]) for name in (ONE, OWN)}
    assert wrong[ONE] > 0.5 and wrong[OWN] < 0.01
    first, *_, last = found["quantiles"]["50%"]
    assert 43 <= first - last <= 47  # 8^15
    assert kept_figure([found]).axes[1].get_lines()[0].get_label() == ONE


def test_gradients_that_do_not_grow_are_kept_with_one_scale():
    found = kept(1.0)
    assert mean_of_late_half(found[ONE]["block_underflow"]) < 0.01
    assert mean_of_late_half(found[ONE]["error"]) < 0.01


def test_quantile_is_the_first_exponent_that_reaches_it():
    shares = [0.0] * 80
    shares[60], shares[70] = 0.4, 0.6  # exponents -4 and 6
    assert [quantile_of(shares, q) for q in (0.4, 0.41)] == [-4, 6]
