"""Least times of a kernel on a card, from its machine code: `kernel_report.py` prints them.

A floor is what one unit of the card needs alone: issue slots, tensor cores, plain products (FFMA),
shared memory with shuffles, exponentials and roots (MUFU), bytes of global memory. A kernel is
never faster than its largest floor; how close it comes is not predicted. Nothing here is measured.

Instructions are counted in stretches of the code (`kernel_code.py`), repeated as often as a size of
the op does (`kernel_sizes.py`, where a new op adds its own).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from kernel_code import Code, Way, Work, exponentials, plain_products, products, works_of

PIPES = ("issue", "tensor", "FFMA", "shared", "MUFU", "bytes")


@dataclass(frozen=True)
class Card:
    """What a card does in a second; rates of one multiprocessor are per clock."""

    name: str
    architecture: str
    multiprocessors: int
    clock: float
    hmma: float  # m16n8k16 of 16 bits, or m16n8k8 of tf32, a clock
    ffma: float  # of a warp, a clock
    bandwidth: float  # bytes a second of a copy, about .9 of what the memory is sold for

    def rate(self, per_clock: float, blocks: float = math.inf) -> float:
        """Of a second; a multiprocessor has at least one of the blocks that work."""
        return min(self.multiprocessors, blocks) * self.clock * per_clock


# Four schedulers issue one instruction each; shared memory gives 128 bytes; 16 lanes of MUFU. HMMA:
# an A100 does 1,024 products a clock, Hopper 2,048 with wgmma, of which mma.sync reaches some 62 %.
CARDS = (
    Card("A100", "sm_80", 108, 1.41e9, 0.5, 2, 1.8e12),
    Card("H100", "sm_90a", 132, 1.755e9, 0.62, 4, 3.0e12),
    Card("H200", "sm_90a", 132, 1.755e9, 0.62, 4, 4.3e12),
)


@dataclass(frozen=True)
class Case:
    """A kernel at a size: what the stretches of a warp are repeated, and bytes of global memory."""

    kernel: str  # a prefix of its readable name
    size: str
    bytes: float
    full: float = 0  # HMMA in tiles without a mask
    masked: float = 0  # HMMA in tiles with one
    warps: float = 0  # that run the stretches with MUFU
    plain: float = 0  # FFMA
    ways: tuple[Way, ...] = ()  # innermost loops first
    blocks: float = math.inf  # that work at once, where they are fewer than multiprocessors


def work_of_case(case: Case, code: Code) -> tuple[Work, list[str]]:
    """What all warps do together in the stretches that a case counts; and what the code lacks."""
    parts: list[tuple[float, Work]] = []
    missing = []
    if case.full or case.masked:
        if regions := products(code):
            parts += [(case.full / regions[0].hmma, regions[0])]
            parts += [(case.masked / regions[-1].hmma, regions[-1])]
        else:
            missing.append("loops with HMMA")
    if case.warps:
        work = exponentials(code)
        parts.append((case.warps, work))
        missing += [] if work.mufu else ["stretches with MUFU"]
    if case.plain:
        work = plain_products(code)
        if work.ffma:
            parts.append((case.plain / work.ffma, work))
        else:
            missing.append("loops with FFMA")
    for way, of_way in zip(case.ways, works_of(code, case.ways), strict=True):
        if of_way is None:
            missing.append(f"{'a loop' if way.loop else 'a way to its end'} with {way}")
        else:
            parts.append((way.times, of_way))
    return sum((work.times(times) for times, work in parts), Work()), missing


def floors(case: Case, work: Work, card: Card) -> dict[str, float]:
    """Microseconds of each of PIPES; bytes alone where a case counts no stretches of the code."""
    seconds = {
        "issue": work.issue / card.rate(4, case.blocks),
        "tensor": work.hmma / card.rate(card.hmma, case.blocks),
        "FFMA": work.ffma / card.rate(card.ffma, case.blocks),
        "shared": work.shared / card.rate(128, case.blocks),
        "MUFU": work.mufu / card.rate(0.5, case.blocks),
        "bytes": case.bytes / card.bandwidth,
    }
    return {pipe: 1e6 * seconds[pipe] for pipe in PIPES}


def table(
    codes: dict[str, Code], architecture: str, cases: Iterable[Case]
) -> tuple[list[str], list[str]]:
    """A line for each case and card, the largest floor with a star; and what is wrong.

    `codes` are the op's kernels by readable name, `cases` its sizes.
    """
    lines, wrong = [], []
    for case in cases:
        name = next((name for name in codes if name.startswith(case.kernel)), None)
        if name is None:
            wrong.append(f"kernel_sizes: {case.kernel} must be a kernel, got none of that name")
            continue
        work, missing = work_of_case(case, codes[name])
        wrong += [f"{name}: kernel_floors must find {what}, got none" for what in missing]
        if missing:
            continue
        for card in (card for card in CARDS if card.architecture == architecture):
            times = floors(case, work, card)
            most = max(times, key=lambda pipe: times[pipe])
            shown = "  ".join(
                f"{pipe} {times[pipe]:6.1f}{'*' if pipe == most else ' '}"
                for pipe in PIPES
                if times[pipe]
            )
            lines.append(f"{card.name}  {case.kernel.rstrip(', '):78} {case.size:26} {shown}")
    return lines, wrong
