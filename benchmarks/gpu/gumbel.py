"""gumbel_softmax beside torch: the sample alone, and the same three results by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import dalle_ext
from bench_gumbel_softmax import TAU, by_hand
from dalle_ext.reference import gumbel_softmax as reference
from dalle_ext.testing import assert_as_accurate
from gpu import names
from gpu.bench import Bench
from gpu.cases import PASSES, Case

Tensor = torch.Tensor
Op = Callable[[Tensor], tuple[Tensor, ...]]  # logits -> (sample,) or (sample, index, kl)
SEED, CHECKED = 1, 4  # CHECKED rows are held against the definition


def ours(logits: Tensor) -> tuple[Tensor, ...]:
    """Our op."""
    return dalle_ext.gumbel_softmax(logits, TAU, seed=SEED)


def alone(logits: Tensor) -> tuple[Tensor, ...]:
    """torch's own op: less work, the sample only."""
    return (F.gumbel_softmax(logits, TAU, dim=1),)


def in_three(logits: Tensor) -> tuple[Tensor, ...]:
    """What a training script writes for the same three results."""
    return by_hand(logits, 1)


def definition(logits: Tensor) -> tuple[Tensor, ...]:
    """The reference on the first rows; noise of a row hangs on its number alone."""
    tau = torch.tensor(TAU, dtype=torch.float64, device=logits.device)
    seed = torch.tensor(SEED, device=logits.device)
    return reference.gumbel_softmax(logits, tau, dim=1, hard=False, seed=seed)


def step(op: Op, logits: Tensor, grads: tuple[Tensor, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """The backward alone, on the graph of one forward."""
    leaf = logits.detach().requires_grad_()
    outputs = [x for x in op(leaf) if x.is_floating_point()]  # sample, and kl where there is one
    given = [g.to(x.dtype) for g, x in zip(grads, outputs, strict=False)]
    return lambda: torch.autograd.grad(outputs, leaf, given, retain_graph=True)


def check(op: Op, which: str, logits: Tensor, grads: tuple[Tensor, Tensor]) -> None:
    """Ours against the definition on some rows; a rival, whose noise is its own, by its sums.

    torch's exponential noise is now and then 0 in float16, and that row NaN: a rival may do that.
    """
    if op is not ours:
        with torch.no_grad():
            total = op(logits)[0].float().sum(1)
        share = float(((total - 1).abs() < 0.02).float().mean())
        assert share > 0.99, f"samples must sum to 1, got {share:.4f} of them"
        return
    few = logits[:CHECKED]
    if which == "forward":
        got, same, exact = ours(logits), definition(few), definition(few.double())
        assert_as_accurate(got[0][:CHECKED], same[0], exact[0])
        assert int((got[1][:CHECKED] != exact[1]).sum()) <= 1, "the codes must be the definition's"
        assert bool((got[2][:CHECKED] - exact[2]).abs().max() < 1e-4), "the KL must be right"
        total = got[0].float().sum(1)
        assert bool((total - 1).abs().max() < 0.02), "each sample must sum to 1"
    else:
        first = (grads[0][:CHECKED], grads[1][:CHECKED])
        whole = step(ours, logits, grads)()[0]
        same, exact = step(definition, few, first)(), step(definition, few.double(), first)()
        assert_as_accurate(whole[:CHECKED], same[0], exact[0], factor=3)
        assert bool(whole.isfinite().all()), "gradients must be finite"


def measure(case: Case, bench: Bench) -> Iterator[dict[str, Any]]:
    """The row of the forward, then that of the backward."""
    rows, codes = case.size
    generator = torch.Generator(bench.device).manual_seed(0)
    numbers = torch.randn(2, rows, codes, generator=generator, device=bench.device)
    logits, grad = numbers.to(getattr(torch, case.dtype))
    grads = grad, torch.randn(rows, generator=generator, device=bench.device)
    built = {op: bench.compile(op) for op in (alone, in_three)}  # when they are first called

    def prepare(op: Op, which: str, *, compiled: bool = False) -> Callable[[], Any]:
        op = built[op] if compiled else op
        check(op, which, logits, grads)
        if which == "forward":
            return torch.no_grad()(lambda: op(logits))
        return step(op, logits, grads)

    for which in PASSES:
        backward = which == "backward"
        todo = {
            "ours": partial(prepare, ours, which),
            names.ALONE: partial(prepare, alone, which),
            names.ALONE_COMPILED: partial(prepare, alone, which, compiled=True),
            names.BY_HAND: partial(prepare, in_three, which),
            names.BY_HAND_COMPILED: partial(prepare, in_three, which, compiled=True),
        }
        found = bench.times(todo)
        # Forward logits and sample, a code and a KL a row; backward logits, both gradients given,
        # the gradient: the noise is drawn again, nothing else is kept.
        row_bytes = 4 if backward else 8 + 4
        moved = (3 if backward else 2) * logits.nbytes + rows * row_bytes
        yield {
            "case": case.name,
            "pass": which,
            **{"ours": found.pop("ours"), "rivals": found},
            **{"work": moved * 1e-9, "unit": "GB/s", "bytes": moved},
        }
