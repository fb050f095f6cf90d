"""The definition of AdamW with its moments in 1-6-9 and 0-6-10 (paper, 2.4, 2.5, appendix D)."""

from __future__ import annotations

import torch

from .formats import decode, encode
from .gumbel_softmax import philox

Tensor = torch.Tensor
DROPPED, GOLDEN = {torch.float16: 13, torch.bfloat16: 16}, 0x9E3779B97F4A7C15


def round_stochastically(x: Tensor, dtype: torch.dtype, words: Tensor) -> Tensor:
    """float32 to a neighbour in `dtype`, as likely as makes the mean right; words of 32 bits."""
    if dtype not in DROPPED:
        return x
    bits = x.contiguous().view(torch.int32).long() & 0x7FFFFFFF
    below = (113 - (bits >> 23)).clamp(min=0) if dtype == torch.float16 else torch.zeros_like(bits)
    drop = DROPPED[dtype] + below.clamp(max=10)
    rounded = (bits + (words >> (32 - drop))) & ~((1 << drop) - 1)
    if dtype == torch.float16:  # below 2^-24 the float is a fraction of it
        fraction = (x.double().abs() * 2.0**56).floor().long()
        rounded = torch.where(below > 10, (words < fraction) * 0x33800000, rounded)
    value = rounded.to(torch.int32).view(torch.float32).copysign(x)
    return torch.where(x.isfinite(), value, x).to(dtype)


def random_words(seed: Tensor, first_call: int, numel: int) -> Tensor:
    """(numel,) int64 words of 32 bits: word e % 4 of Philox call first_call + e // 4."""
    return philox(seed, first_call + (numel + 3) // 4)[first_call:].reshape(-1)[:numel]


def step_(columns: list, host: Tensor, on_device: list, numbers: list) -> None:
    """One update of the rows of a table in place, as the raw op; arithmetic in float32."""
    scales, clip, skip, lr_tensor, seed = on_device
    lr, beta1, beta2, eps, weight_decay, most = numbers
    if skip is not None and bool(skip):
        return
    lr = torch.tensor(lr, dtype=torch.float64) if lr_tensor is None else lr_tensor.double()
    for param, grad, mean, variance, step, row in zip(*columns, host.tolist(), strict=True):
        step += 1
        t, coded = step.double(), mean.dtype == torch.int16
        factor = (1.0 if clip is None else clip) / (1.0 if scales is None else scales[row[8]])
        m = decode(mean, "1-6-9") if coded else mean
        v = decode(variance, "0-6-10") if coded else variance
        g = grad.float() * factor
        m = beta1 * m + (1 - beta1) * g
        v = (beta2 * v + (1 - beta2) * (g * g)).clamp(max=most)
        root = v.sqrt() * (1 / (1 - beta2**t).sqrt()).float() + eps
        new = param.float() * (1 - lr * weight_decay).float()
        new = new - (lr / (1 - beta1**t)).float() * (m / root)
        word = other = None
        if seed is not None:
            key = torch.tensor((int(seed) + int(step) * GOLDEN + 2**63) % 2**64 - 2**63)
            word, other = (random_words(k, row[6] * 8192, len(new)) for k in (key, ~key))
        param.copy_(new if other is None else round_stochastically(new, param.dtype, other))
        mean.copy_(encode(m, "1-6-9", None if word is None else word >> 18) if coded else m)
        below = None if word is None else (word >> 5) & 0x1FFF
        variance.copy_(encode(v, "0-6-10", below) if coded else v)
