"""Fuzzes the command line: damaged arguments, files, folders and streams, in one process.

    python tests/fuzz_cli.py --seconds 3600 --seed 1 --demo   # by night
    python tests/fuzz_cli.py --seed 1 --demo --only 417       # one case again, with its output

A case is a pure function of (seed, number). After each: an exit code of the documented ones but 1
(a fault of dalle itself), one line of error, no name of an exception and no words of Python's, no
control characters, an end within `SLOWEST` seconds, devices and inputs as they were.
`tests/system/test_fuzz_cli.py` runs it for `DALLE_TEST_FUZZ_SECONDS` in the gate.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from dalle.cli import main
from fuzz_damage import damage_file, damage_out, damage_words
from support.cli_home import DVAE, EDIT, PRIOR, RECONSTRUCT, RERANK, SAMPLE, make_home

SLOWEST = 60.0  # seconds, on a machine that others load
MEMORY = 3 << 30  # bytes a case may map beside what the process has
CODES = {0, 2, 3, 4, 5}
LINES = [
    DVAE, RECONSTRUCT, PRIOR, SAMPLE, RERANK,
    DVAE.replace("--steps 2 --out out", "--steps 4 --out run-dvae"),
    PRIOR.replace("--steps 2 --out out", "--steps 4 --out run-prior"),
    f"{PRIOR} --resume run-prior/step-00000002",
    f"{SAMPLE} --file long.txt", f"{SAMPLE} --prime-image pairs/0.png --prime-rows 1",
    f"{SAMPLE} --overwrite --temperature 0.5 --top-k 3", f"{RERANK} --data .",
    "sample --again drawn/00-word/0.png --model pipe --out out",
    "edit --again edited/00-word/0.png --image pairs/0.png --model pipe --out out",
    f"{EDIT} --mask pairs/1.png --paste", f"{EDIT} --box 4,4,9,12 --box 3,3 --box-units pixels",
    "data check --data pairs --contact out/sheet.png", "data check --data pairs --verify none",
    "data check --data pairs --image-size 16 --tokenizer tok --text-len 8",
    "data make-shapes --out out --count 3", "tokenizer train --data pairs --out out",
    "dvae import-openai --encoder pipe/vae/model.safetensors --decoder file --out out",
    "plot scales --run scales", "plan --preset tiny", "plan --preset 12b --gpus 8 --json",
    f"{PRIOR} --config options.yaml", f"{SAMPLE} --config options.yaml", "data check --data odd",
    "ranker train --data pairs --image-size 16 --tokenizer tok --steps 2 --batch-size 2 --out out",
    "eval fid --real pairs --fake pairs --weights pipe --bootstrap 3 --cache out/c --out out",
    "eval recon --data pairs --model pipe --out out", "eval report --out out",
    "eval blur --real pairs --fake odd --weights pipe --bootstrap 2 --cache out/c --out out",
    "eval rerank --real pairs --fake pipe --num-candidates 2 --bootstrap 2 --cache out/c --out out",
    "eval overlap --real pairs --fake odd --weights pipe --steps 2 --train-batch 4 "
    "--threshold 0.5 --cache out/c --out out",
    "eval votes --ours pairs --theirs odd --out out",
    "eval votes --ours pairs --theirs pairs --judge ranker --weights pipe --cache out/c --out out",
    "reproduce --model pipe --data shapes --only figure_10 figure_11 --out out",
    "data index --data shards", "data index --data shards --out out --force",
    DVAE.replace("--data pairs", "--data shards"),
    PRIOR.replace("--data pairs", "--data table.csv"),
    "tokenizer train --data shards=0.7 --data table.csv=0.3 --out out",
    "pipeline make --tokenizer tok --vae pipe/vae --prior pipe/prior --out out",
]  # fmt: skip
DEMO = "demo --data shapes --preset smoke --out demo"
INTERNAL = re.compile(
    r"\b[A-Z]\w+(Error|Exception|Warning)\b|Traceback|panicked|a fault of dalle|"
    r"has no attribute|unsupported operand|not supported between|"
    r"(?:takes|missing) .*positional argument|"
    r"subscriptable|indices must be|NoneType|codec can't|object is not|unhashable|enforce fail|"
    r"invalid literal|could not convert|sys\.|bad_alloc|out of range$|Errno|__\w+__|0x[0-9a-f]{8}"
)


class Hang(BaseException):
    """A case took longer than `SLOWEST`."""


class Broken(io.RawIOBase):
    """A file whose writes fail."""

    def __init__(self, number: int) -> None:
        self.number = number

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        raise OSError(self.number, os.strerror(self.number))


def make_odd(home: Path) -> None:
    """Things that lie about in folders: pipes, sockets, loops, names of every kind."""
    os.mkfifo(home / "pipe.fifo")
    (home / "loop").symlink_to("loop")
    (home / "dangling").symlink_to("nowhere")
    (home / "options.yaml").write_text("seed: 3\n")
    folder = home / "odd"
    folder.mkdir()
    for name in ("a", "caf\udce9", "\u00e9\u5706", "two\nlines", "\x1b[2J", "\u202egnp", "b c"):
        shutil.copy(home / "pairs/0.png", folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{name}\n", encoding="utf-8", errors="replace")
    scales = home / "scales"
    scales.mkdir()
    names = ("block_scale", "block_underflow", "block_subnormal", "block_overflow")
    record = {name: [1.0, 2.0] for name in names} | {"block_exponents": [[0.5] * 80] * 2}
    rows = [json.dumps({"step": step, **record}) for step in (1, 2, 3)]
    (scales / "metrics.jsonl").write_text("\n".join(rows))
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "a2.txt")
    shutil.copy(home / "pairs/0.png", folder / "a2.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "up").symlink_to("..")


def build_home(root: Path, demo: bool = False) -> Path:
    """Everything a case may read; copied for each. With `demo` a finished demo as well."""
    home = root / "home"
    home.mkdir()
    make_home(home)
    make_odd(home)
    with contextlib.chdir(home):
        lines = [DVAE.replace("--out out", "--out run-dvae --log-every 1")]
        lines += [PRIOR.replace("--out out", "--out run-prior --log-every 1")]
        lines += [SAMPLE.replace("--out out", "--out drawn")]
        lines += [EDIT.replace("--out out", "--out edited")]
        for line in lines + [DEMO] * demo:
            said = io.StringIO()
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                code = main(line.split())
            assert code == 0, said.getvalue()
    return home


def copy_home(home: Path, to: Path) -> None:
    def link(source: str, target: str) -> None:
        if stat.S_ISFIFO(os.lstat(source).st_mode):
            os.mkfifo(target)
        else:
            os.link(source, target)

    shutil.copytree(home, to, symlinks=True, copy_function=link)
    with contextlib.suppress(OSError), contextlib.chdir(to), socket.socket(socket.AF_UNIX) as made:
        made.bind("sock")


def streams(rng: random.Random) -> tuple[str, io.TextIOWrapper | None, io.TextIOWrapper | None]:
    """stdout and stderr of a case: mostly whole, else full, closed, missing, or of poor letters."""
    kind = rng.choice(["whole"] * 8 + ["full", "gone", "none", "ascii", "latin-1"])
    if kind == "none":
        return kind, None, None
    if kind in ("full", "gone"):
        raw = Broken(errno.ENOSPC if kind == "full" else errno.EPIPE)
        broken = io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", write_through=True)
        return kind, broken, io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    encoding = {"ascii": "ascii", "latin-1": "latin-1"}.get(kind, "utf-8")
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n") for _ in "ab")
    return kind, out, err


def heard(stream: io.TextIOWrapper | None) -> str:
    if stream is None or not isinstance(stream.buffer, io.BytesIO):
        return ""
    stream.flush()
    return stream.buffer.getvalue().decode(stream.encoding)


def run_case(home: Path, root: Path, seed: int, number: int) -> tuple[str, list[str], str]:
    """One case: what was done, the faults found, and what was said."""
    rng = random.Random(f"{seed}/{number}")
    folder = root / "case"
    shutil.rmtree(folder, ignore_errors=True)
    copy_home(home, folder)
    words = rng.choice(LINES + [DEMO] * 4 * (home / "demo").exists()).split()
    damaged, chance = "", rng.random()
    if chance < 0.45:
        damaged = damage_file(words, folder, rng)
    elif chance < 0.55:
        damaged = damage_out(folder, rng)
    if not damaged or rng.random() < 0.1:
        damage_words(words, rng)
    kind, out, err = streams(rng)
    what = f"{words!r} [{damaged or 'words'}] [{kind}]"
    before = sys.stdout, sys.stderr
    begin, code, faults = time.monotonic(), -1, []
    sys.stdout, sys.stderr = out, err
    try:
        with contextlib.chdir(folder), watched():
            try:
                code = main(words)
            except SystemExit as stop:
                code = stop.code
    except BaseException as problem:
        faults.append(f"{type(problem).__name__} left main: {problem}")
    finally:
        sys.stdout, sys.stderr = before
    seconds = time.monotonic() - begin
    said, told = heard(err), heard(out)
    faults += check(code, said, told, kind, seconds)
    left = [p for p in folder.rglob("*.tmp-*") if not p.name.endswith("-00000000")]  # put there
    faults += [f"left over: {p}" for p in left]
    if not stat.S_ISCHR(os.stat(os.devnull).st_mode):
        faults.append("/dev/null is no device any more")
    return what, faults, f"rc {code}, {seconds:.1f} s\n{told}{said}"


def check(code: object, said: str, told: str, kind: str, seconds: float) -> list[str]:
    """What is wrong with a case's end."""
    faults = []
    if code not in CODES:
        faults.append(f"exit code {code}")
    if seconds > SLOWEST:
        faults.append(f"{seconds:.0f} seconds")
    if code and not said.strip() and kind in ("whole", "ascii", "latin-1"):
        faults.append("failed without a word")
    found = INTERNAL.search(said) or INTERNAL.search(told)
    if found:
        faults.append(f"words of the inside: {found[0]}")
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]", said + told):
        faults.append("control characters")
    return faults


