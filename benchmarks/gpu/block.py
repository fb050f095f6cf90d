"""A training step of one layer of the prior with everything on, beside a layer in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dalle_ext
from bench_powersgd import ours
from dalle.precision import ResblockScaler
from dalle.prior.blocks import Layer
from dalle.prior.config import PriorConfig
from gpu import names
from gpu.bench import Bench
from gpu.cases import Case

Call = Callable[[], Any]


def everything(c: PriorConfig, x: Tensor, rank: int) -> Call:
    """fp16 with scales, sparse attention, PowerSGD's round (no exchange), clipping, AdamW16."""
    layer = Layer(c).to(x.device)
    layer.init_weights(c.num_layers, c.init_gain)
    scaler = ResblockScaler({"attention": layer.attention, "mlp": layer.mlp})
    layer.attention.ends, layer.mlp.ends = scaler["attention"], scaler["mlp"]
    pattern = dalle_ext.AttentionPattern("row", text_len=c.text_len, grid=c.grid)
    optimizer = dalle_ext.AdamW16(layer.parameters(), lr=1e-4)
    matrices = [p for p in layer.parameters() if p.dim() == 2]
    draw = torch.Generator(x.device).manual_seed(0)
    codes = [torch.zeros(p.shape, dtype=torch.int16, device=x.device) for p in matrices]
    qs = [torch.randn(p.shape[1], rank, generator=draw, device=x.device) for p in matrices]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        layer(x, pattern)[0].square().mean().backward()
        grads = [p.grad for p in matrices if p.grad is not None]
        for grad, total in zip(grads, ours(codes, grads, qs), strict=True):
            grad.copy_(total)
        scaler.step(optimizer, clip_norm=4.0)

    before = matrices[0].detach().clone()
    step()
    assert not torch.equal(before, matrices[0]), "a step must move the weights"
    assert bool(matrices[0].isfinite().all()), "the weights must be finite after a step"
    return step


class Plain(nn.Module):
    """The same sizes with dense causal attention."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads, self.first, self.second = heads, nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.widen, self.narrow = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        packed = self.qkv(self.first(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.narrow(F.gelu(self.widen(self.second(x))))


def plain(c: PriorConfig, x: Tensor) -> Call:
    """bf16 by autocast, AdamW(fused=True), clipping; nothing is compressed."""
    layer = Plain(c.d_model, c.num_heads).to(x.device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = layer(x).float().square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(layer.parameters(), 4.0)
        optimizer.step()

    return step


def measure(case: Case, bench: Bench) -> Iterator[dict[str, Any]]:
    """One row: the whole step."""
    batch, heads, head_size, text_len, rows, columns, rank = case.size
    width = heads * head_size
    c = PriorConfig(
        d_model=width, num_heads=heads, text_len=text_len, grid=(rows, columns), kernel_size=3,
        precision="fp16-scaled",
    )  # fmt: skip
    draw = torch.Generator(bench.device).manual_seed(0)
    tokens = batch * (text_len + rows * columns)
    x = torch.randn(batch, tokens // batch, width, generator=draw, device=bench.device)
    found = bench.times({"ours": lambda: everything(c, x, rank), names.LAYER: lambda: plain(c, x)})
    work = 72 * width**2 * tokens  # of the dense products, forward and backward
    yield {
        **{"case": case.name, "pass": "step", "ours": found.pop("ours"), "rivals": found},
        **{"work": work * 1e-12, "unit": "TFLOP/s", "flops": work, "bytes": 12 * width**2 * 32},
    }
