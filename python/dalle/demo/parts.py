"""How the demo keeps two cores busy: everything it computes, in two parts side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PARTS = 2  # fixed, so that the numbers do not depend on the number of cores


@contextmanager
def threads_for_parts() -> Iterator[None]:
    """torch's threads shared out among the parts, which run at the same time."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // PARTS))
    try:
        yield
    finally:
        torch.set_num_threads(before)
