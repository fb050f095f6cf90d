"""gumbel_softmax as an operator: schema, fake kernels, torch.compile, export."""

from __future__ import annotations

import pytest
import torch

import dalle_ext

TAU, SEED = torch.tensor(0.5, dtype=torch.float64), torch.tensor(3)
RAW = torch.ops.dalle_ext


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "dim"), [((3, 40), 1), ((2, 12, 3, 3), 1)])
def test_opcheck(dtype, shape, dim):
    logits = torch.randn(shape, dtype=dtype)
    raw = RAW._gumbel_softmax_forward
    torch.library.opcheck(raw, (logits, TAU, SEED, dim, False))
    sample, _, kl, stats = raw(logits, TAU, SEED, dim, True)
    for grads in [(sample, kl), (sample, None), (None, kl)]:
        arguments = (*grads, logits, TAU, SEED, kl, stats, dim)
        torch.library.opcheck(RAW._gumbel_softmax_backward, arguments)
    torch.library.opcheck(RAW._gumbel_softmax_words, (SEED, 64))


def test_raw_op_checks():
    logits = torch.randn(2, 3, 4)
    raw = RAW._gumbel_softmax_forward
    with pytest.raises(RuntimeError, match="gumbel_softmax: logits must be contiguous"):
        raw(logits.transpose(0, 1), TAU, SEED, 1, False)
    with pytest.raises(RuntimeError, match="gumbel_softmax: tau must be a float64 scalar"):
        raw(logits, TAU.float(), SEED, 1, False)
    with pytest.raises(RuntimeError, match="gumbel_softmax: dim must be an axis of logits, got 3"):
        raw(logits, TAU, SEED, 3, False)
    sample, _, kl, stats = raw(logits, TAU, SEED, 1, False)
    with pytest.raises(RuntimeError, match="gumbel_softmax: grad_sample must be contiguous"):
        RAW._gumbel_softmax_backward(sample[:1], kl, logits, TAU, SEED, kl, stats, 1)
    with pytest.raises(RuntimeError, match="gumbel_softmax: stats must be contiguous"):
        RAW._gumbel_softmax_backward(sample, kl, logits, TAU, SEED, kl, stats[:3], 1)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_compiles_without_graph_break(hard, channels_last):
    logits = torch.randn(2, 12, 3, 3)
    if channels_last:
        logits = logits.to(memory_format=torch.channels_last)

    def run(function):
        x = logits.clone(memory_format=torch.preserve_format).requires_grad_()
        out = dalle_ext.gumbel_softmax(x.tanh(), 0.5, hard=hard, seed=SEED)
        if function is not None:
            out = function(x, torch.tensor(0.5), SEED)
        (out.sample.square().sum() + out.kl.sum()).backward()
        return *out, x.grad

    def forward(x, tau, seed):
        return dalle_ext.gumbel_softmax(x.tanh(), tau, hard=hard, seed=seed)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(None), run(compiled), strict=True):
        assert torch.allclose(a, b, atol=1e-6) and a.stride() == b.stride()


def test_compiles_with_float_tau_and_fresh_seeds():
    logits = torch.randn(4, 16)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def draw(x, tau):
        return dalle_ext.gumbel_softmax(x, tau).sample

    torch.manual_seed(0)
    first, second = draw(logits, 0.5), draw(logits, 0.25)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, draw(logits, 0.5))
    assert (first.sum(1) - 1).abs().max() < 1e-5


def test_compiles_with_inductor():
    logits = torch.randn(4, 16)  # only the op in the graph: nothing for a C++ compiler to do

    def draw(x):
        return dalle_ext.gumbel_softmax(x, TAU, seed=SEED)

    compiled = torch.compile(draw, fullgraph=True)
    for a, b in zip(draw(logits), compiled(logits), strict=True):
        assert torch.equal(a, b)


def test_exports():
    class Relax(torch.nn.Module):
        def forward(self, x: torch.Tensor, seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(dalle_ext.gumbel_softmax(x, 0.5, seed=seed))

    logits = torch.randn(2, 12, 3)
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(
        Relax(), (logits, SEED), dynamic_shapes={"x": {0: batch}, "seed": None}
    )
    larger = torch.randn(5, 12, 3)
    wanted = dalle_ext.gumbel_softmax(larger, 0.5, seed=SEED)
    for a, b in zip(wanted, program.module()(larger, SEED), strict=True):
        assert torch.equal(a, b)
