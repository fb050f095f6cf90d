"""gumbel_softmax against its definition: values, gradients, layouts, messages."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import dalle_ext
from dalle_ext import testing
from dalle_ext.reference import gumbel_softmax as reference
from support import approximate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # (shape, dim): either axis contiguous; K a multiple of 4 and not, of the lanes and not
    ((5, 1), 1),
    ((7, 2), 1),
    ((33, 8192), 1),
    ((6, 1021), -1),
    ((2, 512, 8, 8), 1),
    ((3, 67, 5, 5), 1),
    ((1, 70, 23, 23), 1),
    ((2, 130, 3, 1), 1),
    ((40, 9), 0),
]


def sample(shape, dtype=torch.float32, device="cpu", seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return logits.to(dtype).to(device)


def define(logits, tau, *, dim=1, hard=False, seed=0):
    """The definition with the noise of `seed`."""
    tau = torch.tensor(tau, dtype=torch.float64, device=logits.device)
    seed = torch.tensor(seed, device=logits.device)
    return reference.gumbel_softmax(logits, tau, dim=dim, hard=hard, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("tau", [1.0, 1 / 16])
def test_matches_definition(backend, device, dtype, shape, dim, tau):
    logits = sample(shape, dtype, device)
    got = dalle_ext.gumbel_softmax(logits, tau, dim=dim, seed=3)
    same = define(logits, tau, dim=dim, seed=3)
    exact = define(logits.double(), tau, dim=dim, seed=3)
    allowed = approximate.sample_error(3, logits, dim, tau) * exact[0]
    approximate.assert_as_accurate(backend, got.sample, same[0], exact[0], allowed)
    allowed = approximate.kl_error(logits.size(dim))
    approximate.assert_as_accurate(  # K = 1, 2: both almost exact
        backend, got.kl, same[2], exact[2], allowed, factor=4
    )
    noisy = logits.double().movedim(dim, -1)
    noise = reference.gumbel_noise(torch.tensor(3), noisy.shape[:-1].numel(), noisy.shape[-1])
    noisy = noisy + noise.reshape(noisy.shape).to(device)
    chosen = noisy.gather(-1, got.index[..., None])[..., 0]
    tie = 2 * approximate.noisy_error(3, logits, dim)
    assert (noisy.amax(-1) - chosen).max() <= tie
    assert (got.index == exact[1]).float().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES)
def test_hard_is_one_hot(device, dtype):
    logits = sample((4, 70, 3, 3), dtype, device)
    soft = dalle_ext.gumbel_softmax(logits, 0.5, seed=1)
    hard = dalle_ext.gumbel_softmax(logits, 0.5, hard=True, seed=1)
    one_hot = torch.nn.functional.one_hot(soft.index, 70).movedim(-1, 1).to(dtype)
    assert torch.equal(hard.sample, one_hot)
    assert torch.equal(hard.index, soft.index) and torch.equal(hard.kl, soft.kl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(("shape", "dim"), [((6, 1021), 1), ((2, 130, 5, 5), 1), ((4, 96), 0)])
@pytest.mark.parametrize("through", ["sample", "kl", "both"])
def test_gradient_matches_definition(backend, device, dtype, hard, shape, dim, through):
    logits = sample(shape, dtype, device)
    weight = sample(shape, dtype, device, seed=1, scale=1.0)
    kl_weight = sample(logits.sum(dim).shape, torch.float32, device, seed=2, scale=1.0)

    def loss(function, x):
        y, _, kl = function(x, 0.5, dim=dim, hard=hard, seed=4)
        total = 0.0
        if through != "kl":
            total = total + (y.double() * weight.double()).sum()
        if through != "sample":
            total = total + (kl.double() * kl_weight.double()).sum()
        return total

    def gradient(function, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(loss(function, x), x)[0]

    got = gradient(dalle_ext.gumbel_softmax, logits)
    exact = gradient(define, logits.double())
    largest = float(kl_weight.abs().max())
    allowed = approximate.gradient_error(4, logits, dim, 0.5, weight, largest)
    approximate.assert_as_accurate(backend, got, gradient(define, logits), exact, allowed)


@pytest.mark.parametrize("hard", [False, True])
def test_gradcheck(hard):
    logits = sample((3, 6, 2), torch.float64).requires_grad_()

    def function(x):
        out = dalle_ext.gumbel_softmax(x, 0.7, hard=hard, seed=5)
        return out.kl if hard else (out.sample, out.kl)  # a one-hot vector has no slope

    assert torch.autograd.gradcheck(function, logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_arrives(device, dtype):
    weight = torch.randn(8, 4, dtype=dtype, device=device).requires_grad_()
    x = torch.randn(5, 4, dtype=dtype, device=device)
    out = dalle_ext.gumbel_softmax(x @ weight.T, 0.5, hard=True)
    assert not out.index.requires_grad
    (out.sample.square().sum() + out.kl.sum()).backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [1e4, 1 / 64, 1e-4, 1e-30])
def test_any_temperature_without_overflow(device, dtype, tau):
    logits = sample((9, 300), dtype, device, scale=20.0).requires_grad_()
    out = dalle_ext.gumbel_softmax(logits, tau, seed=6)
    assert out.sample.isfinite().all() and out.kl.isfinite().all()
    assert (out.sample.float().sum(1) - 1).abs().max() < (1e-5 if dtype == torch.float32 else 0.03)
    if tau <= 1e-4:
        assert torch.equal(out.sample.argmax(1), out.index)
        assert out.sample.amax(1).min() > 0.9
    out.sample.square().sum().backward()
    assert not logits.grad.isnan().any()


def test_largest_logits(device):
    logits = torch.zeros(2, 40, device=device)
    logits[0, 7], logits[1] = 3.4e38, -3.4e38
    out = dalle_ext.gumbel_softmax(logits, 0.5, seed=7)
    assert out.index[0] == 7 and out.sample[0, 7] == 1
    assert out.kl[0].item() == pytest.approx(math.log(40)) and out.kl[1].abs() < 1e-5
    assert out.sample.isfinite().all() and (out.sample.sum(1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_logit_spoils_its_row_only(device, hard, value):
    for shape, place in [((4, 37), (2, 36)), ((1, 37, 4), (0, 3, 2))]:
        logits = sample(shape, device=device)
        logits[place] = value
        logits.requires_grad_()
        out = dalle_ext.gumbel_softmax(logits, 0.5, hard=hard, seed=8)
        rows = out.sample.movedim(1, -1).reshape(4, 37)
        assert rows[2].isnan().all() and rows[[0, 1, 3]].isfinite().all()
        assert out.kl.reshape(4).isnan().tolist() == [False, False, True, False]
        assert out.index.reshape(4)[2] == 0
        (out.sample.sin().sum() + out.kl.sum()).backward()
        grads = logits.grad.movedim(1, -1).reshape(4, 37)
        assert grads[2].isnan().all() and grads[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_give_the_same(device, dtype):
    plain = sample((2, 36, 4, 6), dtype, device)
    wanted = dalle_ext.gumbel_softmax(plain, 0.5, seed=9)
    last = plain.to(memory_format=torch.channels_last)
    sliced, buffer = testing.sliced((2, 36, 4, 6), dtype=dtype, device=device)
    sliced.copy_(plain)
    for logits in (last, sliced, plain.transpose(0, 3).contiguous().transpose(0, 3)):
        got = dalle_ext.gumbel_softmax(logits, 0.5, seed=9)
        assert torch.allclose(got.sample, wanted.sample, rtol=1e-2, atol=1e-6)
        assert torch.equal(got.index, wanted.index)
        assert torch.allclose(got.kl, wanted.kl, atol=1e-5)
    assert testing.border_intact(sliced, buffer)
    result = dalle_ext.gumbel_softmax(last, 0.5, seed=9).sample
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(7, 8), (7, 13), (7, 600), (6, 3001), (6, 8192), (6, 17001), (7, 8, 3, 5), (7, 13, 20)],
)
def test_a_part_of_a_batch_draws_its_own_noise(device, dtype, shape):
    """Bit for bit what the whole batch gets, wherever the part begins; backward too."""
    whole = sample(shape, dtype, device).requires_grad_()
    wanted = dalle_ext.gumbel_softmax(whole, 0.5, seed=3)
    wanted.sample.float().square().sum().backward()
    inner = whole[0, 0].numel()
    for first in (1, 4):
        part = whole.detach()[first:].clone().requires_grad_()
        got = dalle_ext.gumbel_softmax(part, 0.5, seed=3, first_row=first * inner)
        got.sample.float().square().sum().backward()
        assert torch.equal(got.index, wanted.index[first:])
        assert torch.equal(got.kl, wanted.kl[first:])
        assert torch.equal(got.sample, wanted.sample[first:])
        assert torch.equal(part.grad, whole.grad[first:])


@pytest.mark.parametrize("shape", [(0, 8), (2, 8, 0), (0, 8, 3, 3)])
def test_empty(shape, device):
    logits = torch.empty(shape, requires_grad=True, device=device)
    out = dalle_ext.gumbel_softmax(logits, 1.0)
    rows = (*shape[:1], *shape[2:])
    assert out.sample.shape == shape and out.index.shape == rows and out.kl.shape == rows
    out.sample.sum().backward()
    assert logits.grad.shape == shape


def test_deterministic_for_any_number_of_threads():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            for shape in [(70, 1021), (3, 260, 9, 9)]:
                x = sample(shape).requires_grad_()
                out = dalle_ext.gumbel_softmax(x, 0.1, seed=10)
                (out.sample.square().sum() + out.kl.sum()).backward()
                results.append((*out, x.grad))
    finally:
        torch.set_num_threads(threads)
    for later in (results[2:4], results[4:6]):
        for a, b in zip(results[:2], later, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_reference_switch():
    logits = sample((4, 50))
    native = dalle_ext.gumbel_softmax(logits, 0.5, seed=11)
    with dalle_ext.use_reference():
        defined = dalle_ext.gumbel_softmax(logits, 0.5, seed=11)
    assert isinstance(defined, dalle_ext.GumbelSoftmax)
    for a, b in zip(native, defined, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_seed_none_follows_manual_seed():
    logits = sample((4, 50))
    torch.manual_seed(1)
    a, b = (dalle_ext.gumbel_softmax(logits, 1.0).sample for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(a, dalle_ext.gumbel_softmax(logits, 1.0).sample)
    assert not torch.equal(a, b)


def test_tau_and_seed_as_tensors(device):
    logits = sample((4, 50), device=device)
    wanted = dalle_ext.gumbel_softmax(logits, 0.25, seed=12)
    tensors = torch.tensor(0.25, device=device), torch.tensor(12, device=device)
    got = dalle_ext.gumbel_softmax(logits, tensors[0], seed=tensors[1])
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
    for tau in (0.0, -1.0, math.nan):  # not read on the host, so no message
        out = dalle_ext.gumbel_softmax(logits, torch.tensor(tau, device=device), seed=12)
        assert out.sample.isnan().all() and torch.equal(out.index, wanted.index)
        assert torch.equal(out.kl, wanted.kl)


def test_inputs_are_untouched():
    logits = sample((3, 20, 4))
    before = copy.deepcopy(logits)
    dalle_ext.gumbel_softmax(logits, 0.5, hard=True)
    assert torch.equal(logits, before)


L = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("error", "words", "arguments", "keywords"),
    [
        (TypeError, "logits must be float32.*got torch.int64", (L.long(), 1.0), {}),
        (ValueError, r"dim must be an axis.*got 2 for shape \(2, 8\)", (L, 1.0), {"dim": 2}),
        (ValueError, "dim must be an axis.*not empty.*got 1", (L[:, :0], 1.0), {}),
        (ValueError, "tau must be positive and finite, got 0", (L, 0.0), {}),
        (ValueError, "tau must be positive and finite, got -1", (L, -1), {}),
        (ValueError, "tau must be positive and finite, got nan", (L, math.nan), {}),
        (ValueError, "tau must be positive and finite, got inf", (L, math.inf), {}),
        (TypeError, "tau must be a float.*got '1'", (L, "1"), {}),
        (ValueError, r"tau must be a 0-d tensor on cpu, got shape \(1,\)", (L, torch.ones(1)), {}),
        (TypeError, "tau must be torch.float64, got torch.int64", (L, torch.tensor(1)), {}),
        (TypeError, "seed must be an int or int64 tensor, got 0.5", (L, 1.0), {"seed": 0.5}),
        (TypeError, "seed must be torch.int64, got", (L, 1.0), {"seed": torch.tensor(0.5)}),
        (ValueError, "seed must be a 0-d tensor", (L, 1.0), {"seed": torch.zeros(2).long()}),
        (
            ValueError,
            "seed must be a 0-d tensor on cpu, got .* on meta",
            (L, 1.0),
            {"seed": torch.tensor(0, device="meta")},
        ),
        (ValueError, r"first_row must be in \[0, 2\^31\), got -1", (L, 1.0), {"first_row": -1}),
        (ValueError, "seed must fit 64 bits, got 18446744073709551616", (L, 1.0), {"seed": 2**64}),
    ],
)
def test_messages(error, words, arguments, keywords):
    with pytest.raises(error, match=f"^gumbel_softmax: {words}"):
        dalle_ext.gumbel_softmax(*arguments, **keywords)
