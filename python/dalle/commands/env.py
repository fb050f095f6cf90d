"""`dalle env`."""

from __future__ import annotations

import json
from dataclasses import dataclass

from dalle.env import environment, environment_text


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """Shows versions, devices, native objects and extras found.

    Args:
        json: print one JSON object instead of a table.
    """

    json: bool = False


def env(config: EnvConfig) -> None:
    """Prints what this machine and installation have."""
    report = environment()
    print(json.dumps(report, indent=1) if config.json else environment_text(report))
