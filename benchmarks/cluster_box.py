"""Two machines in one: network namespaces and a link of limited rate. Needs root, ip and tc."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType

PREFIX, NET = "dallebox", "10.77.0"


def machine(i: int) -> str:
    """The network namespace of machine i of this process's box."""
    return f"{PREFIX}-{os.getpid()}-{i}"


def missing() -> str | None:
    """Why there can be no box here, in one line; None where there can."""
    if os.geteuid() != 0:
        return "bench_cluster: user must be root, to make network namespaces"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"bench_cluster: {tool} (iproute2) must be installed, got none"
    return None


def _run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


class Box:
    """Machines 0 and 1 while it is entered.

    Args:
        rate: of the link, each way, as tc reads it ("100mbit"); None for as fast as the kernel.
    """

    def __init__(self, rate: str | None) -> None:
        self.rate = rate

    def __enter__(self) -> Box:
        self._down()
        names = [machine(i) for i in range(2)]
        for name in names:
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        pair = ["ip", "link", "add", "eth0", "netns", names[0], "type", "veth"]
        _run(*pair, "peer", "name", "eth0", "netns", names[1])
        for i, name in enumerate(names):
            _run("ip", "-n", name, "addr", "add", f"{NET}.{i + 1}/24", "dev", "eth0")
            _run("ip", "-n", name, "link", "set", "eth0", "up")
            if self.rate is not None:
                shape = f"root tbf rate {self.rate} burst 64k latency 50ms".split()
                _run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "eth0", *shape)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._down()

    @staticmethod
    def _down() -> None:
        """Of this process, and of those that were killed before they could."""
        for line in _run("ip", "netns", "list").splitlines():
            name = line.split()[0]
            prefix, _, rest = name.partition("-")
            owner = rest.partition("-")[0]
            own = owner == str(os.getpid()) or not Path("/proc", owner).exists()
            if prefix == PREFIX and own:
                _run("ip", "netns", "del", name, check=False)

    def torchrun(self, processes: int, script: Path, arguments: list[str], seconds: float) -> None:
        """Runs a script in so many processes on each machine.

        Raises:
            RuntimeError: it failed (with the end of what it printed), or ran past `seconds`.
        """
        own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0"}
        running = []
        for i in (1, 0):
            command = ["ip", "netns", "exec", machine(i), sys.executable, "-m"]
            command += ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node"]
            command += [str(processes), "--rdzv-backend", "c10d", "--rdzv-id", "box"]
            command += ["--rdzv-endpoint", f"{NET}.1:29501", "--local-addr", f"{NET}.{i + 1}"]
            command += ["--rdzv-conf", f"is_host={1 - i}", str(script), *arguments]
            running.append(
                subprocess.Popen(
                    command,
                    env=os.environ | own,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )  # fmt: skip
            )
        try:
            for process in running:
                text, _ = process.communicate(timeout=seconds)
                if process.returncode:
                    raise RuntimeError(f"bench_cluster: a machine failed:\n{text[-3000:]}")
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"bench_cluster: a run must end within {seconds:.0f} s") from None
        finally:
            for process in running:
                process.kill()
