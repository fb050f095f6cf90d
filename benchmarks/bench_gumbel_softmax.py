"""gumbel_softmax beside torch: F.gumbel_softmax alone, and the same by hand with argmax and KL.

Ours gives sample, argmax of the noisy logits and KL in one pass, F.gumbel_softmax only the sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import dalle_ext
import harness
from dalle_ext.reference import gumbel_softmax as reference
from harness import Call, Case, Error, Ready

Tensor = torch.Tensor
Op = Callable[[Tensor], tuple[Tensor, ...]]  # logits -> (sample,) or (sample, index, kl)
TAU, SEED = 0.5, 1
LARGE, PAPER = (4096, 8192), (8192, 8192)
ALONE, BY_HAND = "torch F.gumbel_softmax", "torch by hand, argmax, KL"
COMPILED = ", compiled"
# Largest relative error, of the norm. A GPU's fast logarithms and exponentials may be off by 2^-22
# each, the inner logarithm's is divided by its result, and all of it by TAU: 2^-16 in float32.
MOST = {torch.float32: 2.0**-16, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-7}
GPU_GOALS = {
    (torch.float32, "forward"): (140, {BY_HAND: 10.0, BY_HAND + COMPILED: 1.6}),
    (torch.float16, "forward"): (95, {BY_HAND: 8.0}),
    (torch.bfloat16, "forward"): (95, {BY_HAND: 8.0}),
    (torch.float32, "backward"): (280, {BY_HAND: 3.0}),
}


def ours(logits: Tensor) -> tuple[Tensor, ...]:
    return dalle_ext.gumbel_softmax(logits, TAU, seed=SEED)


def alone(logits: Tensor) -> tuple[Tensor, ...]:
    return (F.gumbel_softmax(logits, TAU, dim=1),)


def by_hand(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a training script writes without the op."""
    noisy = logits - torch.empty_like(logits).exponential_().log()
    log_p = logits.log_softmax(1)
    kl = (log_p.exp() * log_p).sum(1) + math.log(logits.size(1))
    return (noisy / TAU).softmax(1), noisy.argmax(1), kl


def definition(logits: Tensor) -> tuple[Tensor, ...]:
    """The reference; the noise of a row hangs on its number alone."""
    tau = torch.tensor(TAU, dtype=torch.float64, device=logits.device)
    seed = torch.tensor(SEED, device=logits.device)
    return reference.gumbel_softmax(logits, tau, dim=1, hard=False, seed=seed)


OPS: dict[str, Op] = {"ours": ours, ALONE: alone, BY_HAND: by_hand}


def few(x: Tensor) -> Tensor:
    """The first four rows, of (R, K) or of (B, K, H, W), where a row is a position."""
    return x[:4] if x.dim() == 2 else x[:1, ..., :1, :4]


def step(op: Op, logits: Tensor, grads: tuple[Tensor, Tensor]) -> Call:
    """The backward alone, on the graph of one forward."""
    leaf = logits.detach().requires_grad_()
    outputs = [x for x in op(leaf) if x.is_floating_point()]  # sample, and kl where there is one
    given = [g.to(x.dtype) for g, x in zip(grads, outputs, strict=False)]
    return lambda: torch.autograd.grad(outputs, leaf, given, retain_graph=True)


def relative(got: Tensor, exact: Tensor) -> float:
    return float((few(got).double() - exact).norm() / exact.norm())


