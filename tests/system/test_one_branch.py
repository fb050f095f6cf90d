"""`ResblockScaler`: between the ends of a block is one branch, or one line says that it is not."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dalle.errors import UsageError
from dalle.precision import ResblockScaler
from dalle.precision.ends import BlockEnds

WIDTH = 8
RULES = {  # forward passes of a block of norm1, f, norm2, g and inner
    "two sums": lambda b, x: (y := x + b.f(b.norm1(x))) + b.g(b.norm2(y)),
    "beside each other": lambda b, x: x + b.f(b.norm1(x)) + b.g(b.norm2(x)),
    "in place on a copy": lambda b, x: x.clone().add_(b.f(b.norm1(x))) + b.g(b.norm2(x)),
    "in place": lambda b, x: x.add_(b.f(b.norm1(x.clone()))) + b.g(b.norm2(x)),
    "views": lambda b, x: (
        (y := x.view(-1, 1, WIDTH) + b.f(b.norm1(x))[:, None])[:, 0] + b.g(b.norm2(y.squeeze(1)))
    ),
    "one sum": lambda b, x: x + b.g(b.f(b.norm1(x))),
    "half": lambda b, x: torch.add(b.g(b.f(b.norm1(x))), x, alpha=0.5),
    "unchanged": lambda b, x: x,
    "a sum of its own": lambda b, x: x + b.g((y := b.f(b.norm1(x))) + b.inner(y)),
    "a sum at its end": lambda b, x: x + b.g((y := b.norm1(x)) + b.f(y)),
    "scaled": lambda b, x: x + 1e-2 * b.g(torch.nn.functional.dropout(b.f(b.norm1(x)), 0.0)),
    "recomputed": lambda b, x: x + checkpoint(b.whole, x, use_reentrant=False),
    "recomputed at once": lambda b, x: x + checkpoint(b.whole, x, use_reentrant=True),
    "shared": lambda b, x: (y := x + b.whole(x)) + b.whole(y),
}


class Float(nn.Module):
    def forward(self, x):
        return x.float()


class Block(nn.Module):
    def __init__(self, rule):
        super().__init__()
        self.rule, self.norm1, self.norm2 = rule, nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.f, self.g, self.inner = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def whole(self, x):
        return self.g(self.f(self.norm1(x)))

    def forward(self, x):
        return RULES[self.rule](self, x)


def make(rule, ends=None, count=3):
    torch.manual_seed(0)
    blocks = [Block(rule) for _ in range(count)]
    model = nn.Sequential(nn.Linear(4, WIDTH), Float(), *blocks, nn.Linear(WIDTH, 2))
    scaler = None
    if ends == "two":
        parts = {f"{i}.{n}": [b[0], b[1]] for i, block in enumerate(blocks) for n, b in
                 (("f", (block.norm1, block.f)), ("g", (block.norm2, block.g)))}  # fmt: skip
        scaler = ResblockScaler(parts)
        for name, (first, last) in parts.items():
            scaler[name].hook(first, last)
    elif ends:
        scaler = ResblockScaler({str(i): block for i, block in enumerate(blocks)})
        for i, b in enumerate(blocks):
            scaler[str(i)].hook(*((b, b) if ends == "whole" else (b.norm1, b.g)))
    return model, scaler


def backward(model, autocast=False):
    x = torch.linspace(-1, 1, 20).view(5, 4).sin()
    with torch.autocast("cpu", torch.bfloat16, autocast):
        loss = model(x).float().square().mean()
    loss.backward()


def check_gradients(rule, ends, autocast=False, wrap=lambda model: model):
    plain, (model, scaler) = make(rule)[0], make(rule, ends)
    backward(plain, autocast)
    for _ in range(2):  # the second time without the look at the branch
        model.zero_grad()
        backward(wrap(model), autocast)
        for (name, wanted), found in zip(plain.named_parameters(), model.parameters(), strict=True):
            if wanted.grad is None:
                assert found.grad is None, name
                continue
            scale = scaler.scales[scaler.groups.get(found, len(scaler))]
            torch.testing.assert_close(
                found.grad / scale, wanted.grad, rtol=3e-2 if autocast else 1e-5, atol=1e-6
            )
    return scaler


@pytest.mark.parametrize("rule", ["two sums", "beside each other", "in place on a copy", "views"])
def test_two_residual_sums_are_two_blocks(rule):
    """Around both at once the gradient norm was 1.8e10 in place of 3.8, without a word."""
    for ends in ("span", "whole"):
        model, _ = make(rule, ends)
        with pytest.raises(
            UsageError, match="^ResblockScaler: the ends of block 0 must hold one b"
        ):
            backward(model)
    if rule != "in place on a copy":  # plain torch refuses its gradient too
        scaler = check_gradients(rule, "two")
        assert all(scaler[name].checked for name in scaler.names)


@pytest.mark.parametrize(
    ("rule", "ends", "got"),
    [
        ("two sums", "span", "an identity path inside"),
        ("beside each other", "span", "an identity path inside"),
        ("one sum", "whole", "a block that adds its own input"),
        ("half", "whole", "a block that adds its own input"),
        ("unchanged", "whole", "a block that adds its own input"),
        ("in place", "whole", "one that changes its input in place"),
    ],
)
def test_what_is_no_branch_is_named(rule, ends, got):
    model, _ = make(rule, ends)
    with pytest.raises(UsageError, match=f"must hold one branch, got {got}") as caught:
        backward(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "rule", ["one sum", "a sum of its own", "a sum at its end", "scaled", "recomputed",
             "recomputed at once", "shared"],
)  # fmt: skip
@pytest.mark.parametrize("autocast", [False, True])
def test_ordinary_branches_raise_no_alarm(rule, autocast):
    scaler = check_gradients(rule, "span", autocast)
    assert all(scaler[name].checked for name in scaler.names)


def test_compiled_hooks_go_on_as_before():
    check_gradients("a sum of its own", "span", wrap=lambda model: torch.compile(
        model, fullgraph=True, backend="aot_eager"
    ))  # fmt: skip


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, other):
        return x + self.mix(torch.cat([self.norm(x), other], -1))


def hooked(module, parts=None):
    scaler = ResblockScaler({"a": parts or module})
    scaler["a"].hook(module.norm, module.mix)
    return scaler["a"]


def test_what_comes_in_beside_the_input():
    x, other = torch.ones(3, WIDTH, requires_grad=True), torch.ones(3, WIDTH)
    module = Attention()
    ends = hooked(module)
    module(x, other).sum().backward()
    assert ends.checked
    for beside, got in (
        (2 * x, "an identity path inside"),
        (x, "an identity path inside"),
        (other.clone().requires_grad_(), r"a tensor \(3, 8\) in it that needs a gradient"),
    ):
        hooked(module := Attention())
        with pytest.raises(UsageError, match=f"block a must hold one branch, got {got}"):
            module(x, beside)
    ends = hooked(module := Attention(), parts=[module.mix])  # and a norm of no block
    with pytest.raises(UsageError, match=r"got a tensor \(8,\) in it that needs a gradient"):
        module(x, other)
    module.norm.requires_grad_(False)
    module(x, other).sum().backward()
    assert ends.checked


def test_modules_that_are_no_ends_of_a_branch():
    x = torch.ones(3, WIDTH, requires_grad=True)
    layer = nn.Linear(WIDTH, WIDTH)
    scaler = ResblockScaler({"a": [layer]})
    handles = scaler["a"].hook(layer, layer)
    with pytest.raises(UsageError, match="got keywords alone where its first module takes a tens"):
        layer(input=x)
    for handle in handles:
        handle.remove()
    pair = nn.MultiheadAttention(WIDTH, 1)
    ResblockScaler({"a": pair})["a"].hook(layer, pair)
    with pytest.raises(UsageError, match="got tuple where its last module returns a tensor"):
        pair(x, x, x)
    other = nn.Linear(WIDTH, WIDTH)
    ResblockScaler({"a": [layer, other]})["a"].hook(layer, other)
    with pytest.raises(UsageError, match="got one whose last module was not called"):
        layer(x).sum().backward()


def test_ends_used_by_hand():
    x, layer = torch.ones(3, WIDTH, requires_grad=True), nn.Linear(WIDTH, WIDTH)
    for wrong in (lambda x, y: x + layer(y), lambda x, y: layer(x) + layer(y), lambda x, y: y):
        ends = BlockEnds(torch.tensor(8.0), "mine")
        with pytest.raises(UsageError, match="block mine must hold one branch"):
            ends.leave(wrong(*ends.enter(x)))
    ends = BlockEnds(torch.tensor(8.0))
    with torch.no_grad():
        ends.leave(ends.enter(x)[0])
    assert not ends.checked
    stream, y = ends.enter(x)
    (stream + ends.leave(layer(y))).sum().backward()
    assert ends.checked


def test_the_look_at_a_branch_keeps_no_memory():
    model, scaler = make("one sum", "span")
    inputs = []
    model[2].f.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    model[2].norm1.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    gc.disable()
    try:
        backward(model)
        assert len(inputs) == 2 and [ref() for ref in inputs] == [None, None]
    finally:
        gc.enable()
    assert scaler["0"].checked


def test_copies_and_pickles_keep_the_parameters_once():
    model, scaler = make("one sum", "span")
    backward(model)
    other, twin = copy.deepcopy((model, scaler))
    assert twin["0"].groups is twin.groups and twin["0"].checked
    assert set(twin.groups) <= set(other.parameters())
    again = pickle.loads(pickle.dumps(scaler))
    assert (
        again["1"].groups is again.groups
        and again["1"].scale.data_ptr() == again.scales[1:].data_ptr()
    )
