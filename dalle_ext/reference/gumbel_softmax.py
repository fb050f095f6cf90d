"""The definition of the Gumbel-softmax relaxation, with noise that kernels draw bit for bit.

Letters: K codebook size, R rows (all other axes in logical order).
"""

from __future__ import annotations

import math

import torch

MASK = 0xFFFFFFFF


def philox(seed: torch.Tensor, num_calls: int, first: int = 0) -> torch.Tensor:
    """Philox4x32-10 (Salmon et al. 2011), key `seed`: (num_calls, 4) int64, each in [0, 2**32).

    Row s - first has the counter (0, 0, low(s), high(s)): cuRAND's offset 0 of subsequence s.
    """
    s = torch.arange(first, first + num_calls, dtype=torch.int64, device=seed.device)
    c0, c1, c2, c3 = torch.zeros_like(s), torch.zeros_like(s), s & MASK, (s >> 32) & MASK
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # they wrap round, which leaves the bits right
        c0, c1 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK
        c2, c3 = ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return torch.stack([c0, c1, c2, c3], dim=1)


def gumbel_noise(seed: torch.Tensor, rows: int, num_codes: int, first_row: int = 0) -> torch.Tensor:
    """(R, K) float64; element (first_row + row) * K + k takes word element % 4 of element // 4."""
    first, count = first_row * num_codes, rows * num_codes
    words = philox(seed, (first % 4 + count + 3) // 4, first // 4).reshape(-1)[first % 4 :]
    uniform = (words[:count].reshape(rows, num_codes).double() + 0.5) * 2.0**-32  # never 0 or 1
    return -torch.log(-torch.log(uniform))


def gumbel_softmax(
    logits: torch.Tensor,
    tau: torch.Tensor,
    *,
    dim: int,
    hard: bool,
    seed: torch.Tensor,
    first_row: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """softmax((logits + g) / tau), argmax(logits + g), KL(softmax(logits) || uniform) over `dim`.

    16-bit logits are computed in float32. A row with a logit that is not finite gives NaN, index 0.
    """
    rows = logits.movedim(dim, -1).to(torch.promote_types(logits.dtype, torch.float32))
    bad = ~rows.isfinite().all(-1, keepdim=True)
    noise = gumbel_noise(seed, math.prod(rows.shape[:-1]), rows.shape[-1], first_row)
    noisy = rows + noise.reshape(rows.shape).to(rows.dtype)
    index = noisy.argmax(-1, keepdim=True).masked_fill(bad, 0)
    shifted = noisy - noisy.detach().amax(-1, keepdim=True)  # before the division: no overflow
    tau = torch.where(tau > 0, tau, math.nan).to(rows.dtype)
    soft = (shifted / tau).softmax(-1).masked_fill(bad, math.nan)
    sample = soft.to(logits.dtype)
    if hard:  # the one-hot vector forward, the gradient of the soft sample backward
        sample = torch.zeros_like(sample).scatter(-1, index, 1.0) + (sample - sample.detach())
    log_p = rows.log_softmax(-1)
    kl = (log_p.exp() * log_p).sum(-1).masked_fill(bad[..., 0], math.nan)
    return sample.movedim(-1, dim), index[..., 0], kl + math.log(rows.shape[-1])
