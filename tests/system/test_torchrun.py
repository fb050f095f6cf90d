"""R16: `torchrun ... dalle prior train` when a process dies, hangs, must stop or is unreachable."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time

import pytest

import cluster_box
from dalle.commands.data_pack import PackConfig, pack
from dalle.files import sha256
from dalle.train.manifest import checkpoints
from dalle.train.metrics import read_metrics
from support.bad_commands import BAD, commands
from support.jobs import STEPS, Job, make_given
from support.processes import free_port, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return make_given(tmp_path_factory.mktemp("given"))


POWERSGD = ("--machines", "2", "--powersgd-rank", "2")


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """The weights of a run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "out"
    code, log = Job(given, out, *POWERSGD).wait()
    assert code == 0, log
    assert re.search(r"prior train: 16 updates in \d+:\d\d, model in ", log), log
    assert "PowerSGD: compression" in log
    return sha256(out / "model" / "model.safetensors")


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
    assert sha256(job.out / "model" / "model.safetensors") == whole
    steps = [record["step"] for record in read_metrics(job.out / "metrics.jsonl")]
    assert steps == list(range(1, STEPS + 1))
    assert not list(job.out.glob("step-*.tmp-*"))


def test_sigterm_saves_and_a_process_that_hangs_is_named(given, tmp_path):
    """Two runs of one folder: the first is told to stop, the second goes on and then hangs."""
    out = tmp_path / "out"
    job = Job(given, out, processes=2)
    job.at(4)
    begin = time.monotonic()
    job.process.terminate()
    _, log = job.wait(60)
    assert time.monotonic() - begin < 30
    assert "checkpoint written; the same command goes on" in log
    reached = int(checkpoints(out)[-1].name[5:])
    assert reached >= 4

    job = Job(given, out, "--timeout", "4", "--steps", str(STEPS + 1000), processes=2)
    job.at(reached + 2)
    os.kill(job.workers()[1], signal.SIGSTOP)
    wanted = "cluster: every process must answer, got none from process 1 of 2: exchange timed out"
    try:
        job.until(lambda: wanted in job.log.read_text(), 30)
    finally:
        job.kill()
    assert f"prior: resumed after step {reached} from" in job.log.read_text()


def start(given, out, machine, name):
    """torchrun on one of the machines of a box, as docs/operations.md has it."""
    net = cluster_box.NET
    return Job(
        given, out, "--timeout", "8", "--powersgd-rank", "2", processes=2, restarts=3, name=name,
        within=["ip", "netns", "exec", cluster_box.machine(machine)],
        join=["--nnodes", "2", "--rdzv-id", "cut", "--rdzv-backend", "c10d",
              "--rdzv-endpoint", f"{net}.1:29501", "--local-addr", f"{net}.{machine + 1}",
              "--rdzv-conf", f"is_host={1 - machine},last_call_timeout=2"],
        GLOO_SOCKET_IFNAME="eth0",
    )  # fmt: skip


def link(state):
    subprocess.run(["ip", "-n", cluster_box.machine(1), "link", "set", "eth0", state], check=True)


@pytest.mark.night
@pytest.mark.skipif(cluster_box.missing() is not None, reason=f"{cluster_box.missing()}")
def test_a_cut_link_and_a_lost_machine(given, whole, tmp_path):
    """Two machines in one: both sides say so, one is started anew, and the bits are the same."""
    with cluster_box.Box(None):
        first, second = (start(given, tmp_path / "out", i, f"log{i}") for i in range(2))
        try:
            first.at(4)
            link("down")
            for job, others in (
                (first, "2, 3"),
                (second, "0"),
            ):  # who keeps the store stands for all
                line = f"every process must answer, got none from process {others} of 4"
                job.until(lambda job=job, line=line: line in job.log.read_text(), 60)
            link("up")
            second.kill()  # the machine is lost for good, and comes back
            second = start(given, tmp_path / "out", 1, "log1b")
            for job in (first, second):
                code, log = job.wait()
                assert code == 0, log
            assert "prior: resumed after step" in first.log.read_text()
        finally:
            first.kill()
            second.kill()
    assert sha256(tmp_path / "out" / "model" / "model.safetensors") == whole


def test_bad_input_gets_one_line_on_every_process(given, tmp_path):
    (given / "blocked" / "metrics.jsonl").mkdir(parents=True)
    (given / "occupied").mkdir()
    (given / "occupied" / "model").write_text("")
    ports = [free_port() for _ in BAD]
    found = run(2, {"said": (commands, given, tmp_path / "out", ports)}, tmp_path, joined=False)
    for said in found["said"]:
        for line, (code, text) in zip(BAD, said, strict=True):
            line = line.format(given=given)
            *banner, last = text.splitlines()
            assert code in (2, 3, 4) and last.startswith(line), text
            assert all(re.match(r"(prior|dvae) train: |cluster: PowerSGD", x) for x in banner), text
    assert not checkpoints(tmp_path / "out")


@pytest.mark.night
def test_killed_alone_on_shards_and_resumed_by_two(given, tmp_path):
    """The losses are those of a run that nothing disturbs, to 1e-5."""
    pack(PackConfig(data=str(given / "pairs"), out=tmp_path / "packed", shard_size=5))
    options = ("--data", str(tmp_path / "packed"), "--workers", "2")
    code, log = Job(given, tmp_path / "whole", *options, processes=1).wait()
    assert code == 0, log
    job = Job(given, tmp_path / "out", *options, processes=1)
    job.at(8)
    os.kill(job.workers()[0], signal.SIGKILL)
    job.wait()
    code, log = Job(given, tmp_path / "out", *options, processes=2, name="again").wait()
    assert code == 0 and re.search(r"prior: resumed after step [69] from ", log), log
    runs = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "out")]
    losses = [[record["loss"] for record in run] for run in runs]
    assert len(losses[0]) == STEPS and losses[1] == pytest.approx(losses[0], rel=1e-5)
