"""Builds, checks and measures on a machine with an NVIDIA GPU: `python -m benchmarks.gpu`.

    run.py        arguments, phases in their order, exit codes
    checks.py     the build, `pytest -m cuda`, compute-sanitizer over small_cases.py
    cases.py      what is measured, most wanted first
    budget.py     what still fits into the time
    supervise.py  a worker process measures: a kernel that hangs or crashes loses one case
    worker.py     that process; card.py, attention.py, gumbel.py, sixteen.py, powersgd.py and
                  block.py measure, bench.py times
    goals.py      what we mean to reach; names.py the rivals
    report.py     goal columns, rows as text

Everything but CUDA's own clock runs on the CPU too: `python -m benchmarks.gpu --dry-run`.
"""
