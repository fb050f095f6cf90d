"""`ResblockScaler`: the dataflow of Figure 4, the update of its scales, what it combines with."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dalle_ext
from dalle.errors import CheckpointError, UsageError
from dalle.precision import ResblockScaler, first_nonfinite, linear
from dalle.precision.ends import BINS, LOWEST, BlockEnds, exponents

WIDTH, BLOCKS = 16, 3


class Block(nn.Module):
    """x + f(norm(x)), fp16 inside where it has ends."""

    def __init__(self):
        super().__init__()
        self.norm, self.ends = nn.LayerNorm(WIDTH), None
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def branch(self, x, dtype):
        hidden = nn.functional.gelu(linear(self.norm(x).to(dtype), self.wide))
        return linear(hidden, self.narrow)

    def forward(self, x):
        if self.ends is None:
            return x + self.branch(x, torch.float32)
        x, inside = self.ends.enter(x)
        return x + self.ends.leave(self.branch(inside, torch.float16))


class Model(nn.Module):
    def __init__(self, recompute=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head, self.recompute = nn.Linear(WIDTH, 3), recompute

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x)


def make(recompute=False, half=False, **options):
    model = Model(recompute)
    blocks = {str(i): block for i, block in enumerate(model.blocks)}
    scaler = ResblockScaler(blocks, **options)
    for name, block in blocks.items():
        block.ends = scaler[name]
        for part in (block.wide, block.narrow):
            part.weight.data = part.weight.data.to(torch.float16 if half else torch.float32)
    return model, scaler


def data(seed=0, rows=24):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, generator=generator), torch.randn(rows, 3, generator=generator)


def backward(model, seed=0, rows=24):
    x, y = data(seed, rows)
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss.detach()


def unscaled(model, scaler):
    scales = scaler.scales.tolist()
    return {
        n: p.grad.float() / scales[scaler.groups.get(p, BLOCKS)]
        for n, p in model.named_parameters()
    }


def snapshot(model, optimizer):
    tensors = {n: p.detach().clone() for n, p in model.named_parameters()}
    for i, state in enumerate(optimizer.state.values()):
        tensors |= {f"{i}.{name}": t.clone() for name, t in state.items()}
    return tensors


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("compiled", "recompute"),
    [
        (False, False),
        (False, True),
        pytest.param(True, False, marks=pytest.mark.night),
        (True, True),
    ],
)
def test_gradients_are_those_of_fp32_times_the_blocks_scale(compiled, recompute):
    plain = Model()
    backward(plain)
    wanted = {n: p.grad for n, p in plain.named_parameters()}
    model, scaler = make(recompute, sample_every=1)
    scaler.scales[:BLOCKS] = torch.tensor([2.0**10, 2.0**14, 2.0**17])
    backward(torch.compile(model, fullgraph=True) if compiled else model)
    for name, found in unscaled(model, scaler).items():
        error = (found - wanted[name]).norm() / wanted[name].norm()
        assert error < 4 * 2**-10, name  # four fp16 roundings in a row
    seen = scaler.metrics()
    assert seen["block_scale"].tolist() == [10, 14, 17]
    assert torch.allclose(seen["block_exponents"].sum(1), torch.ones(BLOCKS, dtype=torch.float64))


def test_accumulated_gradients_are_those_of_the_whole_batch():
    model, scaler = make()
    x, y = data(rows=32)
    for part in (slice(0, 16), slice(16, 32)):
        ((model(x[part]) - y[part]).square().mean() / 2).backward()
    found = unscaled(model, scaler)
    whole, other = make()
    (whole(x) - y).square().mean().backward()
    for name, wanted in unscaled(whole, other).items():
        assert (found[name] - wanted).norm() < 4 * 2**-10 * wanted.norm(), name


@pytest.mark.parametrize("kind", ["AdamW16", "AdamW"])
def test_inf_in_one_block_skips_the_update_and_lowers_that_scale_alone(kind):
    model, scaler = make(sample_every=0)
    make_optimizer = dalle_ext.AdamW16 if kind == "AdamW16" else torch.optim.AdamW
    optimizer = make_optimizer(model.parameters(), lr=1e-3)
    backward(model)
    assert not bool(scaler.step(optimizer, clip_norm=1.0).skipped)
    before, scales = snapshot(model, optimizer), scaler.scales.clone()
    model.zero_grad()
    hook = model.blocks[1].wide.weight.register_hook(
        lambda grad: grad.index_fill(0, torch.tensor([3]), math.inf)
    )
    backward(model)
    found = scaler.step(optimizer, clip_norm=1.0)
    hook.remove()
    assert bool(found.skipped) and (found.nonfinite > 0).tolist() == [False, True, False, False]
    assert same(snapshot(model, optimizer), before)
    ratio = (scaler.scales / scales).tolist()
    assert ratio == pytest.approx([2**0.001, 2**-0.5, 2**0.001, 1.0], rel=1e-6)
    model.zero_grad()
    backward(model)
    found = scaler.step(optimizer, clip_norm=1.0)
    assert not bool(found.skipped) and not same(snapshot(model, optimizer), before)
    assert float(scaler.metrics()["skipped"]) == pytest.approx(1 / 3)
    assert scaler.stuck() == []


def test_inf_inside_a_block_does_not_reach_the_blocks_before_it():
    """Figure 4: the filter where the gradient leaves the block, and the one where it enters."""
    model, scaler = make()
    model.blocks[1].norm.register_full_backward_hook(
        lambda *_: (torch.full((24, WIDTH), math.nan),)
    )
    backward(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    assert model.blocks[0].wide.weight.grad.isfinite().all()
    assert scaler.step(optimizer).nonfinite.tolist() == [0, 0, 0, 0]
    stream = torch.zeros(4, WIDTH, requires_grad=True)
    scaler["0"].leave(stream).backward(torch.full((4, WIDTH), math.inf))
    assert torch.equal(stream.grad, torch.zeros(4, WIDTH))


def test_shared_scale_falls_for_all():
    model, scaler = make(shared=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    backward(model)
    model.blocks[2].wide.weight.grad[0, 0] = math.nan
    scaler.step(optimizer)
    assert scaler.scales.tolist() == pytest.approx([2**12.5] * BLOCKS + [1.0])


@pytest.mark.parametrize("grows", [True, False])
def test_clean_scales_on_a_skipped_update(grows):
    model, scaler = make(grow_on_skip=grows)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for place in (model.blocks[0].wide.weight, model.head.weight):
        model.zero_grad()
        backward(model)
        before = scaler.scales[2].item()
        place.grad[0, 0] = math.inf
        scaler.step(optimizer)
        assert (scaler.scales[2].item() > before) is grows


def test_a_block_at_its_lowest_scale_is_named():
    model, scaler = make(initial=2.0**7, window=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        assert scaler.stuck() == []
        model.zero_grad()
        backward(model)
        model.blocks[1].wide.weight.grad[0, 0] = math.nan
        scaler.step(optimizer)
    assert scaler.stuck() == ["1"] and scaler.scales[1].item() == 2.0**7


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("rounding", [False, True])
def test_trains_like_fp32_with_masters_and_with_fp16_weights(half, rounding):
    plain = Model()
    reference = torch.optim.AdamW(plain.parameters(), lr=3e-3)
    model, scaler = make(half=half)
    optimizer = dalle_ext.AdamW16(model.parameters(), lr=3e-3, stochastic_rounding=rounding)
    for step in range(80):
        for each in (plain, model):
            each.zero_grad()
            backward(each, step % 4)
        reference.step()
        assert not bool(scaler.step(optimizer).skipped)
    assert {p.dtype for p in model.blocks[0].parameters()} == {torch.float32} | (
        {torch.float16} if half else set()
    )
    ends = [float(sum(backward(each, i) for i in range(4)) / 4) for each in (plain, model)]
    assert ends[1] == pytest.approx(ends[0], rel=0.02) and ends[1] < 0.8


def test_state_goes_round_bit_for_bit():
    def run(model, scaler, optimizer, steps):
        for step in steps:
            model.zero_grad()
            backward(model, step)
            if step == 3:
                model.blocks[0].norm.bias.grad[0] = math.nan
            scaler.step(optimizer, clip_norm=0.5)

    model, scaler = make(sample_every=2)
    optimizer = dalle_ext.AdamW16(model.parameters(), lr=1e-2)
    run(model, scaler, optimizer, range(4))
    again, other = make(sample_every=2)
    fresh = dalle_ext.AdamW16(again.parameters(), lr=1e-2)
    again.load_state_dict(model.state_dict())
    fresh.load_state_dict(optimizer.state_dict())
    other.load_state_dict(json.loads(json.dumps(scaler.state_dict())))
    for parts in ((model, scaler, optimizer), (again, other, fresh)):
        run(*parts, range(4, 9))
    assert same(snapshot(model, optimizer), snapshot(again, fresh))
    assert scaler.state_dict() == other.state_dict() and torch.equal(scaler.scales, other.scales)
    assert scaler["0"].scale.item() == other["0"].scale.item() == scaler.scales[0].item()


def test_a_transformer_whose_code_is_not_changed():
    """Hooks around both branches of torch's own layer, under autocast, beside plain fp32."""
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True, norm_first=True)] * 2
    model = nn.TransformerEncoder(layers[0], 2, enable_nested_tensor=False)
    x = torch.randn(2, 6, 32)
    model(x).square().mean().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    ends, blocks = {}, {}
    for i, layer in enumerate(model.layers):
        blocks[f"{i}.attention"] = [layer.norm1, layer.self_attn]
        blocks[f"{i}.mlp"] = [layer.norm2, layer.linear1, layer.linear2]
        ends[f"{i}.attention"] = (layer.norm1, layer.dropout1)
        ends[f"{i}.mlp"] = (layer.norm2, layer.dropout2)
    scaler = ResblockScaler(blocks, sample_every=1)
    handles = [h for name, pair in ends.items() for h in scaler[name].hook(*pair)]
    seen = []
    model.layers[1].linear1.register_forward_hook(lambda *given: seen.append(given[2].dtype))
    with torch.autocast("cpu", torch.float16):
        y = model(x)
    y.square().mean().backward()
    assert seen == [torch.float16] and y.dtype == torch.float32
    scales = scaler.scales.tolist()
    for name, parameter in model.named_parameters():
        found = parameter.grad / scales[scaler.groups.get(parameter, len(scaler))]
        assert (found - wanted[name]).norm() < 8 * 2**-10 * wanted[name].norm(), name
    assert (scaler.metrics()["block_exponents"].sum(1) > 0.99).all()
    for handle in handles:
        handle.remove()


