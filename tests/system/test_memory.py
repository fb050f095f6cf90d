"""R28: memory does not grow over 500 updates and over 200 sampled pictures.

Resident memory of a process of its own, after a warm-up in which malloc settles. `.ci/night` asks
for it with DALLE_TEST_NIGHT=1.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from support.processes import child_environment

TRAIN = """
import sys
from support.repeatable import {make} as make
from dalle.train.config import LoopConfig
from dalle.train.loop import train

task = make(0)
plain = task.train_step

def watched(step):
    if step in ({warm_up}, {warm_up} + 500):
        print("resident", resident(), flush=True)
    return plain(step)

task.train_step = watched
loop = LoopConfig(out=sys.argv[1], steps={warm_up} + 501, checkpoint_every=50, picture_every=0)
train(task, loop)
"""
SAMPLE = """
import sys
from support.repeatable import prior_task
from dalle.pipeline import Pipeline

task = prior_task(0)
pipeline = Pipeline(task.tokenizer, task.vae, task.model.eval())
for i in range(50 + 201):
    if i in (50, 250):
        print("resident", resident(), flush=True)
    pipeline.generate(f"square {i % 7}", num_candidates=1 + i % 4, top=1, seed=i)
"""
RESIDENT = """
import ctypes, gc

def resident():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what malloc keeps for later is no leak
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Rss:"))
"""
PROGRAMS = {
    "dvae": TRAIN.format(make="dvae_task", warm_up=300),
    "prior": TRAIN.format(make="prior_task", warm_up=300),
    "sample": SAMPLE,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.skipif(os.environ.get("DALLE_TEST_NIGHT") != "1", reason="a minute; see .ci/night")
def test_resident_memory_stays(tmp_path, name):
    run = subprocess.run(
        [sys.executable, "-c", RESIDENT + PROGRAMS[name], tmp_path],
        capture_output=True, text=True, check=True, env=child_environment(),
    )  # fmt: skip
    before, after = (int(x.split()[1]) for x in run.stdout.splitlines() if x.startswith("resident"))
    assert after < 1.01 * before, f"{before} KiB, then {after} KiB"
