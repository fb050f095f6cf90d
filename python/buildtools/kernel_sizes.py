"""The sizes of the benchmarks at which `kernel_floors.py` gives the floors of each op's kernels.

A new op writes a function that yields its `Case`s, and names it in SIZES. A case is a kernel, a
size, the bytes of its tensors, and the ways that its warps walk (`kernel_code.Way`): what to count,
and how often all warps together do it. To see the opcodes of a loop: `nvdisasm -c` of the cubin
that `nvcc -cubin -arch=sm_90a -std=c++20 --expt-relaxed-constexpr -Icsrc` makes. As an example, a
kernel whose warps take 256 elements at a time from fp32 to 16 bits (two loads and a store of 16
bytes for each thread):

    Case("formats_pack_kernel<(Format)0, float>", "1e9", 6e9,
         ways=(Way(1e9 / 256, {"LDG.128": 2, "STG.128": 1}),))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil

from kernel_code import Way
from kernel_floors import Case

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
    """The three kernels on fp32, by plain products and by 3xTF32, whole tiles of 64 keys.

    Plain: reads of shared memory are not counted. 3xTF32: m16n8k8 at the rate of m16n8k16 in 16
    bits, half the products; three of them for scores (and dp), the cheapest loop, four for sums
    over keys or queries, the other one.
    """
    tensor, lse = heads * LENGTH * head * 4.0, heads * LENGTH * 8.0
    size = f"{kind}, {heads} heads, T {LENGTH}"
    ffma = heads * sum(visible_pairs(kind, 64, 64, 64)) * head / 32
    hmma = heads * sum(visible_pairs(kind, 16, 64, 64)) * head / (16 * 8 * 8)
    for step, scores, sums, moved in (
        ("forward", 1, 1, 4 * tensor + lse),
        ("backward_query", 2, 1, 6 * tensor + 2 * lse),
        ("backward_key", 2, 2, 6 * tensor + 2 * lse),
    ):
        name = f"sparse_attention_{step}_float_kernel"
        yield Case(f"{name}<PlainPart<{head}>", size, moved, plain=(scores + sums) * ffma)
        full, masked = 3 * scores * hmma, 4 * sums * hmma
        yield Case(f"{name}<Tf32Part<{head}>", size, moved, full, masked)


def sparse_attention() -> Iterator[Case]:
    for kind, heads, head in (("row", 496, 64), ("row", 128, 64), ("causal", 496, 64)):
        yield from attention(kind, heads, head)
    yield from attention("row", 248, 128)
    yield from float_attention("row", 496, 64)


def gumbel_softmax() -> Iterator[Case]:
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


MANY = 1e9  # elements
EIGHTS = MANY / (8 * 32)  # rounds of warps whose lanes take eight elements each
HALVES = {"HADD2.F32": 8}  # conversions of eight halves to float


def adam16() -> Iterator[Case]:
    """Two moments of 16 bits, read and written; loads are of eight halves or codes, four floats."""
    stores = {"STG.128": 4}
    for grads, moved, loads in (
        ("fp16", 18, {"LDG.128": 5, **HALVES}),
        ("fp32", 20, {"LDG.128": 6}),
    ):
        way = Way(EIGHTS, {**loads, **stores})
        size = f"1e9, {grads} gradients"
        yield Case("adam16_step_kernel<true>", size, moved * MANY, ways=(way,))


def decode_attention() -> Iterator[Case]:
    """A layer and step of the 12B model: image keys of the mean slot, for one caption."""
    heads, head = 62, 64
    for kind, keys, rounds in (("row", 33, 1), ("column", 16.5, 1), ("conv", 66, 2)):
        for samples in (1, 64, 512):
            queries, tiles = heads * samples, heads * ceil(samples / 16)
            ways = (
                Way(tiles * TEXT / 16, {"HMMA": 16, "LDG.128": 8}),
                Way(rounds * queries, {"LDG.128": 18, "SHFL": 9 * 3 + 2}),
            )
            # Old keys and values, q, the new ones twice, the result; a slot of 16-bit numbers each.
            moved = 2.0 * head * (2 * heads * TEXT + queries * (2 * (keys - 1) + 6))
            size = f"{kind}, {samples} x {heads} heads"
            yield Case("decode_attention_kernel<__half, 64, false>", size, moved, ways=ways)


def formats() -> Iterator[Case]:
    pack = {"LDG.128": 2, "STG.128": 1}
    name = "formats_pack_kernel<(Format)0, float>"
    yield Case(name, "1e9", 6 * MANY, ways=(Way(EIGHTS, pack),))
    # Two calls of Philox, each of more than 18 long products and fewer than 36.
    drawn = Way(EIGHTS, {**pack, "IMAD.WIDE.U32": 36})
    yield Case(name, "1e9, stochastic", 6 * MANY, ways=(drawn,))
    unpack = Way(EIGHTS, {"LDG.128": 1, "STG.128": 2})
    yield Case("formats_unpack_kernel<(Format)0, float>", "1e9", 6 * MANY, ways=(unpack,))
    buffers = 8
    added = Way(buffers * EIGHTS, {"LDG.128": 1})
    stored = Way(EIGHTS, {"STG.128": 1})
    moved = (buffers + 1) * 2 * MANY
    yield Case("formats_sum_kernel<(Format)0>", "1e9 of 8 buffers", moved, ways=(added, stored))


def grad_scale() -> Iterator[Case]:
    way = Way(EIGHTS, {"LDG.128": 2, "STG.128": 1})
    yield Case("grad_scale_scale_kernel<float, __half>", "1e9", 6 * MANY, ways=(way,))
    way = Way(EIGHTS, {"LDG.128": 3, "STG.128": 2})
    yield Case("grad_scale_unscale_kernel<__half>", "1e9", 10 * MANY, ways=(way,))
    for size, moved, meets in (  # the gradients of a model
        ("1e9, fp16 in place", 4, {"LDG.128": 1, **HALVES, "STG.128": 1}),
        ("1e9, fp32 in place", 8, {"LDG.128": 2, "STG.128": 2}),
        ("1e9, fp16 check only", 2, {"LDG.128": 1, **HALVES}),
    ):
        way = Way(EIGHTS, meets)
        yield Case("grad_scale_chunks_kernel", size, moved * MANY, ways=(way,))


def factor_parts(lines: int, depth: int) -> int:
    """As factor_parts of powersgd_cuda_products.cuh."""
    slabs = ceil(depth / 32)
    parts = max(1, min(256 // ceil(lines / 128), slabs // 4, 16))
    return ceil(slabs / ceil(slabs / parts))


def powersgd_factor(rows: int, columns: int, rank: int, project: bool, fast: bool) -> Case:
    """compress (with fp32 gradients) and project, of a rank up to 128: 8 warps for 128 lines."""
    lines, depth = (columns, rows) if project else (rows, columns)
    parts = factor_parts(lines, depth)
    warps = 8 * ceil(lines / 128) * parts
    slabs = warps * ceil(ceil(depth / 32) / parts)
    tiles = min(ceil(rank / 16), 8)  # 8 columns of the rank, of the warp that has more of them
    steps, products = (2, 2) if fast else (4, 4)  # of a slab; HMMA of a step and tile
    copies = 6 if project else 10  # 16 bytes: codes 2, factor 4, gradients 4
    ways = (
        *(() if project else (Way(2 * slabs, {"FFMA": 8, "STG.128": 1}),)),  # E += G
        Way(steps * slabs, {"HMMA": products * tiles}),
        Way(slabs, {"BAR": 2, "LDGSTS.128": copies}),
        Way(warps, {"STG.64": 4 * tiles}),
    )
    moved = (2 if project else 8) * rows * columns + 4 * rank * (rows + columns)
    kinds = ", ".join(str(flag).lower() for flag in (project, fast))
    size = f"{rows} x {columns}, rank {rank}"
    return Case(f"powersgd_factor_kernel<{kinds}, float>", size, moved, ways=ways)


def powersgd_decompress(rows: int, columns: int, rank: int, fast: bool) -> Case:
    """8 warps for 64 x 128 of D, the rank in slabs of 32 and, at last, of a multiple of 8."""
    warps = 8 * ceil(rows / 64) * ceil(columns / 128)
    slabs, steps = (rank - 1) // 32, ceil((rank - 1) % 32 / 8)
    of_step = 8 if fast else 24
    ways = (
        Way(warps * slabs, {"HMMA": 4 * of_step, "LDGSTS.128": 6}),
        Way(warps, {"HMMA": steps * of_step}),
        Way(warps, {"STG.128": 12}, loop=False),
    )
    moved = 8 * rows * columns + 4 * rank * (rows + columns)
    size = f"{rows} x {columns}, rank {rank}"
    return Case(f"powersgd_decompress_kernel<{str(fast).lower()}>", size, moved, ways=ways)


def powersgd() -> Iterator[Case]:
    rows, columns, rank = 3968, 3968, 112
    for fast in (False, True):
        for project in (False, True):
            yield powersgd_factor(rows, columns, rank, project, fast)
        yield powersgd_decompress(rows, columns, rank, fast)
    parts = factor_parts(rows, columns)
    added = Way(rows * rank * ((parts - 1) // 4) / 32, {"FADD": 4})
    moved = 4.0 * (parts + 1) * rows * rank
    yield Case("powersgd_sum_kernel<false>", f"{parts} of {rows} x {rank}", moved, ways=(added,))
    # A strip of 8 columns waits for the one before it, so one block of 16 warps is never idle. It
    # reflects (three barriers) and factors (eight); the first strip is scaled instead (two).
    strips, warps = ceil(rank / 8), 16
    chain = Way(warps * (strips - 1), {"BAR": 11}, loop=False)
    first = Way(warps, {"BAR": 10}, loop=False)
    size, moved = f"{rows} x {rank}, chain", 8.0 * rows * rank
    name = "powersgd_householder_kernel<512, 8, 8>"
    yield Case(name, size, moved, ways=(chain, first), blocks=1)
    # Q's last strip takes the reflectors of all strips.
    longest = Way(warps * strips, {"BAR": 3})
    yield Case("powersgd_form_kernel<512, 8, 8>", size, moved, ways=(longest,), blocks=1)


SIZES: dict[str, Callable[[], Iterator[Case]]] = {
    "adam16": adam16,
    "decode_attention": decode_attention,
    "formats": formats,
    "grad_scale": grad_scale,
    "gumbel_softmax": gumbel_softmax,
    "powersgd": powersgd,
    "sparse_attention": sparse_attention,
}
