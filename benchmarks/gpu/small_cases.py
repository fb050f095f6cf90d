"""What compute-sanitizer watches: every kernel of both ops once, at sizes with ragged ends.

    python -m gpu.small_cases [cuda | cpu]

Right results are the tests' business (`pytest -m cuda`); here only the accesses count.
"""

from __future__ import annotations

import sys

import torch

import dalle_ext
from dalle_ext.testing import gradients
from gpu.cases import KINDS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_SIZES = (64, 32, 80, 128, 40)
GRIDS = ((37, (5, 7)), (0, (3, 4)))  # (text_len, grid)
LOGITS = ((5, 29), (3, 250), (2, 4095), (1, 16_389), (2, 33, 17))  # dim 1 is the codebook


def run(device: str) -> int:
    """Runs forward and backward of each; returns how many."""
    count = 0
    for dtype in DTYPES:
        for kind in KINDS:
            for text_len, grid in GRIDS:
                pattern = dalle_ext.AttentionPattern(kind, text_len=text_len, grid=grid)
                for size in HEAD_SIZES:
                    q, k, v, grad = torch.randn(4, 1, 2, pattern.length, size, device=device).to(
                        dtype
                    )
                    attend = lambda q, k, v, p=pattern: dalle_ext.sparse_attention(q, k, v, p)  # noqa: E731
                    gradients(attend, (q, k, v), grad)
                    count += 1
        for shape in LOGITS:
            logits = torch.randn(shape, device=device).to(dtype).requires_grad_()
            out = dalle_ext.gumbel_softmax(logits, 0.5, seed=1)
            torch.autograd.grad(out.sample.float().square().sum() + out.kl.sum(), logits)
            count += 1
    if device == "cuda":
        torch.cuda.synchronize()
    return count


if __name__ == "__main__":
    print(run(sys.argv[1] if len(sys.argv) > 1 else "cuda"), "cases ran")
