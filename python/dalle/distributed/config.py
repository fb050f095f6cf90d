"""How the processes of `torchrun` work together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dalle.configs import Named, check_numbers, require


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(Named):
    """How the processes of `torchrun` work together; of no effect on one process.

    Attributes:
        machines: groups of processes; parameters are sharded inside each, and gradients are
            averaged between them. 0: the machines torchrun knows of.
        powersgd_rank: columns of the factors in which gradients travel between machines (paper
            2.5); 0 sends them whole.
        powersgd_wire: words of the factors.
        timeout: seconds after which a process that does not answer ends the run.
    """

    machines: int = 0
    powersgd_rank: int = 0
    powersgd_wire: Literal["1-6-9", "fp32"] = "1-6-9"
    timeout: float = 600.0

    def __post_init__(self) -> None:
        check_numbers("cluster", self)
        require("cluster", self, "0 or more", lambda x: x >= 0, "machines", "powersgd_rank")
        require("cluster", self, "positive", lambda x: x > 0, "timeout")
