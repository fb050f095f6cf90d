"""Runs of `torchrun ... dalle prior train` that tests watch, disturb and wait for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from PIL import Image

from dalle.train.metrics import read_metrics
from support.prior import make_parts

STEPS, EVERY = 16, 3


def make_given(folder):
    """Pictures, a tokenizer and a dVAE in a folder."""
    tokenizer, vae, pairs = make_parts()
    (folder / "pairs").mkdir()
    for i, caption in enumerate(pairs.captions):
        Image.fromarray(pairs.load(i)).save(folder / "pairs" / f"{i}.png")
        (folder / "pairs" / f"{i}.txt").write_text(caption)
    tokenizer.save_pretrained(folder / "tokenizer")
    vae.save_pretrained(folder / "vae")
    return folder


def arguments(given, out):
    """Of `dalle`."""
    return [
        "prior", "train", "--data", str(given / "pairs"), "--image-size", "8",
        "--tokenizer", str(given / "tokenizer"), "--vae", str(given / "vae"), "--out", str(out),
        "--recipe", "paper", "--text-len", "4", "--batch-size", "8", "--lr", "1e-3",
        "--warmup-steps", "2",
        "--average-every", "1", "--log-every", "1", "--picture-every", "0",
        "--steps", str(STEPS), "--checkpoint-every", str(EVERY),
    ]  # fmt: skip


class Job:
    """A run of `torchrun` in the background, its output in files."""

    def __init__(
        self, given, out, *options, processes=4, restarts=0, within=(), join=("--standalone",),
        name="log", **environment,
    ):  # fmt: skip
        """`within`: a command to run it in; `join`: how torchrun finds its like."""
        self.out, self.log = out, out.with_suffix(f".{name}")
        command = [
            *within, sys.executable, "-m", "torch.distributed.run", *join,
            "--nproc-per-node", str(processes), "--max-restarts", str(restarts),
            "-m", "dalle", *arguments(given, out), *options,
        ]  # fmt: skip
        settings = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, env={**os.environ, **settings, **environment}, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def wait(self, limit=120):
        try:
            self.process.wait(limit)
        finally:
            self.kill()
        return self.process.returncode, self.log.read_text()

    def kill(self):
        """All that is left of it; workers lead sessions of their own."""
        for one in [*self.workers(), self.process.pid]:
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)

    def until(self, holds, limit=90):
        """Waits for something to be seen; the job must be running then."""
        end = time.monotonic() + limit
        while not holds():
            assert time.monotonic() < end and self.process.poll() is None, self.log.read_text()
            time.sleep(0.002)

    def at(self, step):
        metrics = self.out / "metrics.jsonl"
        self.until(lambda: metrics.exists() and read_metrics(metrics)[-1:] and
                   read_metrics(metrics)[-1]["step"] >= step)  # fmt: skip

    def workers(self):
        """Process ids, in the order of their ranks."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid:
                    variables = (folder / "environ").read_bytes().split(b"\0")
                    rank = next(v for v in variables if v.startswith(b"RANK="))
                    found[int(rank[5:])] = int(folder.name)
            except (OSError, StopIteration):
                continue
        return [found[rank] for rank in sorted(found)]
