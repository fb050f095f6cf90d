"""sparse_attention beside torch's attention on the same numbers, each checked before it is timed.

Some rivals compute the pattern, some what one pays without one: dense causal attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

import dalle_ext
from dalle_ext.testing import assert_as_accurate, gradients
from gpu import names
from gpu.bench import Bench
from gpu.cases import PASSES, Case

Tensor = torch.Tensor
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Candidate:
    """One way to compute attention.

    Attributes:
        make: builds (compiles) it.
        mask: what it computes, as the (T, T) mask.
        order: the order in which it is given the positions; None as they come.
    """

    make: Callable[[], Attention]
    mask: Tensor
    order: Tensor | None = None


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


def candidates(pattern: dalle_ext.AttentionPattern, bench: Bench) -> dict[str, Candidate]:
    """Ours and the rivals."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = pattern.mask().to(bench.device)
    causal = torch.ones_like(mask).tril()

    def flex(block_mask: Any) -> Attention:
        return bench.compile(lambda q, k, v: flex_attention(q, k, v, block_mask=block_mask))

    def dense(backend: SDPBackend) -> Attention:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(q, k, v, is_causal=True)

        return attend

    found = {
        "ours": Candidate(
            lambda: lambda q, k, v: dalle_ext.sparse_attention(q, k, v, pattern), mask
        ),
        names.FLASH: Candidate(lambda: dense(SDPBackend.FLASH_ATTENTION), causal),
        names.CUDNN: Candidate(lambda: dense(SDPBackend.CUDNN_ATTENTION), causal),
        names.MASK: Candidate(lambda: lambda q, k, v: sdpa(q, k, v, attn_mask=mask), mask),
        names.FLEX: Candidate(lambda: flex(pattern.to_block_mask(bench.device)), mask),
    }
    if pattern.kind == "column":
        order = column_order(pattern).to(bench.device)
        make = lambda: flex(column_block_mask(pattern, bench.device))  # noqa: E731
        found[names.FLEX_COLUMNS] = Candidate(make, mask, order)
    return found


def check(which: str, got: list[Tensor], inputs: Tensor, mask: Tensor, places: list[Any]) -> None:
    """Holds `got` against SDPA with the mask in float64, on the heads at `places`."""
    attend = lambda q, k, v: sdpa(q, k, v, attn_mask=mask)  # noqa: E731
    for place in places:
        q, k, v, grad = (x[place][None, None] for x in inputs)
        true = [q.double(), k.double(), v.double(), grad.double()]
        if which == "forward":
            same, exact = [attend(q, k, v)], [attend(*true[:3])]
        else:
            same = list(gradients(attend, (q, k, v), grad))
            exact = list(gradients(attend, true[:3], true[3]))
        for ours, plain, want in zip(got, same, exact, strict=True):
            assert_as_accurate(ours[place][None, None], plain, want, factor=3)


def measure(case: Case, bench: Bench) -> Iterator[dict[str, Any]]:
    """The row of the forward, then that of the backward."""
    batch, heads, head_size, text_len, *grid = case.size
    rows, columns = grid
    pattern = dalle_ext.AttentionPattern(case.kind, text_len=text_len, grid=(rows, columns))
    generator = torch.Generator(bench.device).manual_seed(0)
    shape, dtype = (4, batch, heads, pattern.length, head_size), getattr(torch, case.dtype)
    inputs = torch.randn(shape, generator=generator, device=bench.device).to(dtype)
    places = [(0, 0), (batch // 2, heads // 2), (batch - 1, heads - 1)]
    ways = candidates(pattern, bench)
    built: dict[str, Attention] = {}

    def prepare(name: str, which: str) -> Callable[[], Any]:
        way = ways[name]
        if name not in built:
            built[name] = way.make()
        attend, order = built[name], way.order
        given = inputs if order is None else inputs[..., order, :]
        back = None if order is None else order.argsort()
        q, k, v, grad = given
        if which == "forward":
            call = torch.no_grad()(lambda: attend(q, k, v))
            results = [call()]
        else:
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out = attend(*leaves)
            call = lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)  # noqa: E731
            results = list(call())
        results = results if back is None else [x[..., back, :] for x in results]
        check(which, results, inputs, way.mask, places)
        return call

    for which in PASSES:
        backward = which == "backward"
        work = pattern.flops(batch, heads, head_size, backward)
        moved = pattern.bytes(batch, heads, head_size, inputs.element_size(), backward)
        found = bench.times({name: partial(prepare, name, which) for name in ways})
        yield {
            "case": case.name,
            "pass": which,
            **{"ours": found.pop("ours"), "rivals": found},
            **{"work": work * 1e-12, "unit": "TFLOP/s", "flops": work, "bytes": moved},
        }
