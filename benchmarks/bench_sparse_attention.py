"""Sparse attention beside torch's own: `pytest benchmarks/bench_sparse_attention.py`, and on a GPU.

Rivals: `scaled_dot_product_attention` with the pattern as a boolean mask (same result), dense and
causal (what one pays without a pattern: another result), and on a GPU FlexAttention with the
pattern's block mask, for columns also on tokens in the order of the columns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

import dalle_ext
import harness
from dalle_ext.testing import accuracy, gradients
from harness import Call, Case, Error, Ready

Tensor = torch.Tensor
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
MASK, CAUSAL = "torch SDPA, mask", "torch SDPA, causal"
FLASH, CUDNN = "torch SDPA flash, causal", "torch SDPA cuDNN, causal"
FLEX, FLEX_COLUMNS = "FlexAttention", "FlexAttention, column order"
FLEX_FLASH = "FlexAttention, FLASH backend"  # where flash-attn-4 is installed
TF32X3 = "ours, 3xTF32"  # fp32 on tensor cores, which a variable asks for
DENSE = {CAUSAL: None, FLASH: SDPBackend.FLASH_ATTENTION, CUDNN: SDPBackend.CUDNN_ATTENTION}
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"
KINDS = ("row", "column", "conv", "causal")
Goals = dict[str, dict[str, float]]  # pass -> rival -> the least ratio that we mean to reach
FLOAT_GOALS: dict[str, Goals] = {
    "row": {FORWARD: {MASK: 5.0, CAUSAL: 2.8}, BOTH: {MASK: 5.0, CAUSAL: 3.0}},
    "column": {BOTH: {MASK: 4.5}},
    "conv": {BOTH: {MASK: 3.5}},
}
SHORT_GOALS: dict[torch.dtype, Goals] = {
    torch.bfloat16: {FORWARD: {MASK: 8.0}, BOTH: {MASK: 6.0}},
    torch.float16: {BOTH: {MASK: 20.0}},
}
_BANDED: Goals = {
    FORWARD: {FLEX: 2.3, FLEX_COLUMNS: 2.3, CUDNN: 3.2, FLASH: 4.0, MASK: 6.0},
    BACKWARD: {FLEX: 2.7, FLEX_COLUMNS: 2.7, CUDNN: 3.3, FLASH: 4.3},
}
_CONV: Goals = {FORWARD: {FLEX: 2.0}, BACKWARD: {FLEX: 2.0}}
GPU_GOALS = {"row": _BANDED, "column": _BANDED, "conv": _CONV}
MICROSECONDS = {  # on an H200 at B8 H62 D64 in 16 bits; other numbers of heads scale them
    **{(kind, FORWARD): 105 for kind in ("row", "column")},
    **{(kind, BACKWARD): 300 for kind in ("row", "column")},
    **{("conv", FORWARD): 135, ("conv", BACKWARD): 400},
}


@dataclass(frozen=True)
class Size:
    """Inputs of attention.

    Attributes:
        packed: of one projection (B, T, 3, H, D), as in the model, whose gradient is then what the
            backward gives; else q, k and v are each (B, H, T, D).
    """

    kind: str
    dtype: torch.dtype
    batch: int = 2
    heads: int = 8
    head_size: int = 64
    text_len: int = 256
    grid: tuple[int, int] = (32, 32)
    packed: bool = False
    pattern: dalle_ext.AttentionPattern = field(init=False)

    def __post_init__(self) -> None:
        pattern = dalle_ext.AttentionPattern(self.kind, text_len=self.text_len, grid=self.grid)
        object.__setattr__(self, "pattern", pattern)

    def __str__(self) -> str:
        sizes = f"{self.text_len}+{self.grid[0]}x{self.grid[1]} B{self.batch} H{self.heads}"
        packed = " packed" if self.packed else ""
        return f"{sizes} D{self.head_size} {str(self.dtype)[6:]}{packed}"


@cache
def mask_of(pattern: dalle_ext.AttentionPattern, device: str) -> Tensor:
    return pattern.mask().to(device)


def column_order(pattern: dalle_ext.AttentionPattern) -> Tensor:
    """Text, then the image column by column: index of the position at each place."""
    rows, columns = pattern.grid
    slots = torch.arange(rows * columns).view(rows, columns).T.flatten()
    return torch.cat([torch.arange(pattern.text_len), pattern.text_len + slots])


def column_block_mask(pattern: dalle_ext.AttentionPattern, device: str) -> Any:
    """The block mask of "column" for tokens in `column_order`: whole blocks are empty there."""
    from torch.nn.attention.flex_attention import create_block_mask

    text, rows, size = pattern.text_len, pattern.grid[0], pattern.length

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & ((k < text) | ((q - text) // rows == (k - text) // rows))

    return create_block_mask(rule, None, None, size, size, device=device)


def in_3xtf32(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same with fp32 products of CUDA kernels on tensor cores."""

    def inside(*inputs: Any) -> Any:
        before = os.environ.get("DALLE_EXT_CUDA_FP32", "")
        os.environ["DALLE_EXT_CUDA_FP32"] = "3xtf32"
        try:
            return call(*inputs)
        finally:
            os.environ["DALLE_EXT_CUDA_FP32"] = before

    return inside


