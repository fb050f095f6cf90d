"""pack and unpack beside a plain copy of the same bytes, and beside the same in plain torch.

Both read and write 6 bytes an element (float32 on one side, 16 bits on the other), so the copy
reads 3 and writes 3. Like the ops, it allocates what it writes: 16 MiB at most,
since a larger result comes as fresh pages, whose faults take longer than either.
"""

from __future__ import annotations

from typing import Any

import torch

import dalle_ext
import harness
from dalle_ext.reference import formats as reference

Tensor = torch.Tensor
NUMEL = 1 << 22
COPY, PLAIN = "plain copy of the bytes", "torch, integer ops"


def check(format: str) -> None:
    x = torch.randn(4099, generator=torch.Generator().manual_seed(0))
    codes = dalle_ext.pack(x, format)
    assert torch.equal(codes, reference.encode(x, format))
    assert torch.equal(dalle_ext.unpack(codes, format), reference.decode(codes, format))


def measure(names: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Checks, then times packing, counted and stochastic packing, unpacking, a sum of buffers."""
    format = "1-6-9"
    check(format)
    x = torch.randn(NUMEL, generator=torch.Generator().manual_seed(1))
    codes = dalle_ext.pack(x, format)
    same_bytes = torch.zeros(3 * NUMEL, dtype=torch.uint8)
    buffers = codes.view(8, -1)
    packed_sum = torch.zeros(9 * NUMEL // 8, dtype=torch.uint8)  # 8 buffers read, one written
    cases = {
        "pack": (lambda: dalle_ext.pack(x, format), lambda: reference.encode(x, format)),
        "pack, counted": (lambda: dalle_ext.pack_counted(x, format), None),
        "pack, stochastic": (
            lambda: dalle_ext.pack(x, format, rounding="stochastic", seed=1),
            None,
        ),
        "unpack": (
            lambda: dalle_ext.unpack(codes, format),
            lambda: reference.decode(codes, format),
        ),
        "sum of 8 buffers": (lambda: dalle_ext.sum_codes(buffers, format), None),
    }
    rows = []
    for name in names or tuple(cases):
        ours, plain = cases[name]
        copied = packed_sum if name.startswith("sum") else same_bytes
        rivals = {COPY: lambda copied=copied: copied.clone()}
        if plain is not None:
            rivals[PLAIN] = plain
        rows += harness.compare(
            f"formats {name} 1-6-9 float32, 2^22 elements",
            ours,
            rivals,
            work=NUMEL * 1e-6,
            unit="Melem/s",
            goals={COPY: 1 / 1.3} if name in ("pack", "unpack") else None,
            rounds=41,
        )
    return rows


def test_beside_a_copy(benchmark):
    rows = benchmark.pedantic(measure, rounds=1, iterations=1)
    benchmark.extra_info["ratios"] = {
        f"{row['what']}: {row['rival']}": round(row["ratio"], 2) for row in rows
    }
    plain = [row["ratio"] for row in rows if row["rival"] == PLAIN]
    assert len(plain) == 2 and min(plain) > 1
