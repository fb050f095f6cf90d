"""What 16 bits do to AdamW's moments over many updates: `python -m benchmarks.adam16_moments`.

For beta2 from .95 to .9999 and four signals, `AdamW16` beside float64, and beside the same formats
rounded to nearest (which the library does not do). `--record` writes a dated result file; run it in
the repository's root with `benchmarks/` on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dalle_ext

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for `python -m`
from harness import record  # noqa: E402

COUNT, BETA1, LR, EPS = 8192, 0.9, 1e-3, 1e-8
BETAS2 = (0.95, 0.99, 0.999, 0.9999)
Signal = Callable[[int, int], torch.Tensor]


def constant(step: int, steps: int) -> torch.Tensor:
    return torch.linspace(1e-3, 8e-3, COUNT, dtype=torch.float32)


def noise(step: int, steps: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(step)
    return torch.randn(COUNT, generator=draw, dtype=torch.float32) * 1e-3


def falling(step: int, steps: int) -> torch.Tensor:
    """The last two thirds are ten times smaller."""
    return noise(step, steps) * (1.0 if step < steps // 3 else 0.1)


def tiny(step: int, steps: int) -> torch.Tensor:
    return torch.full((COUNT,), 1e-8, dtype=torch.float32)


SIGNALS: dict[str, Signal] = {
    "constant, 1e-3 to 8e-3": constant,
    "normal, 1e-3": noise,
    "normal, 1e-2 then 1e-3": lambda step, steps: falling(step, steps) * 10,
    "constant, 1e-8": tiny,
}


def nearest(x: torch.Tensor, format: str) -> torch.Tensor:
    return dalle_ext.unpack(dalle_ext.pack(x, format), format)


class Moments:
    """Mean, variance and way of AdamW without decay, rounded by `keep` after each update."""

    def __init__(
        self, beta2: float, dtype: torch.dtype, keep: Callable[[torch.Tensor, str], torch.Tensor]
    ) -> None:
        self.mean, self.variance, self.way = (torch.zeros(COUNT, dtype=dtype) for _ in range(3))
        self.beta2, self.keep = beta2, keep

    def update(self, grad: torch.Tensor, step: int) -> None:
        grad = grad.to(self.mean.dtype)
        mean = BETA1 * self.mean + (1 - BETA1) * grad
        variance = self.beta2 * self.variance + (1 - self.beta2) * grad * grad
        root = (variance / (1 - self.beta2 ** (step + 1))).sqrt() + EPS
        self.way += LR / (1 - BETA1 ** (step + 1)) * mean / root
        self.mean, self.variance = self.keep(mean, "1-6-9"), self.keep(variance, "0-6-10")


def measure(name: str, signal: Signal, beta2: float) -> dict[str, Any]:
    """One row: how far the moments and the way are from float64 after 5 / (1 - beta2) updates."""
    steps = max(600, round(5 / (1 - beta2)))
    param = torch.nn.Parameter(torch.zeros(COUNT, dtype=torch.float32))
    betas = (BETA1, beta2)
    optimizer = dalle_ext.AdamW16([param], lr=LR, betas=betas, eps=EPS, weight_decay=0.0)
    exact = Moments(beta2, torch.float64, lambda x, _: x)
    rounded = Moments(beta2, torch.float32, nearest)
    for step in range(steps):
        param.grad = signal(step, steps)
        optimizer.step()
        for moments in (exact, rounded):
            moments.update(param.grad, step)
    state = optimizer.state[param]
    mean = dalle_ext.unpack(state["exp_avg"], "1-6-9").double()
    variance = dalle_ext.unpack(state["exp_avg_sq"], "0-6-10").double()
    row: dict[str, Any] = {"signal": name, "beta2": beta2, "updates": steps}
    way = -param.detach().double()
    for kind, m, v, w in (
        ("AdamW16", mean, variance, way),
        ("nearest", rounded.mean.double(), rounded.variance.double(), rounded.way.double()),
    ):
        ratio = v / exact.variance
        row[kind] = {
            "variance": float(ratio.mean()),
            "variance_spread": float(ratio.std()),
            "mean_error": float((m - exact.mean).norm() / exact.mean.norm()),
            "way_error": float((w - exact.way).norm() / exact.way.norm()),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write a dated result file")
    given = parser.parse_args()
    rows = []
    for name, signal in SIGNALS.items():
        for beta2 in BETAS2:
            row = measure(name, signal, beta2)
            rows.append(row)
            ours, plain = row["AdamW16"], row["nearest"]
            print(
                f"| {name} | {beta2:g} | {ours['variance']:.3f} ± {ours['variance_spread']:.3f} "
                f"| {plain['variance']:.3f} | {ours['mean_error']:.2%} | {plain['mean_error']:.2%} "
                f"| {ours['way_error']:.2%} | {plain['way_error']:.2%} |",
                flush=True,
            )
    if given.record:
        print(f"recorded in {record('adam16_moments', rows)}")


if __name__ == "__main__":
    main()