def test_exponents_are_those_of_log2():
    grad = torch.tensor([1.0, 1.5, -2.0, 0.0, math.inf, math.nan, 2.0**-30, -(2.0**-90), 1e20])
    counts = exponents(grad)
    found = {int(i) + LOWEST: int(counts[i]) for i in counts.nonzero()}
    assert found == {0: 2, 1: 1, -30: 1, LOWEST: 1, LOWEST + BINS - 1: 1}
    assert 3500 < int(exponents(torch.ones(100, 1000)).sum()) <= 4096


def test_the_first_nonfinite_module_is_named():
    model = Model()
    x = data()[0]
    assert first_nonfinite(model, lambda: model(x)) is None
    with torch.no_grad():
        model.blocks[1].wide.weight[2, 3] = math.nan
    assert first_nonfinite(model, lambda: model(x)) == "parameter blocks.1.wide.weight"
    healthy = Model()
    assert first_nonfinite(healthy, lambda: healthy(x / 0)) == "input of model"
    healthy.blocks[2].narrow.register_forward_hook(lambda *given: given[2] * math.inf)
    assert first_nonfinite(healthy, lambda: healthy(x)) == "output of blocks.2.narrow"


def test_linear_in_fp16_sums_its_bias_gradient_in_fp32():
    layer = nn.Linear(8, 4)
    x = torch.randn(3000, 8, dtype=torch.float16, requires_grad=True)
    linear(x, layer).backward(torch.full((3000, 4), 40.0, dtype=torch.float16))
    assert layer.bias.grad.tolist() == [120_000.0] * 4  # beyond fp16
    y = nn.functional.linear(x.detach().double(), layer.weight.detach().half().double())
    assert (linear(x, layer).double() - y - layer.bias.detach().half()).abs().max() < 2**-9
    assert x.grad.dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"replicas": 0}, "replicas must be 1 or more, got 0"),
        ({"initial": 2.0**25}, r"initial must be in \[low, high\]"),
        ({"growth": 0.5}, "growth must be 1 or more, finite, got 0.5"),
        ({"backoff": 1.0}, r"backoff must be in \(0, 1\), got 1.0"),
        ({"window": 0}, "window must be 1 or more, got 0"),
        ({"sample_every": -1}, "sample_every must be 0 or more, got -1"),
    ],
)
def test_bad_numbers(options, line):
    with pytest.raises(UsageError, match=f"ResblockScaler: {line}"):
        make(**options)


