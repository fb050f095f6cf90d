"""What the host does for one step apart from the arithmetic: `python -m benchmarks.host_cost`.

Tensors are so small that only overhead is left. One process, one thread; medians and operator
calls of one run, for one FSDP2 unit with PowerSGD (two matrices, four vectors: its reduction), the
step of `AdamW16` and the statistics of `ResblockScaler.step` on 800 parameters, beside torch's
fused AdamW. Times on a shared machine are good for ratios of one run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

import dalle_ext
from dalle.distributed.powersgd import Compressor, Gradient
from dalle.dtensor import StatsTables, gradient_stats

PARAMETERS, SIZE, CALLS = 800, 16, 40
PREFIXES = ("aten::", "dalle_ext::", "c10d::")


def unit() -> Callable[[], None]:
    """The reduction of a unit's gradients; in the default group, which has one process."""
    options = {"error_feedback": True, "average": True, "min_compression": 1.0, "seed": 0}
    compressor = Compressor(2, None, wire="1-6-9", scaler=None, **options)
    gradients = [torch.randn(16, 16) for _ in range(2)] + [torch.randn(16) for _ in range(4)]
    named = [Gradient(f"p{i}", grad) for i, grad in enumerate(gradients)]
    return lambda: compressor.reduce_(named, set())


def parameters() -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.zeros(SIZE)) for _ in range(PARAMETERS)]
    for parameter in made:
        parameter.grad = torch.ones(SIZE)
    return made


def statistics_of(tables: StatsTables | None) -> Callable[[], object]:
    params, scales = parameters(), torch.ones(5)
    groups = [i % 5 for i in range(PARAMETERS)]
    return lambda: gradient_stats(params, scales, groups, tables=tables)


def operators(call: Callable[[], object]) -> int:
    """Operator calls, those inside others too."""
    from torch.profiler import profile

    with profile() as seen:
        call()
    return sum(event.count for event in seen.key_averages() if event.key.startswith(PREFIXES))


def milliseconds(call: Callable[[], object], calls: int = CALLS) -> tuple[float, float]:
    """Median and least time of a call."""
    times = []
    for _ in range(calls + 3):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times[3:]), 1e3 * min(times[3:])


def main() -> None:
    torch.set_num_threads(1)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    cases: dict[str, Callable[[], object]] = {
        "one FSDP2 unit, PowerSGD's reduction": unit(),
        f"AdamW16.step, {PARAMETERS} parameters": dalle_ext.AdamW16(parameters()).step,
        f"torch.optim.AdamW(fused=True), {PARAMETERS}": torch.optim.AdamW(
            parameters(), fused=True
        ).step,
        f"gradient statistics, {PARAMETERS}, table kept": statistics_of(StatsTables()),
        f"gradient statistics, {PARAMETERS}, table made": statistics_of(None),
    }
    for name, call in cases.items():
        median, least = milliseconds(call)
        print(f"{name:48} {median:6.2f} ms, least {least:6.2f} {operators(call):6} operators")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
