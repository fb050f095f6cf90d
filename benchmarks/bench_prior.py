"""A block of the prior at the paper's width, and a training step of its 1b preset, beside torch's.

Theirs is the same in plain torch: nn.Linear under bf16 autocast, FlexAttention with the same
patterns, `torch.compile` of each block, `AdamW(fused=True)`; or dense causal SDPA, not compiled.
Only for a GPU: the presets of a CPU are measured in `bench_dalle_pytorch.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import dalle_ext
import harness
from harness import Call, Case, Error, Ready

FLEX = "torch: FlexAttention, compiled, bf16 autocast"
DENSE = "torch: dense causal SDPA, bf16 autocast"
PRECISIONS = ("bf16", "fp16-scaled", "fp32")
BATCH = {"gpu": 8, "tiny": 1}


def sizes(scale: str, preset: str) -> Any:
    """The preset; in a dry run its kind of layers, small."""
    from dalle.prior.config import PRESETS

    found = PRESETS[preset]
    if scale == "gpu":
        return found
    small = {"d_model": 32, "num_heads": 2, "num_layers": 4, "text_len": 6, "grid": (4, 4)}
    return replace(found, **small, text_vocab=64, image_vocab=64, kernel_size=3)


def make(c: Any, whole: bool, name: str, device: str) -> nn.Module:
    """The prior, or a layer of it; for a rival in fp32, with torch's attention in place of ours."""
    from dalle.prior.blocks import AttentionBlock, Layer, MlpBlock
    from dalle.prior.model import Prior

    if name != "ours":
        c = replace(c, precision="fp32")
    torch.manual_seed(0)
    with torch.device(device):
        model = Prior(c) if whole else Layer(c)
    if isinstance(model, Layer):
        model.init_weights(c.num_layers, c.init_gain)
    masks = {} if name != FLEX else {p: p.to_block_mask(device) for p in set(c.patterns())}

    def attend(self: Any, x: Tensor, pattern: dalle_ext.AttentionPattern) -> tuple[Tensor, Any]:
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = self.project(x)
        if name == DENSE:
            return self.merge(x, sdpa(q, k, v, is_causal=True)), None
        return self.merge(x, flex_attention(q, k, v, block_mask=masks[pattern])), None

    for block in model.modules() if name != "ours" else ():
        if isinstance(block, AttentionBlock):
            block.forward = MethodType(attend, block)
        if name == FLEX and isinstance(block, AttentionBlock | MlpBlock):
            block.forward = harness.compiled(block.forward)
    return model


def ready_block(c: Any, batch: int, names: tuple[str, ...], device: str) -> Ready:
    """Forward and backward of one layer, gradients of input and weights."""
    pattern = c.patterns()[0]
    draw = torch.Generator(device).manual_seed(0)
    x, grad = torch.randn(2, batch, c.length, c.d_model, generator=draw, device=device)

    def build(name: str) -> Call:
        layer, leaf = make(c, False, name, device), x.detach().requires_grad_()
        given = [leaf, *layer.parameters()]

        def run() -> tuple[Tensor, ...]:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=name != "ours"):
                out = layer(leaf, pattern)[0]
            return (out.detach(), *torch.autograd.grad(out, given, grad))

        return run

    def check(name: str, result: tuple[Tensor, ...]) -> Error | None:
        """Output and input gradient beside the layer in fp32 with the mask; not of dense ones."""
        if name == DENSE:
            return None
        exact = make(replace(c, precision="fp32"), False, "ours", device)
        leaf = x[:1].detach().requires_grad_()
        with dalle_ext.use_reference():
            out = exact(leaf, pattern)[0]
            (dx,) = torch.autograd.grad(out, leaf, grad[:1])
        pairs = (
            (result[0][:1] - x[:1], out.detach() - x[:1]),
            (result[1][:1] - grad[:1], dx - grad[:1]),
        )
        far = [float((got - want).norm() / want.norm()) for got, want in pairs]
        most = 1e-4 if name == "ours" and c.precision == "fp32" else 0.02
        return Error(max(far), most)

    flops = 72 * c.d_model**2 * batch * c.length  # of the dense products
    calls = {name: partial(build, name) for name in ("ours", *names)}
    return Ready(calls, check, flops * 1e-12, "TFLOP/s", flops=flops)


def ready_step(c: Any, batch: int, names: tuple[str, ...], device: str) -> Ready:
    """Forward, backward, clipping and the optimizer."""
    draw = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": draw, "device": device}
    text = torch.randint(c.text_vocab, (batch, c.text_len - 1), **options)
    tokens = torch.randint(c.image_vocab, (batch, c.num_image_tokens), **options)

    def build(name: str) -> Call:
        ours, model = name == "ours", make(c, True, name, device)
        params = list(model.parameters())
        optimizer: torch.optim.Optimizer = dalle_ext.AdamW16(params, lr=1e-4)
        if not ours:
            optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
        scaler = None
        if ours and c.precision == "fp16-scaled":
            from dalle.precision import ResblockScaler

            scaler = ResblockScaler(model.resblocks())
            for key, block in model.resblocks().items():
                block.ends = scaler[key]

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(text.device.type, torch.bfloat16, enabled=not ours):
                loss = model(text, tokens).loss
            loss.backward()
            if scaler is None:
                nn.utils.clip_grad_norm_(params, 4.0, foreach=True)
                optimizer.step()
            else:
                scaler.step(optimizer, clip_norm=4.0)
            return loss.detach()

        return step

    def check(name: str, result: Tensor) -> Error:
        """The first loss is that of a uniform guess: the heads start at zero."""
        guess = (
            torch.tensor(float(c.text_vocab)).log() + 7 * torch.tensor(float(c.image_vocab)).log()
        ) / 8
        return Error(abs(float(result) / float(guess) - 1), 0.01)

    from dalle.plan import parameters

    # 6 for each weight and position, 8 where the forward is computed twice.
    flops = (8 if c.checkpointing else 6) * parameters(c)["total"] * batch * c.length
    calls = {name: partial(build, name) for name in ("ours", *names)}
    return Ready(calls, check, batch * c.length * 1e-3, "ktoken/s", flops=flops)


def cases(scale: str) -> Iterator[Case]:
    """A block in each precision, then the whole step."""
    if scale == "cpu":
        return
    rivals = {DENSE: "eager", FLEX: "flex"}
    for preset, what, ready in (
        ("12b", "block of width 3968", ready_block),
        ("1b", "training step of 1b", ready_step),
    ):
        for precision in PRECISIONS[: 3 if preset == "12b" else 2]:
            c = replace(sizes(scale, preset), precision=precision)
            batch = BATCH[scale]
            yield Case(
                op="prior",
                what=f"prior {what}, B{batch} T{c.length} {precision}",
                ready=partial(ready, c, batch, tuple(rivals)),
                rivals=rivals,
            )
