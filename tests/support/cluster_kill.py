"""What each process of `test_cluster_kill` does."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

from dalle.distributed.cluster import Cluster
from dalle.distributed.config import ClusterConfig
from dalle.train.checkpoint import save_checkpoint
from support.cluster import small_task
from support.processes import join_environment


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