def ready(
    shape: tuple[int, ...], dtype: torch.dtype, which: str, last: bool, names: Any, device: str
) -> Ready:
    draw = torch.Generator(device).manual_seed(0)
    numbers = torch.randn(2, *shape, generator=draw, device=device).to(dtype)
    logits, grad = (x.to(memory_format=torch.channels_last) for x in numbers) if last else numbers
    kl_shape = (shape[0], *shape[2:])
    grads = grad, torch.randn(kl_shape, generator=draw, device=device)

    def build(name: str) -> Call:
        op = OPS[name.removesuffix(COMPILED)]
        op = harness.compiled(op) if name.endswith(COMPILED) else op
        if which == "backward":
            return step(op, logits, grads)
        forward = torch.no_grad()(op)
        return lambda: forward(logits)

    def check(name: str, result: Any) -> Error | None:
        """Ours against the definition on some rows; a rival, whose noise is its own, by its sums.

        torch's exponential noise is now and then 0 in float16, and that row NaN: a rival may do
        that in one row of a hundred.
        """
        exact = definition(few(logits).double())
        if which == "backward":
            if name != "ours":
                return None
            first = (few(grad).double(), grads[1][:4] if len(shape) == 2 else grads[1][:1, :1, :4])
            (exact_grad,) = step(definition, few(logits).double(), first)()
            assert bool(result[0].isfinite().all()), "gradients must be finite"
            return Error(relative(result[0], exact_grad), 4 * MOST[dtype])
        off = ~((result[0].float().sum(1) - 1).abs() < 0.02)  # NaN is off
        if name != "ours":
            return Error(float(off.float().mean()), 0.01)
        assert not bool(off.any()), "each sample must sum to 1"
        indices = (result.index[:4] if len(shape) == 2 else result.index[:1, :1, :4]) != exact[1]
        assert int(indices.sum()) <= 1, "the codes must be the definition's"
        kl = result.kl[:4] if len(shape) == 2 else result.kl[:1, :1, :4]
        assert bool((kl - exact[2]).abs().max() < 1e-4), "the KL must be right"
        return Error(relative(result.sample, exact[0]), MOST[dtype])

    # Forward logits and sample, a code and a KL a row; backward logits, both gradients given, the
    # gradient: the noise is drawn again, nothing else is kept.
    rows = logits.numel() // shape[1]
    moved = (3 if which == "backward" else 2) * logits.nbytes + rows * (
        4 if which == "backward" else 12
    )
    calls = {name: partial(build, name) for name in ("ours", *names)}
    return Ready(calls, check, logits.numel() * 1e-6, "Melem/s", moved)


def case(
    shape: tuple[int, ...], dtype: torch.dtype, which: str, scale: str, last: bool = False
) -> Case:
    rivals = {BY_HAND: "eager"} | ({ALONE: "eager"} if which == "forward" or scale != "cpu" else {})
    goal_us, goals = None, {}
    if scale == "cpu":
        goals = {BY_HAND: 4.0} if which == "backward" else {ALONE: 8.0}
        goals |= {BY_HAND: 15.0} if which == "forward" and shape == LARGE else {}
    else:
        rivals |= dict.fromkeys((ALONE + COMPILED, BY_HAND + COMPILED), "rest")
        if shape == PAPER:
            goal_us, goals = GPU_GOALS.get((dtype, which), (None, {}))
        if scale == "tiny":
            shape = (2, 32, 4, 4) if len(shape) == 4 else (8, 32)
    name = f"{shape[0]} x {shape[1]}" if len(shape) == 2 else str(shape) + " channels last" * last
    return Case(
        op="gumbel_softmax",
        what=f"gumbel_softmax {which} {name} {str(dtype)[6:]}",
        ready=partial(ready, shape, dtype, which, last, tuple(rivals)),
        rivals=rivals,
        goals=goals,
        goal_us=goal_us,
        rounds=5,
    )


def cases(scale: str) -> Iterator[Case]:
    """Rows of codes, and the dVAE's images in both memory formats."""
    if scale == "cpu":
        yield case(LARGE, torch.float32, "forward", scale)
        yield case((2, 8192, 32, 32), torch.float32, "forward", scale)
        yield case((1024, 8192), torch.bfloat16, "forward", scale)
        yield case(LARGE, torch.float32, "backward", scale)
        return
    images = (8, 8192, 32, 32)
    for shape, last in ((PAPER, False), (images, False), (images, True)):
        for dtype in MOST:
            for which in ("forward", "backward"):
                yield case(shape, dtype, which, scale, last)


def test_noise_has_the_law_of_torch():
    flat = torch.zeros(20_000, 4)
    found = dalle_ext.gumbel_softmax(flat, TAU, seed=SEED).sample
    assert (found.var(0) - F.gumbel_softmax(flat, TAU).var(0)).abs().max() < 5e-3


def test_beside_torch(case):
    rows = harness.measure(case)
    harness.assert_right(rows)
    assert all(row["ratio"] > 1 for row in rows), harness.table(rows)
