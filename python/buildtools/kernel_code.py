"""The machine code of a kernel, and the stretches of it that a size of the op repeats.

A stretch is a loop with HMMA, the innermost loops with most FFMA, the straight code with most MUFU,
or a way: the fewest instructions of a warp once round a loop, or from the kernel's start to its
end, that meet what the size needs ("LDG.128" twice, HMMA 28 times). The slow paths of a loop
(borders, unaligned rows, a division that overflows) are on no shortest way.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass
from itertools import count
from operator import add
from typing import NamedTuple

WAVEFRONT = 128  # bytes that shared memory moves in a clock


@dataclass(frozen=True)
class Work:
    """Instructions of one warp in a stretch of machine code, or of many warps."""

    issue: float = 0
    hmma: float = 0
    ffma: float = 0
    mufu: float = 0
    shared: float = 0  # bytes

    def __add__(self, other: Work) -> Work:
        return Work(*map(add, astuple(self), astuple(other)))

    def times(self, count: float) -> Work:
        return Work(*(count * number for number in astuple(self)))

    def minus(self, other: Work) -> Work:
        return self + other.times(-1)


def _shared_bytes(name: str) -> int:
    """At least so much of shared memory's time: lanes of a load may read the same words."""
    kind, *modifiers = name.split(".")
    if kind == "LDSM":  # 8 x 8 matrices of 16 bits
        return 128 * int(modifiers[-1]) if modifiers and modifiers[-1].isdigit() else 128
    if kind in ("LDS", "SHFL"):
        return WAVEFRONT
    if kind not in ("STS", "LDGSTS"):
        return 0
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1, "8": 1}
    return 32 * next((widths[m] for m in modifiers if m in widths), 4)


def work_of(instructions: Iterable[str]) -> Work:
    """Counts opcodes, which carry their modifiers: LDSM.16.M88.4 reads four matrices."""
    names = list(instructions)
    opcodes = Counter(name.split(".")[0] for name in names)
    shared = sum(map(_shared_bytes, names))
    return Work(len(names), opcodes["HMMA"], opcodes["FFMA"], opcodes["MUFU"], shared)


class Instruction(NamedTuple):
    """A line of machine code; a label has a name that begins with a dot, and nothing else."""

    name: str  # opcode with modifiers
    operands: str = ""
    predicate: str = ""

    @property
    def is_label(self) -> bool:
        return self.name.startswith(".")

    @property
    def may_fall_through(self) -> bool:
        """Whether the next line can come after this one; a branch may test its operands too."""
        if self.predicate or self.operands.lstrip().startswith(("P", "!P", "UP", "!UP")):
            return True
        return self.name.split(".")[0] not in ("EXIT", "RET", "BRX", "JMP") and self.name != "BRA"


Code = list[Instruction]


def parse_code(text: str) -> dict[str, Code]:
    """Labels and instructions by mangled kernel name, from `nvdisasm -c`."""
    kernels: dict[str, Code] = {}
    current: Code = []
    line_of_code = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)(.*)")
    for line in text.splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            current = kernels[match[1]] = []
        elif match := re.match(r"(\.L_\w+):", line):
            current.append(Instruction(match[1]))
        elif match := line_of_code.match(line):
            current.append(Instruction(match[2], match[3], match[1] or ""))
    return kernels


def loops_of(code: Code) -> list[tuple[int, int]]:
    """First and last place of every loop: a branch back to a label before it."""
    places = {line.name: i for i, line in enumerate(code) if line.is_label}
    loops = []
    for i, line in enumerate(code):
        target = re.search(r"\((\.L_\w+)\)", line.operands) if line.name[:3] == "BRA" else None
        if target and places.get(target[1], i) < i:
            loops.append((places[target[1]], i))
    return loops


def names_of(lines: Iterable[Instruction]) -> list[str]:
    return [line.name for line in lines if not line.is_label]


def between(code: Code, first: int, last: int) -> Work:
    return work_of(names_of(code[first : last + 1]))


def products(code: Code) -> list[Work]:
    """The loops with HMMA, each without the loops in it, the cheapest by HMMA first."""
    loops = loops_of(code)
    found = []
    for first, last in loops:
        work = between(code, first, last)
        inside = [x for x in loops if x != (first, last) and first <= x[0] and x[1] <= last]
        outermost = [
            x for x in inside if not any(y != x and y[0] <= x[0] and x[1] <= y[1] for y in inside)
        ]
        for loop in outermost:
            work = work.minus(between(code, *loop))
        if work.hmma:
            found.append(work)
    return sorted(found, key=lambda work: work.issue / work.hmma)


def plain_products(code: Code, least: int = 64) -> Work:
    """All innermost loops with at least `least` FFMA."""
    loops = loops_of(code)
    chosen: list[str] = []
    for first, last in loops:
        inside = any(x != (first, last) and first <= x[0] and x[1] <= last for x in loops)
        if not inside and between(code, first, last).ffma >= least:
            chosen += names_of(code[first : last + 1])
    return work_of(chosen)


