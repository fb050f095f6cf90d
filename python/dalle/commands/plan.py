"""`dalle plan`."""

from __future__ import annotations

import json
from dataclasses import dataclass

from dalle.configs import did_you_mean
from dalle.errors import UsageError
from dalle.plan import cluster_plan, cluster_text, make_plan, plan_text
from dalle.prior.config import PRESETS


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Shows parameters, memory by part and FLOPs of the prior, without building it.

    Args:
        preset: size of the prior, or "all".
        batch: sequences a training step.
        json: print a JSON list instead of tables.
        gpus: also traffic, memory and step time on so many GPUs, and on 1, 8 and 64 machines; then
            `batch` is that of each GPU.
        per_machine: GPUs of one machine, which share the parameters.
        rank: of PowerSGD in all; left out, the paper's for its widths.
        tflops: what one GPU reaches, TFLOP/s.
        link_gbit: of each machine to the others, Gbit/s.
        peer_gbyte: between the GPUs of a machine, GB/s.
    """

    preset: str = "all"
    batch: int = 1
    json: bool = False
    gpus: int | None = None
    per_machine: int = 8
    rank: int | None = None
    tflops: float = 50.0
    link_gbit: float = 100.0
    peer_gbyte: float = 100.0

    def __post_init__(self) -> None:
        choices = [*PRESETS, "all"]
        if self.preset not in choices:
            hint = did_you_mean(self.preset, choices)
            raise UsageError(
                f"plan: preset must be one of {', '.join(choices)}, got {self.preset}{hint}"
            )


def plan(config: PlanConfig) -> None:
    """Prints the plan of one preset, or of all."""
    names = list(PRESETS) if config.preset == "all" else [config.preset]
    plans = [make_plan(name, PRESETS[name], config.batch) for name in names]
    texts = [plan_text(values) for values in plans]
    if config.gpus is not None:
        for i, name in enumerate(names):
            cluster = cluster_plan(
                PRESETS[name],
                gpus=config.gpus,
                per_machine=config.per_machine,
                batch=config.batch,
                rank=config.rank,
                tflops=config.tflops,
                link_gbit=config.link_gbit,
                peer_gbyte=config.peer_gbyte,
            )
            plans[i]["cluster"] = cluster
            texts[i] += "\n\n" + cluster_text(cluster)
    print(json.dumps(plans, indent=1) if config.json else "\n\n".join(texts))
