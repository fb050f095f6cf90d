"""R13 on many processes: a process killed during a save leaves a complete checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal

import pytest

from dalle.distributed.world import Solo
from dalle.train.checkpoint import load_checkpoint
from dalle.train.manifest import checkpoints
from support.cluster import small_task
from support.cluster_kill import saver
from support.processes import child_environment, free_port

KILLS = int(os.environ.get("DALLE_TEST_KILLS", "6"))  # 50 were tried: docs/reliability.md


@pytest.mark.slow
def test_killed_at_any_moment_of_a_save(tmp_path, monkeypatch):
    # The server of forks, which imports everything once, knows no other path.
    monkeypatch.setenv("PYTHONPATH", child_environment()["PYTHONPATH"])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.cluster_kill"])
    draw, ends = random.Random(0), {1: 0, 2: 0}
    for kill in range(KILLS):
        folder = tmp_path / str(kill)
        folder.mkdir()
        port, queue, share = free_port(), context.SimpleQueue(), draw.uniform(0, 1.3)
        share = share if kill < KILLS - 1 else 9.0  # the last comes too late
        both = [
            context.Process(target=saver, args=(r, port, str(folder), kill % 2, share, queue))
            for r in range(2)
        ]
        for one in both:
            one.start()
        both[kill % 2].join(60)
        both[1 - kill % 2].join(60)
        assert both[kill % 2].exitcode in (0, -signal.SIGALRM)
        newest = checkpoints(folder)[-1]
        assert load_checkpoint(small_task(Solo()), newest) in (1, 2)
        ends[int(newest.name[-1])] += 1
    assert min(ends.values()) > 0, ends  # some before the end of the save, some after
