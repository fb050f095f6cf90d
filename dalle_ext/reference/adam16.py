"""The definition of AdamW with its moments in 1-6-9 and 0-6-10 (paper, 2.4, 2.5, appendix D)."""

from __future__ import annotations

import math

import torch

from .formats import decode, encode
from .gumbel_softmax import philox

Tensor = torch.Tensor
DROPPED_BITS, GOLDEN = {torch.float16: 13, torch.bfloat16: 16}, 0x9E3779B97F4A7C15
MASK, CHUNK, MAX_VARIANCE = 0xFFFFFFFF, 32768, 16 - 2.0**-7


def round_stochastically(x: Tensor, dtype: torch.dtype, words: Tensor) -> Tensor:
    """float32 to one of its two neighbours in `dtype`, unbiased; `words` are 32 random bits."""
    if dtype not in DROPPED_BITS:
        return x
    bits = x.contiguous().view(torch.int32).long() & 0x7FFFFFFF
    below = (113 - (bits >> 23)).clamp(min=0) if dtype == torch.float16 else torch.zeros_like(bits)
    drop = DROPPED_BITS[dtype] + below.clamp(max=10)
    rounded = (bits + (words >> (32 - drop))) & ~((1 << drop) - 1)
    if dtype == torch.float16:  # below 2^-24 the float is a fraction of it
        fraction = (x.double().abs() * 2.0**56).floor().long()
        rounded = torch.where(below > 10, (words < fraction) * 0x33800000, rounded)
    value = rounded.to(torch.int32).view(torch.float32).copysign(x)
    return torch.where(x.isfinite(), value, x).to(dtype)


def random_words(seed: Tensor, first_call: int, numel: int) -> Tensor:
    """(numel,) int64 words of 32 bits: word e % 4 of Philox call first_call + e // 4."""
    return philox(seed, (numel + 3) // 4, first_call).reshape(-1)[:numel]


def moments_words(seed: int, chunk: int, numel: int) -> Tensor:
    """(numel,) int64 words of 32 bits of a row whose first chunk is number `chunk`."""
    key = torch.tensor(_signed(seed ^ 0xD1B54A32D192ED03), dtype=torch.int64, device="cpu")
    offset = philox(key, (numel + CHUNK - 1) // CHUNK, chunk)[:, :1]
    counter = offset + torch.arange(CHUNK, dtype=torch.int64, device="cpu") * 0x9E3779B9
    counter = counter.reshape(-1)[:numel] & MASK
    return ((counter ^ (counter >> 15)) * 0x846CA68B) & MASK


def encode_variance(v: Tensor, words: Tensor) -> Tensor:
    """Stochastically rounded 0-6-10 codes; v below code 1 becomes 1 with probability v / code 1."""
    code = encode(v, "0-6-10", words >> 19)
    min_value = 2.0**-60 * (1 + 2.0**-10)
    chance = (v * (2.0**90 / (1 + 2.0**-10))).clamp(max=2.0**30).nan_to_num(0).long()
    return torch.where(v < min_value, ((words >> 2) < chance).to(torch.int16), code)


def _signed(word: int) -> int:
    return (word + 2**63) % 2**64 - 2**63


def _power(base: float, n: int) -> float:
    result = 1.0  # the kernels' products, in their order
    while n > 0:
        result, base, n = (result * base if n & 1 else result), base * base, n >> 1
    return result


def step_(
    columns: list[list[Tensor]],
    host: Tensor,
    device_scalars: list[Tensor | None],
    host_scalars: list[float],
) -> None:
    """One update of the rows of a table in place, as the raw op; arithmetic in float32."""
    scales, clip, skip, lr_tensor, seed = device_scalars
    assert seed is not None
    stochastic, lr, beta1, beta2, eps, weight_decay, variance_clip = host_scalars
    if skip is not None and bool(skip):
        return
    lr = lr if lr_tensor is None else float(lr_tensor)
    for param, grad, mean, variance, step, row in zip(*columns, host.tolist(), strict=True):
        step += 1
        t, coded, device = int(step), mean.dtype == torch.int16, param.device
        key = (int(seed) + t * GOLDEN) % 2**64
        factor = 1.0 if clip is None else float(clip)
        factor /= 1.0 if scales is None else float(scales[row[8]])
        m = decode(mean, "1-6-9") if coded else mean
        v = decode(variance, "0-6-10") if coded else variance
        g = grad.float() * factor
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * (g * g)
        v = v.clamp(max=min(variance_clip, MAX_VARIANCE) if coded else variance_clip)
        root = v.double().sqrt().float()  # torch's in float is not the nearest
        root = root * (1 / math.sqrt(1 - _power(beta2, t))) + eps
        new = param.float() * (1 - lr * weight_decay)
        new = new - (lr / (1 - _power(beta1, t))) * (m / root)
        if stochastic:
            key_word = torch.tensor(_signed(key), dtype=torch.int64, device="cpu")
            words = random_words(key_word, row[6] * CHUNK // 4, len(new)).to(device)
            new = round_stochastically(new, param.dtype, words)
        param.copy_(new)
        if coded:
            words = moments_words(key, row[6], len(v)).to(device)
            m, v = encode(m, "1-6-9", (words >> 5) & 0x3FFF), encode_variance(v, words)
        mean.copy_(m)
        variance.copy_(v)
