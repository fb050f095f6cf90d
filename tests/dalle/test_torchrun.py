"""R16: `torchrun ... dalle prior train`: a process dies, hangs or has to stop; nothing is lost."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, suppress
from pathlib import Path

import pytest
import torch.distributed as dist
from PIL import Image
from processes import free_port, run
from test_train_prior import make_parts

from dalle.cli import main
from dalle.files import sha256
from dalle.train.checkpoint import checkpoints
from dalle.train.metrics import read_metrics

STEPS, EVERY = 16, 3
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with pictures, a tokenizer and a dVAE."""
    folder = tmp_path_factory.mktemp("given")
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
        "--text-len", "4", "--batch-size", "8", "--lr", "1e-3", "--warmup-steps", "2",
        "--average-every", "1", "--log-every", "1", "--picture-every", "0",
        "--steps", str(STEPS), "--checkpoint-every", str(EVERY),
    ]  # fmt: skip


class Job:
    """A run of `torchrun` in the background, its output in files."""

    def __init__(self, given, out, *options, processes=4, restarts=0, **environment):
        self.out, self.log = out, out.with_suffix(".log")
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
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


POWERSGD = ("--machines", "2", "--powersgd-rank", "2")


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """The weights of a run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "out"
    code, log = Job(given, out, *POWERSGD).wait()
    assert code == 0, log
    assert "prior train: 16 updates, weights in " in log and "PowerSGD: compression" in log
    return sha256(out / "prior" / "model.safetensors")


def test_kill_one_of_four_twice_and_end_with_the_same_bits(given, whole, tmp_path):
    """In a step, and after the restart in the middle of a save."""
    job = Job(given, tmp_path / "out", *POWERSGD, restarts=3)
    job.at(4)
    os.kill(job.workers()[2], signal.SIGKILL)
    job.at(10)
    job.until(lambda: any(job.out.glob("step-*.tmp-*")))
    os.kill(job.workers()[1], signal.SIGKILL)
    code, log = job.wait()
    assert code == 0, log
    assert re.search(r"prior: resumed after step 3 from (.|\n)*resumed after step (9|12) from", log)
    for process in (2, 1):
        wanted = f"cluster: every process must answer, got none from process {process} of 4"
        assert log.count(wanted) == 3, log
    assert sha256(job.out / "prior" / "model.safetensors") == whole
    steps = [record["step"] for record in read_metrics(job.out / "metrics.jsonl")]
    assert steps == list(range(1, STEPS + 1))
    assert not list(job.out.glob("step-*.tmp-*"))


def test_sigterm_saves_on_all_processes_and_goes_on(given, whole, tmp_path):
    job = Job(given, tmp_path / "out", processes=2)
    job.at(4)
    begin = time.monotonic()
    job.process.terminate()
    _, log = job.wait(60)
    assert time.monotonic() - begin < 30
    assert "checkpoint written; the same command goes on" in log
    reached = int(checkpoints(job.out)[-1].name[5:])
    assert reached >= 4
    code, log = Job(given, tmp_path / "out", processes=2).wait()
    assert code == 0 and f"prior: resumed after step {reached} from" in log, log


def test_a_process_that_hangs_is_named(given, tmp_path):
    job = Job(given, tmp_path / "out", "--timeout", "4", processes=2)
    job.at(4)
    os.kill(job.workers()[1], signal.SIGSTOP)
    wanted = "cluster: every process must answer, got none from process 1 of 2: exchange timed out"
    try:
        job.until(lambda: wanted in job.log.read_text(), 30)
    finally:
        job.kill()
    assert checkpoints(job.out)


BAD = {
    "cluster: machines must divide the 2 processes, got 3": ["--machines", "3"],
    "cluster: timeout must be positive, got 0.0": ["--timeout", "0"],
    "cluster: batch_size must be at least the 2 processes, got 1": ["--batch-size", "1"],
    "prior train: half_weights must be off on many processes, where a gathered block has one "
    "dtype, got True": ["--precision", "fp16-scaled", "--half-weights"],
    "PowerSGD: rank must leave a matrix that factors make smaller, got 5000: nothing would be "
    "compressed": ["--machines", "2", "--powersgd-rank", "5000"],
    "cluster: processes must reach each other, got on process": ["no such interface"],
}  # fmt: skip


def commands(rank, given, out, ports):
    """What `dalle prior train` says on this process to each of `BAD`."""
    said = []
    for port, options in zip(ports, BAD.values(), strict=True):
        os.environ["MASTER_PORT"] = str(port)
        if options == ["no such interface"]:
            os.environ["GLOO_SOCKET_IFNAME"], options = "nowhere0", []
        with redirect_stderr(io.StringIO()) as lines:
            code = main([*arguments(given, out), *options])
        said.append([code, lines.getvalue()])
        if dist.is_initialized():
            dist.destroy_process_group()
    return said


def test_bad_input_gets_one_line_on_every_process(given, tmp_path):
    ports = [free_port() for _ in BAD]
    found = run(2, {"said": (commands, given, tmp_path / "out", ports)}, tmp_path, joined=False)
    for said in found["said"]:
        for line, (code, text) in zip(BAD, said, strict=True):
            assert code in (2, 4) and text.startswith(line) and text.count("\n") == 1, text
    assert not checkpoints(tmp_path / "out")
