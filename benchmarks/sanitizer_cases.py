"""What compute-sanitizer watches: every kernel once, at sizes with ragged ends.

    python benchmarks/sanitizer_cases.py [cuda | cpu]

Right results are the tests' business (`pytest -m cuda`); here only the accesses count.
"""

from __future__ import annotations

import sys

import torch

import dalle_ext
from bench_sparse_attention import KINDS
from dalle_ext import AttentionPattern
from dalle_ext.testing import gradients

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_SIZES = (64, 32, 80, 128, 40)
GRIDS = ((37, (5, 7)), (0, (3, 4)))  # (text_len, grid)
ELEMENTS = (1, 7, 4097, 32_768, 100_003)
LOGITS = ((5, 29), (3, 250), (2, 4095), (1, 16_389), (2, 33, 17))  # dim 1 is the codebook


def run(device: str) -> int:
    """Runs forward and backward of each; returns how many."""
    count = 0
    for dtype in DTYPES:
        for kind in KINDS:
            for text_len, grid in GRIDS:
                pattern = AttentionPattern(kind, text_len=text_len, grid=grid)
                for size in HEAD_SIZES:
                    q, k, v, grad = torch.randn(4, 1, 2, pattern.length, size, device=device).to(
                        dtype
                    )
                    attend = lambda q, k, v, p=pattern: dalle_ext.sparse_attention(q, k, v, p)  # noqa: E731
                    gradients(attend, (q, k, v), grad)
                    packed = lambda x, p=pattern: dalle_ext.sparse_attention_qkvpacked(x, p)  # noqa: E731
                    qkv = torch.stack([x.transpose(1, 2) for x in (q, k, v)], 2)
                    gradients(packed, (qkv,), grad)
                    count += 2 + decode(q, k, v, pattern)
        for shape in LOGITS:
            logits = torch.randn(shape, device=device).to(dtype).requires_grad_()
            out = dalle_ext.gumbel_softmax(logits, 0.5, seed=1)
            torch.autograd.grad(out.sample.float().square().sum() + out.kl.sum(), logits)
            count += 1
    for dtype in DTYPES:
        count += sixteen(device, dtype) + powersgd(device, dtype)
    if device == "cuda":
        torch.cuda.synchronize()
    return count


def decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: AttentionPattern) -> int:
    """Decode attention of 18 samples, two tiles, at the first, a middle and the last slot."""
    text, count = pattern.text_len, 0
    for bits in (None, 8) if pattern.kind in ("column", "causal") else (None,):
        cache = dalle_ext.DecodeCache(pattern, k[:, :, :text], v[:, :, :text], 18, bits=bits)
        for slot in (0, 7, pattern.length - text - 1):
            row = [x[:, None, :, text + slot].expand(-1, 18, -1, -1) for x in (q, k, v)]
            at = torch.tensor(slot, device=q.device)
            dalle_ext.decode_attention(*row, cache, at)
            count += 1
    return count


def sixteen(device: str, dtype: torch.dtype) -> int:
    """The 16-bit operators, over sizes with ragged ends and addresses no multiple of 16."""
    for size in ELEMENTS:
        x = torch.randn(size + 1, device=device).to(dtype)[1:]
        for kind in ("1-6-9", "0-6-10"):
            for rounding, seed in (("nearest", None), ("stochastic", 1)):
                packed = dalle_ext.pack_counted(x, kind, rounding=rounding, seed=seed)
                dalle_ext.unpack(packed.codes, kind, dtype)
            dalle_ext.sum_codes(torch.stack([packed.codes] * 3), kind)
        scaled = dalle_ext.scale_gradient(x, 8.0).grad
        dalle_ext.unscale_gradient(x.float(), scaled, 8.0)
    grads = [torch.randn(n, device=device).to(dtype) for n in ELEMENTS]
    scales = torch.tensor([2.0, 8.0], device=device)
    groups = [i % 2 for i in range(len(grads))]
    found = dalle_ext.unscale_gradients_(grads, scales, groups)
    since = torch.zeros(2, dtype=torch.int64, device=device)
    dalle_ext.update_scales_(scales, since, found.nonfinite)
    for rounding in (False, True):
        params = [torch.nn.Parameter(g.clone()) for g in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer = dalle_ext.AdamW16(params, lr=1e-3, stochastic_rounding=rounding)
        for flag in (False, True):
            optimizer.step(clip_factor=0.5, found_nonfinite=flag)
    return len(ELEMENTS) + 1


def powersgd(device: str, dtype: torch.dtype) -> int:
    """PowerSGD's ops on matrices with ragged ends, several in a launch."""
    sizes = (
        (((65, 130), (7, 300)), 5),
        (((33, 17),), 17),
        (((200, 64),), 40),
        (((136, 144),), 130),
    )
    for shapes, rank in sizes:
        for fast in (False, True):
            grads = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
            qs = [torch.randn(n, rank, device=device) for _, n in shapes]
            errors = [torch.zeros(shape, dtype=torch.int16, device=device) for shape in shapes]
            ps = dalle_ext.powersgd_compress_(errors, grads, qs, fast=fast)
            ps = [dalle_ext.orthogonalize(p) if p.shape[0] >= rank else p for p in ps]
            new = dalle_ext.powersgd_project(errors, ps, fast=fast)
            dalle_ext.powersgd_decompress_(errors, ps, new, fast=fast)
    return 2 * len(sizes)


if __name__ == "__main__":
    print(run(sys.argv[1] if len(sys.argv) > 1 else "cuda"), "cases ran")