def on_alarm(*_: object) -> None:
    raise Hang(f"no end after {SLOWEST} s")


@contextlib.contextmanager
def watched():
    """Ends what takes longer than `SLOWEST`; pytest's own timeout needs the alarm clock."""
    main_thread = threading.main_thread().ident
    watch = threading.Timer(SLOWEST, lambda: signal.pthread_kill(main_thread, signal.SIGUSR1))
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


@contextlib.contextmanager
def limits():
    """Too little memory for what is absurd, and an alarm for what never ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    before = signal.signal(signal.SIGUSR1, on_alarm)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def fuzz(root: Path, *, seconds: float, seed: int, demo: bool = False):
    """Runs cases until the time is up; returns how many, the faults, and the exit codes seen."""
    home = build_home(root, demo)
    end, number = time.monotonic() + seconds, 0
    faults, codes = [], Counter()
    with limits():
        while time.monotonic() < end:
            what, found, said = run_case(home, root, seed, number)
            codes[said.split(",", 1)[0]] += 1
            if found:
                faults.append(f"--seed {seed} --only {number}: {what}\n  {found}\n{said}")
            number += 1
    return number, faults, codes


def command_line() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--demo", action="store_true", help="also on a finished demo; slower")
    parser.add_argument("--only", type=int, nargs="*")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if given.only:
            home = build_home(root, given.demo)
            with limits():
                for number in given.only:
                    what, faults, said = run_case(home, root, given.seed, number)
                    print(ascii(what)[:1500], faults, ascii(said[:3000]), sep="\n")
            return 0
        count, faults, codes = fuzz(root, seconds=given.seconds, seed=given.seed, demo=given.demo)
    for fault in faults:
        print(fault.encode("utf-8", "backslashreplace").decode()[:2500], end="\n\n")
    print(f"fuzz_cli: seed {given.seed}, {count} cases, {len(faults)} faults, {dict(codes)}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(command_line())
