"""What nvcc makes of every kernel, beside its budget: `python python/buildtools/kernel_report.py`.

Compiles each `csrc/<op>/<op>_cuda.cu` for every architecture of a build (`torch_dir.py`), warnings
being errors, and prints one row a kernel: registers, shared memory, the opcodes that matter. It
fails where a kernel spills, uses local memory, exceeds its registers, lacks an opcode that
`csrc/<op>/<op>_cuda_budget.txt` promises, or has no row there. A row is for one architecture: a
kernel that is compiled for another needs another row. Last come predicted floors of the kernels'
times at the sizes of the benchmarks (`kernel_floors.py`).

A build that has kept its cubins and its log is not repeated (`.ci/run`):
`CUDAFLAGS="-Xptxas=-v --keep --keep-dir=DIR" pip wheel -v ... > LOG`, then `--kept DIR --log LOG`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import kernel_code  # noqa: E402
import kernel_floors  # noqa: E402
import kernel_sizes  # noqa: E402
import torch_dir  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = tuple(f"sm_{architecture}" for architecture in torch_dir.ARCHITECTURES)
LOCAL_MEMORY = ("!LDL", "!STL")
SHOWN = ("HMMA", "LDSM", "LDGSTS", "MUFU", "FFMA", "DFMA", "BAR", "SHFL", "ATOM", "RED")


@dataclass
class Kernel:
    """One kernel of one architecture."""

    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    opcodes: Counter[str] | None = None  # None where there is no disassembler
    code: kernel_code.Code = field(default_factory=list, compare=False, repr=False)


@dataclass(frozen=True)
class Budget:
    """A row of a budget file: for kernels whose name starts with `prefix`."""

    prefix: str
    registers: int
    opcodes: tuple[str, ...] = field(default=())


def parse_ptxas(text: str, architecture: str) -> dict[str, Kernel]:
    """Kernels of `architecture` by mangled name from the output of `ptxas -v`."""
    kernels: dict[str, Kernel] = {}
    current = Kernel()
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            current = Kernel()
            if match[2] == architecture:
                kernels[match[1]] = current
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line):
            current.stack, current.spills = int(match[1]), int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            current.registers = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            current.shared = int(shared[1]) if shared else 0
    return kernels


def parse_machine_code(text: str) -> dict[str, Counter[str]]:
    """Opcodes (up to the first dot) by mangled kernel name, from `nvdisasm -c`."""
    kernels: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in text.splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            current = kernels[match[1]] = Counter()
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", line):
            current[match[1]] += 1
    return kernels


def demangle(names: list[str]) -> dict[str, str]:
    """Short readable names: `dalle::f<float, 2>(int)` is `f<float, 2>`."""
    done = subprocess.run(
        ["c++filt", *names], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    short = [re.sub(r"^void ", "", name) for name in done]
    short = [re.sub(r"\((?!.*>)[^()]*\)$|(?<=>)\([^()]*\)$", "", name) for name in short]
    return dict(zip(names, (re.sub(r"\b(\w+::)+", "", name) for name in short), strict=True))


def read_budgets(path: Path, architecture: str | None = None) -> list[Budget]:
    """Rows of `kernel prefix | architecture | registers | opcodes`, of one architecture or of all.

    `!X` is an opcode that must not be there.
    """
    budgets = []
    for line in path.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            prefix, row_of, registers, opcodes = (part.strip() for part in line.split("|"))
            if architecture in (None, row_of):
                budgets.append(Budget(prefix, int(registers), tuple(opcodes.split())))
    return budgets


def problems(name: str, kernel: Kernel, budgets: list[Budget]) -> list[str]:
    """What is wrong with a kernel, one line each."""
    fitting = [b for b in budgets if name.startswith(b.prefix)]
    if not fitting:
        return [f"{name}: budget must have a row for it, got none"]
    budget = max(fitting, key=lambda b: len(b.prefix))
    found = []
    if kernel.registers > budget.registers:
        found.append(
            f"{name}: registers must be at most {budget.registers}, got {kernel.registers}"
        )
    if kernel.spills or kernel.stack:
        found.append(
            f"{name}: spills and stack must be 0 bytes, got {kernel.spills} and {kernel.stack}"
        )
    if kernel.opcodes is not None:
        for claim in LOCAL_MEMORY + budget.opcodes:
            opcode = claim.removeprefix("!")
            count = kernel.opcodes[opcode]
            if claim != opcode and count:
                found.append(f"{name}: {opcode} must be absent, got {count}")
            elif claim == opcode and not count:
                found.append(f"{name}: {opcode} must be in the machine code, got none")
    return found


def find_disassembler() -> str | None:
    """The toolkit's nvdisasm, or that of the wheel nvidia-cuda-nvdisasm."""
    wheel = Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin/nvdisasm"
    return shutil.which("nvdisasm") or (str(wheel) if wheel.exists() else None)


