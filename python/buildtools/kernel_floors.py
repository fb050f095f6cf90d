"""Least times of a kernel on a card, from its machine code: `kernel_report.py` prints them.

A floor is what one unit of the card needs alone, all multiprocessors at work: issue slots, tensor
cores, plain products (FFMA), shared memory, exponentials (MUFU), bytes of global memory. A kernel
is never faster than its largest floor; how close it comes is not predicted. Nothing here is
measured.

Instructions are counted where the work is: in the loops with HMMA, the innermost loops with most
FFMA, or the straight stretches with most MUFU. Prologues, address arithmetic between loops and slow
paths are left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

PIPES = ("issue", "tensor", "FFMA", "shared", "MUFU", "bytes")


@dataclass(frozen=True)
class Card:
    """What a card does in a second; rates of one multiprocessor are per clock."""

    name: str
    architecture: str
    multiprocessors: int
    clock: float
    hmma: float  # m16n8k16 a clock
    ffma: float  # of a warp, a clock
    bandwidth: float  # bytes a second of a copy, about .9 of what the memory is sold for

    def rate(self, per_clock: float) -> float:
        return self.multiprocessors * self.clock * per_clock


# Four schedulers issue one instruction each; shared memory gives 128 bytes; 16 lanes of MUFU. HMMA:
# an A100 does 1,024 products a clock, Hopper 2,048 with wgmma, of which mma.sync reaches some 62 %.
CARDS = (
    Card("A100", "sm_80", 108, 1.41e9, 0.5, 2, 1.8e12),
    Card("H100", "sm_90a", 132, 1.755e9, 0.62, 4, 3.0e12),
    Card("H200", "sm_90a", 132, 1.755e9, 0.62, 4, 4.3e12),
)


@dataclass(frozen=True)
class Work:
    """Instructions of one warp in a stretch of machine code."""

    issue: int = 0
    hmma: int = 0
    ffma: int = 0
    mufu: int = 0
    shared: int = 0  # bytes that ldmatrix reads and cp.async writes

    def minus(self, other: Work) -> Work:
        return Work(
            self.issue - other.issue,
            self.hmma - other.hmma,
            self.ffma - other.ffma,
            self.mufu - other.mufu,
            self.shared - other.shared,
        )


def work_of(instructions: list[str]) -> Work:
    """Counts opcodes, which carry their modifiers: LDSM.16.M88.4 reads four matrices."""
    opcodes = Counter(name.split(".")[0] for name in instructions)
    shared = 0
    for name in instructions:
        if name.startswith("LDSM"):
            shared += 128 * int(name.rsplit(".", 1)[-1]) if name[-1].isdigit() else 128
        elif name.startswith("LDGSTS"):
            shared += 32 * (16 if name.endswith(".128") else 8 if name.endswith(".64") else 4)
    return Work(len(instructions), opcodes["HMMA"], opcodes["FFMA"], opcodes["MUFU"], shared)


Code = list[tuple[str, str]]  # (label, "") or (opcode with modifiers, operands)


def parse_code(text: str) -> dict[str, Code]:
    """Labels and instructions by mangled kernel name, from `nvdisasm -c`."""
    kernels: dict[str, Code] = {}
    current: Code = []
    for line in text.splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            current = kernels[match[1]] = []
        elif match := re.match(r"(\.L_\w+):", line):
            current.append((match[1], ""))
        elif match := re.match(
            r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line
        ):
            current.append((match[1], match[2]))
    return kernels


def loops_of(code: Code) -> list[tuple[int, int]]:
    """First and last place of every loop: a branch back to a label before it."""
    places = {name: i for i, (name, _) in enumerate(code) if name.startswith(".")}
    loops = []
    for i, (name, operands) in enumerate(code):
        target = re.search(r"\((\.L_\w+)\)", operands) if name.startswith("BRA") else None
        if target and places.get(target[1], i) < i:
            loops.append((places[target[1]], i))
    return loops


def between(code: Code, first: int, last: int) -> Work:
    return work_of([name for name, _ in code[first : last + 1] if not name.startswith(".")])


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
            chosen += [name for name, _ in code[first : last + 1] if not name.startswith(".")]
    return work_of(chosen)


def exponentials(code: Code, least: int = 4) -> Work:
    """All straight stretches with at least `least` MUFU."""
    stretch: list[str] = []
    chosen: list[str] = []
    for name, _ in [*code, (".end", "")]:
        if not name.startswith("."):
            stretch.append(name)
        if name.startswith(".") or name.split(".")[0] in ("BRA", "EXIT", "RET"):
            if sum(x.startswith("MUFU") for x in stretch) >= least:
                chosen += stretch
            stretch = []
    return work_of(chosen)


@dataclass(frozen=True)
class Case:
    """A kernel at a size: what a warp's stretches are repeated, and bytes of global memory."""

    kernel: str  # a prefix of its readable name
    size: str
    bytes: float
    full: float = 0  # HMMA in tiles without a mask
    masked: float = 0  # HMMA in tiles with one
    warps: float = 0  # that run the stretches with MUFU
    plain: float = 0  # FFMA


