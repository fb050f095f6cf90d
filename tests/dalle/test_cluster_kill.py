"""R13 on many processes: a process killed during a save leaves a complete checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import clean_path, free_port, join_environment
from test_cluster import small_task

from dalle.distributed.cluster import Cluster
from dalle.distributed.config import ClusterConfig
from dalle.distributed.world import Solo
from dalle.train.checkpoint import load_checkpoint, save_checkpoint
from dalle.train.manifest import checkpoints

KILLS = int(os.environ.get("DALLE_TEST_KILLS", "6"))  # 50 were tried: docs/reliability.md


def saver(rank, port, folder, victim, share, seconds):
    """Saves twice; the victim dies after `share` of the time that the first save took."""
    join_environment(rank, 2, port)
    torch.set_num_threads(1)
    cluster = Cluster(ClusterConfig(timeout=30.0), torch.device("cpu"))
    task = small_task(cluster)
    task.train_step(0)
    begin = time.monotonic()
    save_checkpoint(task, Path(folder), 1)
    took = time.monotonic() - begin
    cluster.any(False)
    if rank == victim:  # nothing of Python runs any more when the alarm comes
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, max(share * took, 1e-5))
    save_checkpoint(task, Path(folder), 2)
    if rank == victim:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds.put(took)
    os._exit(0)  # the other may be gone


@pytest.mark.slow
def test_killed_at_any_moment_of_a_save(tmp_path, monkeypatch):
    clean_path()
    # The server of forks, which imports everything once, knows no other path.
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in paths if p))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_cluster"])
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