def exponentials(code: Code, least: int = 4) -> Work:
    """All straight stretches with at least `least` MUFU."""
    stretch: list[str] = []
    chosen: list[str] = []
    for line in [*code, Instruction(".end")]:
        if not line.is_label:
            stretch.append(line.name)
        if line.is_label or line.name.split(".")[0] in ("BRA", "EXIT", "RET"):
            if sum(x.startswith("MUFU") for x in stretch) >= least:
                chosen += stretch
            stretch = []
    return work_of(chosen)


@dataclass(frozen=True)
class Way:
    """What warps walk through: once round a loop, or from the kernel's start to its end.

    Attributes:
        times: how often, of all warps together.
        meets: opcodes, with some of their modifiers or none ("STG", "LDG.128"), and how many of
            each are met at least. The loop is the smallest one that has such a way.
        loop: False for the whole kernel.
    """

    times: float
    meets: Mapping[str, int]
    loop: bool = True

    def __str__(self) -> str:
        return " ".join(f"{opcode} {number}" for opcode, number in self.meets.items())


def works_of(code: Code, ways: Iterable[Way]) -> list[Work | None]:
    """The work of each way, None where the code has none.

    A way round a loop does not count what is in a smaller loop of a way before it, nor does the way
    through the whole kernel: so the innermost loop comes first.
    """
    regions: dict[int, tuple[int, int]] = {}  # by first place: of all branches back to it
    for first, last in loops_of(code):
        regions[first] = first, max(last, regions.get(first, (first, last))[1])
    smallest_first = sorted(regions.values(), key=lambda region: region[1] - region[0])
    taken: list[tuple[int, int]] = []
    found: list[Work | None] = []
    after = _followers(code)
    for way in ways:
        whole = (0, len(code) - 1)
        for first, last in smallest_first if way.loop else [whole]:
            inner = [x for x in taken if first <= x[0] and x[1] <= last and x != (first, last)]
            free = {i for x in inner for i in range(x[0], x[1] + 1)}
            ends_at = (lambda i, first=first: i == first) if way.loop else (lambda i: i < 0)
            names = _shortest(code, after, (first, last), free, way.meets, ends_at)
            if names is not None:
                taken += [(first, last)] if way.loop else []
                found.append(work_of(names))
                break
        else:
            found.append(None)
    return found


def _followers(code: Code) -> list[list[int]]:
    """The places that can come after each place; -1 is the end of the kernel."""
    places = {line.name: i for i, line in enumerate(code) if line.is_label}
    joins: dict[str, int] = {}  # barrier -> where its threads go on together
    after: list[list[int]] = []
    for i, line in enumerate(code):
        kind, following = line.name.split(".")[0], [i + 1] if i + 1 < len(code) else []
        targets = [places[t] for t in re.findall(r"\.L_\w+", line.operands) if t in places]
        barrier = re.search(r"\bB\d+\b", line.operands)
        if kind == "BSSY" and barrier and targets:
            joins[barrier[0]] = targets[0]
        if kind == "BSYNC" and barrier and barrier[0] in joins:
            after.append([joins[barrier[0]]])
        elif kind in ("BRA", "BRX", "JMP"):
            after.append(targets + (following if line.may_fall_through else []))
        elif kind in ("EXIT", "RET"):
            after.append([-1] + (following if line.may_fall_through else []))
        else:
            after.append(following)
    return after


def _shortest(
    code: Code,
    after: list[list[int]],
    region: tuple[int, int],
    free: set[int],
    meets: Mapping[str, int],
    ends_at: Callable[[int], bool],
) -> list[str] | None:
    """Names of the instructions on the shortest way from the first place of `region`, in it, to
    where it ends, those in `free` left out."""
    wanted = [(set(opcode.split(".")), number) for opcode, number in meets.items()]
    limits = tuple(number for _, number in wanted)
    here = [set(name.split(".")) for name in names_of(code[region[0] : region[1] + 1])]
    if not all(any(names <= parts for parts in here) for names, number in wanted if number):
        return None

    def met(i: int, state: tuple[int, ...]) -> tuple[int, ...]:
        if i in free or not state or code[i].is_label:
            return state
        parts = set(code[i].name.split("."))
        return tuple(
            min(number, have + (names <= parts))
            for have, (names, number) in zip(state, wanted, strict=True)
        )

    order = count()  # so that the heap never compares what is not ordered
    start = (region[0], (0,) * len(limits))
    heap = [(0, next(order), start)]
    came_from: dict[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]] | None] = {start: None}
    done: set[tuple[int, tuple[int, ...]]] = set()
    best: dict[tuple[int, tuple[int, ...]], int] = {start: 0}
    while heap:
        length, _, node = heapq.heappop(heap)
        if node in done:
            continue
        done.add(node)
        place, state = node
        state = met(place, state)
        length += not (code[place].is_label or place in free)
        for following in after[place]:
            if ends_at(following) and state == limits:
                way: list[str] = []
                step: tuple[int, tuple[int, ...]] | None = node
                while step is not None:
                    if not (code[step[0]].is_label or step[0] in free):
                        way.append(code[step[0]].name)
                    step = came_from[step]
                return way[::-1]
            if not region[0] < following <= region[1]:
                continue
            target = (following, state)
            if length < best.get(target, 1 << 60):
                best[target], came_from[target] = length, node
                heapq.heappush(heap, (length, next(order), target))
    return None
