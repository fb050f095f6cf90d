"""Muon for the matrices of residual blocks, AdamW for everything else (not in the paper).

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon: the momentum of a matrix is replaced
by the nearest (semi-)orthogonal one, so that every direction of it is learned at the same pace.
`torch.optim.Muon` does this in bf16, one matrix at a time, which takes 37 times as long on a
processor without bf16 products (docs/log.md); here it is fp32, all matrices of a shape at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dalle.train.parts import run_parts_no_grad

# Polar Express (Amsel et al. 2025, table 1): X <- a X + (b A + c A A) X with A = X X^T.
COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
)


def orthogonal(matrices: Tensor) -> Tensor:
    """(N, m, n) with m <= n -> about U V^T of each matrix U S V^T, in four iterations.

    Singular values over a thousandth of the Frobenius norm end between .43 and 1.57, smaller ones
    at 440 times what they were; a matrix of zeros stays so. A fifth iteration would bring them
    nearer to 1 and take a quarter more time.
    """
    x: Tensor = matrices / matrices.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]
    for a, b, c in COEFFICIENTS:
        product = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(product, product, product, beta=b, alpha=c), x, beta=a)
    return x


class MuonAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, with Muon for parameter groups whose `muon` is above 0.

    `muon` is the number of matrices that a parameter stacks: 1, or 3 for queries, keys and values.
    Their update is lr * muon_scale * sqrt(max(1, rows / columns)) times the orthogonalised Nesterov
    momentum; weight decay is that of AdamW.

    Args:
        groups: parameter groups; those with `muon` above 0 hold matrices of (muon * m, n).
        muon_scale: factor on lr for Muon's groups.
        momentum: of Muon.
        parts: number of parts, run at the same time, in which matrices are orthogonalised.
        options: of `torch.optim.AdamW`.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        muon_scale: float,
        momentum: float = 0.95,
        parts: int = 1,
        **options: Any,
    ) -> None:
        for group in groups:
            group.setdefault("muon", 0)
            group["muon_scale"], group["momentum"] = muon_scale, momentum
        self.parts = parts
        super().__init__(groups, **options)
        # Groups that are added later are AdamW's.
        self.defaults.update(muon=0, muon_scale=muon_scale, momentum=momentum)

    def __getstate__(self) -> dict[str, Any]:
        # torch's own version does not know `parts`.
        return {**super().__getstate__(), "parts": self.parts}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # of overloads
        """One update of every parameter that has a gradient."""
        groups = self.param_groups
        loss = None if closure is None else torch.enable_grad()(closure)()
        self._muon([group for group in groups if group["muon"]])
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def _muon(self, groups: list[dict[str, Any]]) -> None:
        # As in torch's fused AdamW: 1 where nothing of this update may remain, read on the device.
        found: Tensor | None = getattr(self, "found_inf", None)
        keep = None if found is None else 1 - found
        shapes: dict[tuple[int, int], list[tuple[Tensor, Tensor, float]]] = defaultdict(list)
        for group in groups:
            size = group["lr"] * group["muon_scale"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    # AdamW expects a step when it loads a state.
                    state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
                    state["momentum_buffer"] = torch.zeros_like(parameter, dtype=torch.float32)
                grad, share = parameter.grad, 1 - group["momentum"]
                decay = group["lr"] * group["weight_decay"]
                if keep is not None and found is not None:
                    grad = grad.masked_fill(found.bool(), 0)
                    share, decay = share * keep, decay * keep
                momentum = state["momentum_buffer"].lerp_(grad, share)
                nesterov = grad.lerp(momentum, group["momentum"])
                parameter.mul_(1 - decay)
                blocks = (x.chunk(group["muon"]) for x in (parameter, nesterov))
                for matrix, update in zip(*blocks, strict=True):
                    rows, columns = matrix.shape
                    if rows > columns:
                        matrix, update = matrix.T, update.T
                    step = -size * max(1, rows / columns) ** 0.5
                    shapes[matrix.shape[0], matrix.shape[1]].append((matrix, update, step))
        for entries in shapes.values():
            stacked = torch.stack([update for _, update, _ in entries])
            results = run_parts_no_grad(
                partial(_orthogonal_part, stacked), len(entries), self.parts
            )
            updates = torch.cat([part for (part,) in results])
            if keep is not None:
                updates = updates * keep
            for (matrix, _, step), update in zip(entries, updates, strict=True):
                matrix.add_(update, alpha=step)


def _orthogonal_part(matrices: Tensor, rows: slice) -> tuple[Tensor]:
    return (orthogonal(matrices[rows]),)