def floors(case: Case, code: Code, card: Card) -> dict[str, float]:
    """Microseconds of each of PIPES; bytes alone where a case counts no stretches of the code."""
    total = dict.fromkeys(("issue", "hmma", "ffma", "mufu", "shared"), 0.0)
    parts: list[tuple[float, Work]] = []
    if case.full or case.masked:
        regions = products(code)
        parts += [(case.full / regions[0].hmma, regions[0])]
        parts += [(case.masked / regions[-1].hmma, regions[-1])]
    if case.warps:
        parts += [(case.warps, exponentials(code))]
    if case.plain:
        work = plain_products(code)
        parts += [(case.plain / work.ffma, work)]
    for times, work in parts:
        for name in total:
            total[name] += times * getattr(work, name)
    seconds = {
        "issue": total["issue"] / card.rate(4),
        "tensor": total["hmma"] / card.rate(card.hmma),
        "FFMA": total["ffma"] / card.rate(card.ffma),
        "shared": total["shared"] / card.rate(128),
        "MUFU": total["mufu"] / card.rate(0.5),
        "bytes": case.bytes / card.bandwidth,
    }
    return {pipe: 1e6 * seconds[pipe] for pipe in PIPES}


TEXT, SIDE, LENGTH = 256, 32, 1280  # the paper's


def earliest(kind: str, query: int) -> int:
    """By index in the walk, as earliest_image_index of sparse_attention.h."""
    if kind == "row":
        return max(TEXT, query - SIDE)
    return max(TEXT, query - (query - TEXT) % SIDE) if kind == "column" else TEXT


def visible_pairs(kind: str, queries: int, keys: int, tile: int) -> tuple[int, int]:
    """Pairs that warps of `queries` compute in tiles without a mask, and in pieces of `keys` with.

    A warp takes a tile of `tile` keys whole where all of them are visible to all its queries.
    """
    full = masked = 0
    for first in range(0, LENGTH, queries):
        last = first + queries - 1
        for key in range(0, last + 1, tile):
            end = key + tile - 1
            seen = earliest(kind, last)
            if end <= first and (end < TEXT or key >= seen):
                full += queries * tile
                continue
            for piece in range(key, key + tile, keys):
                near = piece <= last and piece + keys - 1 >= earliest(kind, first)
                masked += queries * keys * (near or piece < min(TEXT, last + 1))
    return full, masked


def attention(kind: str, heads: int, head: int) -> Iterator[Case]:
    """The three kernels on fp16: two products, three for grad_q, four for grad_k and grad_v."""
    rows = 2 if head <= 64 else 1
    tensor, lse = heads * LENGTH * head * 2.0, heads * LENGTH * 8.0
    size = f"{kind}, {heads} heads, T {LENGTH}"
    full, masked = visible_pairs(kind, 16 * rows, 32, 64)
    hmma = heads * head / (16 * 8 * 16)
    template = f"__half, {head}, {rows}"
    name = "sparse_attention_forward_mma_kernel"
    yield Case(f"{name}<{template}>", size, 4 * tensor + lse, 2 * hmma * full, 2 * hmma * masked)
    name = "sparse_attention_backward_query_mma_kernel"
    moved = 6 * tensor + 2 * lse
    yield Case(f"{name}<{template}>", size, moved, 3 * hmma * full, 3 * hmma * masked)
    # 16 keys a warp, pieces of 32 queries: as many as pieces of 32 keys for 16 queries, about.
    pairs = sum(visible_pairs(kind, 16, 32, 32))
    name = "sparse_attention_backward_key_mma_kernel"
    yield Case(f"{name}<__half, {head}, ", size, 6 * tensor + lse, 0, 4 * hmma * pairs)