def test_bad_blocks_optimizers_and_states():
    shared = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="blocks must not share parameters, got one of b that is"):
        ResblockScaler({"a": shared, "b": [nn.ReLU(), shared]})
    with pytest.raises(UsageError, match=r"blocks must be modules with parameters, got \[\]"):
        ResblockScaler({})
    model, scaler = make(half=True)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(UsageError, match="optimizer must hold gradients, got none"):
        scaler.step(optimizer)
    backward(model)
    with pytest.raises(UsageError, match="float16 parameters must be in dalle_ext.AdamW16, got A"):
        scaler.step(optimizer)
    state = scaler.state_dict()
    with pytest.raises(CheckpointError, match="blocks must be"):
        scaler.load_state_dict(state | {"names": ["x"]})
    with pytest.raises(CheckpointError, match="scales must be in"):
        scaler.load_state_dict(state | {"scales": [math.nan] * BLOCKS})


def test_the_norm_that_clips_is_the_one_that_processes_agreed_on():
    found = []
    for factor in (1.0, 2.0):
        model, scaler = make(sample_every=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        backward(model)
        before = model.head.bias.detach().clone()
        done = scaler.step(optimizer, clip_norm=1e-3, sync_norm=lambda norm, f=factor: norm.mul_(f))
        found.append((float(done.norm), model.head.bias.detach() - before))
    assert found[1][0] == pytest.approx(2 * found[0][0])
    torch.testing.assert_close(2 * found[1][1], found[0][1])


@pytest.mark.parametrize("constant", [False, True], ids=["square", "sum"])
@pytest.mark.parametrize("layer", ["linear", "block"])
def test_a_gradient_penalty_is_refused_and_no_zero(layer, constant):
    """Where the incoming gradient is a constant, torch's `once_differentiable` was silent."""
    ends, inner = BlockEnds(torch.tensor(8.0)), nn.Linear(4, 4)
    x = torch.linspace(-1, 1, 20).view(5, 4).requires_grad_()

    def branch(x):
        return linear(x.to(torch.bfloat16), inner)

    def block(x):
        stream, inside = ends.enter(x)
        return stream + ends.leave(branch(inside))

    out = (block if layer == "block" else branch)(x).float()
    loss = out.sum() if constant else out.square().sum()
    (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    assert torch.equal(grad, plain)
    for wanted in (x, inner.weight):
        with pytest.raises(NotImplementedError, match="^dalle: gradients .* differentiated once"):
            torch.autograd.grad(grad.square().sum() + 0 * wanted.sum(), wanted, retain_graph=True)
