"""pack and unpack beside a plain copy of the same bytes, and beside the same in plain torch.

The copy reads and writes what the op reads and writes in all, half of it each. Like the ops, it
allocates what it writes: on a CPU 16 MiB at most, since a larger result comes as fresh pages, whose
faults take longer than either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

import dalle_ext
import harness
from dalle_ext.reference import formats as reference
from harness import Call, Case, Error, Ready

Tensor = torch.Tensor
COPY, PLAIN = "plain copy of the bytes", "torch, integer ops"
CHECKED = 4099
PASSES = ("pack", "pack, counted", "pack, stochastic", "unpack", "sum of 8 buffers")
POWERS = {"cpu": 22, "gpu": 28, "tiny": 13}  # of two: elements


def ready(
    which: str, format: str, dtype: torch.dtype, power: int, names: tuple[str, ...], device: str
) -> Ready:
    numel = 1 << power
    draw = torch.Generator(device).manual_seed(1)
    x = torch.randn(numel, generator=draw, device=device).to(dtype)
    codes = dalle_ext.pack(x, format)
    ops: dict[str, Callable[[Tensor], Tensor]] = {
        "pack": lambda x: dalle_ext.pack(x, format),
        "pack, counted": lambda x: dalle_ext.pack_counted(x, format).codes,
        "pack, stochastic": lambda x: dalle_ext.pack(x, format, rounding="stochastic", seed=1),
        "unpack": lambda codes: dalle_ext.unpack(codes, format, dtype),
        "sum of 8 buffers": lambda buffers: dalle_ext.sum_codes(buffers, format).codes,
    }
    plain = {
        "pack": lambda: reference.encode(x, format),
        "unpack": lambda: reference.decode(codes, format, dtype),
    }
    ours = ops[which]
    given = {"unpack": codes, "sum of 8 buffers": codes.view(8, -1)}.get(which, x)
    written = {"unpack": x.nbytes, "sum of 8 buffers": codes.nbytes // 8}.get(which, codes.nbytes)
    half = torch.zeros((given.nbytes + written) // 2, dtype=torch.uint8, device=device)
    calls: dict[str, Callable[[], Call]] = {
        "ours": lambda: lambda: ours(given),
        COPY: lambda: half.clone,
        PLAIN: lambda: plain[which],
    }

    def check(name: str, result: Tensor) -> Error | None:
        """Elements of the first that are not the definition's."""
        if name == COPY:
            return None
        with dalle_ext.use_reference():
            wanted = ours(given[..., :CHECKED])
        return Error(float((result[:CHECKED] != wanted).sum()), 0.0)

    chosen = {name: calls[name] for name in ("ours", *names)}
    return Ready(chosen, check, numel * 1e-6, "Melem/s", given.nbytes + written)


def cases(scale: str) -> Iterator[Case]:
    """Every pass; on a GPU in every format and dtype."""
    power = POWERS[scale]
    floats = (torch.float32,) if scale == "cpu" else (torch.float32, torch.float16, torch.bfloat16)
    for format in ("1-6-9",) if scale == "cpu" else ("1-6-9", "0-6-10"):
        for dtype in floats:
            for which in PASSES:
                if which.startswith("sum") and (dtype != torch.float32 or format != "1-6-9"):
                    continue  # of codes, whatever they were packed from
                rivals = {COPY: "eager"} | ({PLAIN: "eager"} if which in ("pack", "unpack") else {})
                goal = {COPY: 1 / 1.3 if scale == "cpu" else 1 / 1.07}
                timed = which in ("pack", "unpack") and dtype == torch.float32
                yield Case(
                    op="formats",
                    what=f"formats {which} {format} {str(dtype)[6:]}, 2^{power} elements",
                    ready=partial(ready, which, format, dtype, power, tuple(rivals)),
                    rivals=rivals,
                    goals=goal if timed else {},
                    goal_us=1.07 * 6 * 2**28 / 4.3e6 if timed else None,
                    rounds=41,
                )


def test_beside_a_copy(case):
    rows = harness.measure(case)
    harness.assert_right(rows)
    assert all(row["ratio"] > 1 for row in rows if row["rival"] == PLAIN), harness.table(rows)