def float_attention(kind: str, heads: int, head: int) -> Iterator[Case]:
    """The three kernels on fp32, whole tiles of 64 x 64; reads of shared memory are not counted."""
    tensor, lse = heads * LENGTH * head * 4.0, heads * LENGTH * 8.0
    size = f"{kind}, {heads} heads, T {LENGTH}"
    ffma = heads * sum(visible_pairs(kind, 64, 64, 64)) * head / 32
    for step, count, moved in (
        ("forward", 2, 4 * tensor + lse),
        ("backward_query", 3, 6 * tensor + 2 * lse),
        ("backward_key", 4, 6 * tensor + 2 * lse),
    ):
        name = f"sparse_attention_{step}_float_kernel<{head}>"
        yield Case(name, size, moved, plain=count * ffma)


def cases() -> Iterator[Case]:
    """The sizes of benchmarks/."""
    for kind, heads, head in (("row", 496, 64), ("row", 128, 64), ("causal", 496, 64)):
        yield from attention(kind, heads, head)
    yield from attention("row", 248, 128)
    yield from float_attention("row", 496, 64)
    rows, codes = 8192, 8192
    for scalar, size, back in (("float", 4, "16, false, 4, 2"), ("__half", 2, "8, false, 8, 1")):
        threads = 512 if scalar == "float" else 1024
        moved = float(rows * codes * size)
        label = f"{rows} x {codes}"
        warps = rows * 512 / 32
        name = f"gumbel_softmax_forward_kernel<{scalar}, RowLayout<false, 1, 512, 16, false, 16, 2"
        yield Case(name, label, 2 * moved, warps=warps)
        name = f"gumbel_softmax_backward_kernel<{scalar}, RowLayout<false, 1, {threads}, {back}"
        yield Case(name, label, 3 * moved, warps=rows * threads / 32)
    number = 1e9  # of elements, and bytes of each that are read and written
    yield Case("adam16_step_kernel<true>", "1e9, fp16 gradients", 18 * number)
    yield Case("formats_pack_kernel<(Format)0, float>", "1e9", 6 * number)
    yield Case("formats_unpack_kernel<(Format)0, float>", "1e9", 6 * number)
    yield Case("grad_scale_unscale_kernel<__half", "1.5e9", 6 * number)


def table(codes: dict[str, Code], architecture: str, op: str) -> tuple[list[str], list[str]]:
    """A line for each case of `op` and card, the largest floor with a star; and what is wrong.

    `codes` are the op's kernels by readable name.
    """
    lines, wrong = [], []
    for case in cases():
        if not case.kernel.startswith(f"{op}_"):
            continue
        name = next((name for name in codes if name.startswith(case.kernel)), None)
        if name is None:
            wrong.append(f"kernel_floors: {case.kernel} must be a kernel of {op}, got none")
            continue
        code = codes[name]
        if case.full + case.masked and not products(code):
            wrong.append(f"{name}: kernel_floors must find loops with HMMA, got none")
            continue
        if case.warps and not exponentials(code).mufu:
            wrong.append(f"{name}: kernel_floors must find stretches with MUFU, got none")
            continue
        if case.plain and not plain_products(code).ffma:
            wrong.append(f"{name}: kernel_floors must find loops with FFMA, got none")
            continue
        for card in (card for card in CARDS if card.architecture == architecture):
            times = floors(case, code, card)
            most = max(times, key=lambda pipe: times[pipe])
            shown = "  ".join(
                f"{pipe} {times[pipe]:6.1f}{'*' if pipe == most else ' '}"
                for pipe in PIPES
                if times[pipe]
            )
            lines.append(f"{card.name}  {case.kernel.rstrip(', '):78} {case.size:26} {shown}")
    return lines, wrong
