"""What fp16 keeps of the gradients with one scale for all blocks, and with a scale for each.

A factor of two more or less changes no bit of a gradient but where fp16 runs out of range, so the
two kinds of scales differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dalle.precision.ends import LOWEST
from dalle.precision.scaler import ResblockScaler

QUANTILES = (0.01, 0.5, 0.99)
SHARES = ("block_underflow", "block_subnormal", "error")
HIGHEST, LOWEST_SCALE = 2.0**24, 2.0**-40  # scales that are tried
ONE, OWN = "one scale", "own scales"


class Scaled(Protocol):
    """A model of residual blocks with `ends`, such as `dalle.prior.model.Prior`."""

    def __call__(self, *batch: Tensor) -> Any:
        """The output, whose `loss` is a 0-d tensor."""

    def resblocks(self) -> Mapping[str, Any]:
        """Name -> residual block, a module, in the order in which they run."""

    def zero_grad(self) -> None:
        """As of `nn.Module`."""


def use_scaler(model: Scaled, scaler: ResblockScaler) -> ResblockScaler:
    """Puts the ends of a scaler around the model's blocks, in place of those that are there."""
    for key, block in model.resblocks().items():
        block.ends = scaler[key]
    return scaler


def gradients(model: Scaled, batch: Sequence[Tensor]) -> list[Tensor]:
    """Per block: all its parameter gradients as one vector, still scaled."""
    model.zero_grad()
    model(*batch).loss.backward()
    blocks = model.resblocks().values()
    return [
        torch.cat([p.grad.flatten() for p in block.parameters() if p.grad is not None])
        for block in blocks
    ]


def largest_scales(model: Scaled, batch: Sequence[Tensor], shared: bool) -> ResblockScaler:
    """A scaler of the model with the largest powers of two at which all gradients are finite.

    Those that enter a block too: there the ends set what overflows to zero, so that the gradients
    of the parameters would not show it.

    Args:
        model: of precision "fp16-scaled".
        batch: text (B, text_len - 1) and tokens (B, N).
        shared: one scale for all blocks.
    """
    scaler = ResblockScaler(
        model.resblocks(), initial=HIGHEST, low=LOWEST_SCALE, high=HIGHEST, sample_every=1
    )
    use_scaler(model, scaler)
    scales = scaler.scales[: len(scaler)]
    while bool((scales > LOWEST_SCALE).all()):
        finite = torch.stack([g.isfinite().all() for g in gradients(model, batch)])
        counted = scaler.metrics()
        bad = (counted["block_overflow"] > 0).to(finite.device) | ~finite
        if not bool(bad.any()):
            break
        scales[bad.any().expand_as(bad) if shared else bad] /= 2
    return scaler


def kept_gradients(model: Scaled, batch: Sequence[Tensor]) -> dict[str, Any]:
    """What each block's gradients lose in fp16 with one scale for all blocks, and with its own.

    Args:
        model: of precision "fp16-scaled"; its gradients are left at None, its ends are new.
        batch: text (B, text_len - 1) and tokens (B, N).

    Returns:
        "one scale" and "own scales", each with lists over the blocks: "block_scale" (log2),
        "block_underflow" and "block_subnormal" (shares of the gradient elements that enter the
        block), "error" (relative change of the block's parameter gradients: one scale against own
        scales, and own scales against a quarter of them). "quantiles": name -> exponents of the
        gradient below which that share of a block's elements lies.
    """
    found: dict[str, Any] = {}
    got: dict[str, list[Tensor]] = {}
    metrics: dict[str, Any] = {}
    scaler: ResblockScaler | None = None
    for name, shared in ((ONE, True), (OWN, False), ("a quarter", None)):
        if shared is None and scaler is not None:
            scaler.scales[: len(scaler)] /= 4
        else:
            scaler = largest_scales(model, batch, bool(shared))
        grads = gradients(model, batch)
        got[name] = [g / s for g, s in zip(grads, scaler.scales.tolist(), strict=False)]
        metrics = {key: value.tolist() for key, value in scaler.metrics().items()}
        found[name] = {key: metrics[key] for key in ("block_scale", *SHARES[:2])}
    del found["a quarter"]
    shares = metrics["block_exponents"]
    found["quantiles"] = {f"{q:.0%}": [quantile_of(row, q) for row in shares] for q in QUANTILES}
    for name, beside in ((ONE, OWN), (OWN, "a quarter")):
        pairs = zip(got[name], got[beside], strict=True)
        found[name]["error"] = [
            float((a - b).norm() / b.norm().clamp_min(torch.finfo(b.dtype).tiny)) for a, b in pairs
        ]
    model.zero_grad()
    return found


def quantile_of(shares: Sequence[float], wanted: float) -> float:
    """Exponent below which that share of a row of "block_exponents" lies."""
    total = 0.0
    for place, share in enumerate(shares):
        total += share
        if total >= wanted:
            return place + LOWEST
    return float("nan")


def mean_of_late_half(of_blocks: Sequence[float]) -> float:
    """Of the blocks whose gradients are smallest."""
    late = of_blocks[len(of_blocks) // 2 :]
    return sum(late) / len(late)