@cache  # forward and backward share what was compiled
def way(name: str, pattern: dalle_ext.AttentionPattern, device: str) -> Attention:
    """A function of q, k and v."""
    if name in ("ours", TF32X3):
        return lambda q, k, v: dalle_ext.sparse_attention(q, k, v, pattern)
    if name == MASK:
        return lambda q, k, v: sdpa(q, k, v, attn_mask=mask_of(pattern, device))
    if name in DENSE:
        backend = DENSE[name]

        def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(q, k, v, is_causal=True)

        return dense if backend else lambda q, k, v: sdpa(q, k, v, is_causal=True)
    from torch.nn.attention.flex_attention import flex_attention

    columns = name == FLEX_COLUMNS
    mask = column_block_mask(pattern, device) if columns else pattern.to_block_mask(device)
    options: dict[str, Any] = {"BACKEND": "FLASH"} if name == FLEX_FLASH else {}
    return harness.compiled(
        lambda q, k, v: flex_attention(q, k, v, block_mask=mask, kernel_options=options or None)
    )


def off(which: str, got: list[Tensor], inputs: list[Tensor], mask: Tensor) -> Error:
    """Against SDPA with the mask in float64 on three heads: the worst beside what is allowed."""
    attend = lambda q, k, v: sdpa(q, k, v, attn_mask=mask)  # noqa: E731
    batch, heads = inputs[0].shape[:2]
    worst = Error(0.0, 1.0)
    for place in {(0, 0), (batch // 2, heads // 2), (batch - 1, heads - 1)}:
        plain = [x[place][None, None].detach() for x in inputs]
        true = [x.double() for x in plain]
        if which == FORWARD:
            same, exact = [attend(*plain[:3])], [attend(*true[:3])]
        else:
            same, exact = (list(gradients(attend, x[:3], x[3])) for x in (plain, true))
        for ours, near, want in zip(got, same, exact, strict=True):
            factor = 2 if which == FORWARD else 3
            found = Error(*accuracy(ours[place][None, None].detach(), near, want, factor=factor))
            if not found.found / found.most <= worst.found / worst.most:  # also where it is NaN
                worst = found
    return worst


def ready(size: Size, which: str, names: tuple[str, ...], device: str) -> Ready:
    pattern, b, h, d = size.pattern, size.batch, size.heads, size.head_size
    t = pattern.length
    draw = torch.Generator(device).manual_seed(0)
    shape = (4, b, t, h, d) if size.packed else (4, b, h, t, d)
    *qkv, grad = torch.randn(shape, generator=draw, device=device).to(size.dtype)
    whole = torch.stack(qkv, 2) if size.packed else torch.stack(qkv)
    if size.packed:
        grad = grad.transpose(1, 2)

    def split(whole: Tensor) -> tuple[Tensor, ...]:
        return whole.permute(2, 0, 3, 1, 4).unbind(0) if size.packed else whole.unbind(0)

    def build(name: str) -> Call:
        attend = way(name, pattern, device)
        mine, out_grad = whole, grad
        if name == FLEX_COLUMNS:
            order = column_order(pattern).to(device)
            mine = whole.index_select(1 if size.packed else 3, order)
            out_grad = grad[..., order, :]

        def call(*leaves: Tensor) -> Tensor:
            if not size.packed:
                return attend(*leaves)
            if name in ("ours", TF32X3):
                return dalle_ext.sparse_attention_qkvpacked(*leaves, pattern)
            return attend(*split(*leaves))

        leaves = [x.detach() for x in ([mine] if size.packed else split(mine))]
        switched = in_3xtf32 if name == TF32X3 else lambda run: run
        if which == FORWARD:
            forward = switched(torch.no_grad()(call))
            return lambda: forward(*leaves)
        leaves = [x.requires_grad_() for x in leaves]
        if which == BOTH:
            return switched(lambda: torch.autograd.grad(call(*leaves), leaves, out_grad))
        out = switched(call)(*leaves)
        return switched(lambda: torch.autograd.grad(out, leaves, out_grad, retain_graph=True))

    def check(name: str, result: Any) -> Error:
        got = [result] if which == FORWARD else list(result)
        if size.packed and which != FORWARD:
            got = list(split(got[0]))
        if name == FLEX_COLUMNS:
            back = column_order(pattern).argsort().to(device)
            got = [x[..., back, :] for x in got]
        mask = mask_of(pattern, device)
        mask = torch.ones_like(mask).tril() if name in DENSE else mask
        return off(which, got, [*split(whole), grad], mask)

    passes = {FORWARD: (False,), BACKWARD: (True,), BOTH: (False, True)}[which]
    flops = sum(pattern.flops(b, h, d, p) for p in passes)
    moved = sum(pattern.bytes(b, h, d, whole.element_size(), p) for p in passes)
    calls = {name: partial(build, name) for name in ("ours", *names)}
    return Ready(calls, check, flops * 1e-9, "GFLOP/s", moved, flops, str(size.dtype)[6:])


def case(
    size: Size, which: str, rivals: dict[str, str], goals: Goals, goal_us: float | None = None
) -> Case:
    return Case(
        op="sparse_attention",
        what=f"sparse_attention {size.kind} {which} {size}",
        ready=partial(ready, size, which, tuple(rivals)),
        rivals=rivals,
        goals=goals.get(which, {}),
        goal_us=goal_us,
    )


def cpu_cases() -> Iterator[Case]:
    """The paper's size, and a small training's: many short heads."""
    both = {MASK: "eager", CAUSAL: "eager"}
    for which in (FORWARD, BOTH):
        for kind, goals in FLOAT_GOALS.items():
            yield case(Size(kind, torch.float32), which, both, goals)
        for dtype, goals in SHORT_GOALS.items():
            yield case(Size("row", dtype), which, both, goals)
        toy = Size("row", torch.float32, 32, 8, 32, 16, (8, 8))
        yield case(toy, which, both, {})


def gpu_sizes() -> Iterator[Size]:
    """What the model uses first, then every pattern in every dtype."""
    fp32, *short = torch.float32, torch.bfloat16, torch.float16
    for dtype in (short[0], fp32):
        for kind in KINDS:
            yield Size(kind, dtype, 8, 62, packed=True)
    for dtype in (*short, fp32):
        for heads, head_size in ((62, 64), (31, 128), (16, 64)):
            for kind in KINDS:
                yield Size(kind, dtype, 8, heads, head_size)


def rivals_of(size: Size) -> dict[str, str]:
    """On a GPU: name -> when it is measured. FlexAttention, which is compiled, in bf16 alone."""
    eager = (TF32X3, MASK, CAUSAL) if size.dtype == torch.float32 else (FLASH, CUDNN, MASK)
    flex = [FLEX, FLEX_FLASH] if size.dtype == torch.bfloat16 else []
    if flex and size.kind == "column":
        flex.append(FLEX_COLUMNS)
    return dict.fromkeys(eager, "eager") | dict.fromkeys(flex, "flex")


def cases(scale: str) -> Iterator[Case]:
    """Of a CPU forward and forward + backward, else forward and backward."""
    if scale == "cpu":
        yield from cpu_cases()
        return
    for size in gpu_sizes():
        tiny = Size(size.kind, size.dtype, 1, 2, size.head_size // 4, 5, (4, 4), size.packed)
        for which in (FORWARD, BACKWARD):
            us, goals = MICROSECONDS.get((size.kind, which)), GPU_GOALS.get(size.kind, {})
            if us is None or size.dtype == torch.float32 or size.head_size != 64:
                us, goals = None, {}
            given = size if scale == "gpu" else tiny
            yield case(given, which, rivals_of(size), goals, us and us * size.heads / 62)


def test_beside_torch(case):
    rows = harness.measure(case)
    harness.assert_right(rows)
    assert "B32" in case.what or all(row["ratio"] > 1 for row in rows), harness.table(rows)