def kernels_of(
    cubin: Path, ptxas: dict[str, Kernel], disassembler: str | None
) -> dict[str, Kernel]:
    """Kernels of a cubin by readable name, with their opcodes where there is a disassembler."""
    run = [disassembler or "", "-c", str(cubin)]
    text = subprocess.run(run, capture_output=True, text=True, check=True).stdout if run[0] else ""
    kernels = {}
    codes = kernel_code.parse_code(text)
    for name, opcodes in parse_machine_code(text).items():
        if name in ptxas:
            kernels[name] = ptxas[name]
            kernels[name].opcodes, kernels[name].code = opcodes, codes[name]
    kernels = kernels if disassembler else ptxas
    names = demangle(list(kernels)) if kernels else {}
    return {names[mangled]: kernel for mangled, kernel in kernels.items()}


def same_bits_ops() -> list[str]:
    """Ops that CMakeLists.txt compiles without fused products."""
    found = re.search(r"set\(same_bits_ops ([\w ]+)\)", (ROOT / "CMakeLists.txt").read_text())
    assert found is not None
    return found[1].split()


def compile_kernels(
    source: Path, architecture: str, nvcc: str, disassembler: str | None
) -> dict[str, Kernel]:
    """Kernels of `source` by readable name.

    Raises:
        RuntimeError: where it does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [nvcc, "-std=c++20", "-cubin", f"-arch={architecture}", "-Xptxas", "-v"]
        if source.parent.name in same_bits_ops():
            command.append("-fmad=false")
        command += ["--expt-relaxed-constexpr", "-Werror=all-warnings", f"-I{ROOT / 'csrc'}"]
        if torch := torch_dir.find_torch():
            command += ["-isystem", str(torch / "include")]
        command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"kernel_report: {source} must compile, got\n{done.stderr}")
        return kernels_of(cubin, parse_ptxas(done.stderr, architecture), disassembler)


def kept_kernels(
    source: Path, architecture: str, kept: Path, log: str, disassembler: str | None
) -> dict[str, Kernel]:
    """Kernels of `source` by readable name, as a build that kept its files has compiled them.

    Raises:
        RuntimeError: where the build has not kept them.
    """
    cubin = kept / f"{source.stem}.compute_{architecture.removeprefix('sm_')}.cubin"
    if not cubin.exists() or disassembler is None:
        missing = "nvdisasm must be installed" if cubin.exists() else f"{cubin} must be there"
        raise RuntimeError(f"kernel_report: {missing} to read what a build kept, got none")
    return kernels_of(cubin, parse_ptxas(log, architecture), disassembler)


def report(
    sources: list[Path],
    read: Callable[[Path, str], dict[str, Kernel]],
    architectures: Sequence[str] = ARCHITECTURES,
) -> list[str]:
    """Prints the table of what `read` finds for a source and an architecture; returns problems."""
    found, floors = [], []
    pairs = [(source, architecture) for source in sources for architecture in architectures]
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        everything = pool.map(lambda pair: read(*pair), pairs)
        for (source, architecture), kernels in zip(pairs, everything, strict=True):
            budgets = read_budgets(source.with_name(source.stem + "_budget.txt"), architecture)
            if not kernels:
                found.append(f"{architecture}: {source.name} must hold kernels, got none")
            for name, kernel in sorted(kernels.items()):
                opcodes = kernel.opcodes or Counter()
                counts = " ".join(f"{o} {opcodes[o]}" for o in SHOWN if opcodes[o])
                print(
                    f"{architecture:7} {name:64} {kernel.registers:4} registers"
                    f" {kernel.shared:6} B shared  {counts}"
                )
                found += [f"{architecture}: {line}" for line in problems(name, kernel, budgets)]
            codes = {name: kernel.code for name, kernel in kernels.items() if kernel.code}
            if codes:
                op = source.parent.name
                if op not in kernel_sizes.SIZES:
                    found.append(f"kernel_sizes: SIZES must have {op}, got none of that name")
                cases = kernel_sizes.SIZES.get(op, tuple)()
                lines, wrong = kernel_floors.table(codes, architecture, cases)
                floors += lines
                found += [f"{architecture}: {line}" for line in wrong]
    if floors:
        print("\nLeast microseconds of each unit of a card, predicted; the largest has a star")
        print("\n".join(sorted(floors, key=lambda line: line.split()[1:2])))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ops", nargs="*", help="folders of csrc/; all of them if left out")
    parser.add_argument("--architecture", choices=ARCHITECTURES, help="that one alone")
    parser.add_argument("--kept", type=Path, help="cubins that a build kept, with --log")
    parser.add_argument("--log", type=Path, help="output of that build, ptxas -v in it")
    wish = parser.parse_args()
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not wish.kept and not shutil.which(nvcc):
        raise SystemExit("kernel_report: nvcc must be on PATH, got none")
    disassembler = find_disassembler()
    if disassembler is None:
        print("no opcodes: nvdisasm is missing; type: pip install nvidia-cuda-nvdisasm")
    sources = sorted(ROOT.glob("csrc/*/*_cuda.cu"))
    sources = [s for s in sources if not wish.ops or s.parent.name in wish.ops]
    wanted = (wish.architecture,) if wish.architecture else ARCHITECTURES
    if wish.kept:
        log = wish.log.read_text()
        kept = lambda s, a: kept_kernels(s, a, wish.kept, log, disassembler)  # noqa: E731
        found = report(sources, kept, wanted)
    else:
        found = report(sources, lambda s, a: compile_kernels(s, a, nvcc, disassembler), wanted)
    print("\n".join(found) if found else "every kernel is within its budget")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
