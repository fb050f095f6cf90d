"""Each kind of kernel bug is planted once, and the builds that should detect it do."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

import emulated

BUILDS = ["plain", "portable", "race"]  # portable: ucontext instead of assembly
if os.environ.get("DALLE_TEST_NIGHT") == "1":
    BUILDS.append("address")
WRONG = "^wrong result"
RACE = r"^emulator: kernel planted::.*thread \(\d+, 0, 0\): data race on "
KERNEL = (
    r"^emulator: kernel planted::\w+(<.*>)?\(.*\), block \(0, 0, 0\)(, thread \(\d+, 0, 0\))?: "
)

# bug: {build: what its output must match}; "random" is the plain build with any of five seeds.
CAUGHT = {
    "no_barrier_after_block_reduction": {
        "random": WRONG,
        "race": RACE
        + r"byte \d+ of parts: a write at planted.cu:\d+ is not ordered behind the read",
    },
    "no_syncwarp": {"race": RACE + r"byte \d+ of values: a read at planted.cu:\d+"},
    "write_beside_another_warps_read": {
        "race": RACE + r"byte \d+ of value: a (write|read) at planted.cu:\d+ is not ordered behind"
    },
    "no_barrier_after_cp_async_wait": {"plain": WRONG, "random": WRONG, "race": RACE},
    "no_barrier_before_next_cp_async": {"random": WRONG, "race": RACE + ".*cp.async at planted.cu"},
    "cp_async_waits_for_too_few": {
        "plain": WRONG,
        "race": RACE + r"byte \d+ of dynamic shared memory: .* behind the wait for a cp.async of "
        r"thread \(\d+, 0, 0\) at planted.cu:\d+$",
    },
    "blocks_write_the_same": {"race": RACE + "global memory: a write"},
    "no_barrier_over_global": {"random": WRONG, "race": RACE + "global memory"},
    "sum_without_atomic": {"race": RACE + "global memory"},
    "beyond_static_shared": {
        "plain": KERNEL + "shared memory was written 0 bytes behind the end of fixed",
        "address": "index 64 out of bounds",
        "race": KERNEL + "a write at planted.cu:\\d+ is outside of the arrays in shared memory",
    },
    "beyond_dynamic_shared": {
        "plain": KERNEL + "access outside shared memory",
        "address": KERNEL + "stopped by a sanitizer",
        "race": KERNEL + "a write at planted.cu:\\d+ is outside of the arrays in shared memory",
    },
    "far_beyond_shared": {"plain": KERNEL + "access outside shared memory", "address": KERNEL},
    "beyond_global": {"address": "heap-buffer-overflow"},
    "misaligned_vector": dict.fromkeys(BUILDS, KERNEL + "a vector of 16 bytes must be aligned"),
    "misaligned_cast": {"address": "misaligned address"},
    "misaligned_ldmatrix_row": dict.fromkeys(BUILDS, KERNEL + "ldmatrix: a row must be 16-byte"),
    "misaligned_cp_async": dict.fromkeys(BUILDS, KERNEL + "cp.async of 16 bytes: addresses must"),
    "uninitialised_shared": dict.fromkeys(BUILDS, WRONG),
    "two_barriers": dict.fromkeys(BUILDS, KERNEL + "divergent __syncthreads"),
    "deadlock": dict.fromkeys(
        BUILDS,
        KERNEL
        + r"deadlock: 16 threads wait in __syncthreads at planted.cu:\d+, 16 threads wait in "
        r"__syncwarp at planted.cu:\d+, 32 have exited$",
    ),
    "mask_without_caller": dict.fromkeys(BUILDS, KERNEL + "__shfl_sync with a mask without the"),
    "lane_outside_mask": dict.fromkeys(BUILDS, WRONG),
    "two_collectives": dict.fromkeys(BUILDS, KERNEL + "divergent warp: this lane is in a vote"),
    "half_a_warp_multiplies": dict.fromkeys(BUILDS, KERNEL + "mma.sync needs all 32 lanes, got 16"),
    "swapped_registers": dict.fromkeys(BUILDS, WRONG),
    "stack_overflow": {"plain": KERNEL + "stack overflow", "address": "stack-overflow"},
    "too_many_threads": dict.fromkeys(BUILDS, "invalid configuration argument"),
    "too_much_shared": dict.fromkeys(BUILDS, "invalid configuration argument"),
}


@pytest.fixture(scope="module")
def programs():
    paths = emulated.build(*(f"emulator_{build}" for build in BUILDS))
    return dict(zip(BUILDS, paths, strict=True))


def run(program, *words, seed=0):
    environment = dict(os.environ, ASAN_OPTIONS="detect_leaks=0", DALLE_EMULATOR_SEED=str(seed))
    done = subprocess.run(
        [program, *words], capture_output=True, text=True, env=environment, check=False, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


def test_every_planted_bug_is_expected_somewhere(programs):
    names = run(programs["plain"])[1].split()
    planted = {name.removeprefix("bug_") for name in names if name.startswith("bug_")}
    assert planted == set(CAUGHT)
    assert {"clean_block_reduction", "mma_half", "ldmatrix_x4_trans", "architecture"} <= set(names)


@pytest.mark.parametrize(
    ("bug", "build"), [(b, w) for b in CAUGHT for w in CAUGHT[b] if w in (*BUILDS, "random")]
)
def test_planted_bug_is_caught(bug, build, programs):
    if build == "random":
        results = [run(programs["plain"], f"bug_{bug}", seed=seed) for seed in range(1, 6)]
        assert any(code == 1 and re.search(CAUGHT[bug][build], text) for code, text in results)
        return
    code, text = run(programs[build], f"bug_{bug}")
    assert code != 0, text
    assert re.search(
        CAUGHT[bug][build].replace("kernel planted", "kernel .*planted"), text, re.M
    ), text


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(s, marks=pytest.mark.night) for s in (2, 3))]
)
@pytest.mark.parametrize("build", BUILDS)
def test_no_alarm_on_clean_kernels(build, seed, programs):
    for name in run(programs[build])[1].split():
        if not name.startswith("bug_"):
            assert run(programs[build], name, seed=seed) == (0, "ok\n"), name


def test_a_seed_repeats(programs):
    runs = [run(programs["plain"], "bug_deadlock", seed=seed)[1] for seed in (7, 7, 8, 9, 10)]
    assert runs[0] == runs[1]
    assert len(set(runs)) > 1  # who notices the deadlock depends on the schedule
