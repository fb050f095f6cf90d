"""`dalle plan`."""

from __future__ import annotations

import json
from dataclasses import dataclass

from dalle.configs import did_you_mean
from dalle.errors import UsageError
from dalle.plan import make_plan, plan_text
from dalle.prior import PRESETS


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Shows parameters, memory by part and FLOPs of the prior, without building it.

    Args:
        preset: size of the prior, or "all".
        batch: sequences a training step.
        json: print a JSON list instead of tables.
    """

    preset: str = "all"
    batch: int = 1
    json: bool = False

    def __post_init__(self) -> None:
        known = [*PRESETS, "all"]
        if self.preset not in known:
            hint = did_you_mean(self.preset, known)
            raise UsageError(
                f"plan: preset must be one of {', '.join(known)}, got {self.preset}{hint}"
            )


def plan(config: PlanConfig) -> None:
    """Prints the plan of one preset, or of all."""
    names = list(PRESETS) if config.preset == "all" else [config.preset]
    plans = [make_plan(name, PRESETS[name], config.batch) for name in names]
    print(json.dumps(plans, indent=1) if config.json else "\n\n".join(map(plan_text, plans)))
