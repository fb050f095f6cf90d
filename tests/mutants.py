"""Planted faults, each of one place, that the gate's own tests must catch: R33.

    python tests/mutants.py [words]     all of them, or those whose name holds one of the words

The tracked files are copied aside and built once. Then, one at a time, a fault is put in, what it
touches is built again, and the test files that guard the place run as the gate runs them (no case
marked `night`). A fault whose tests still pass is printed as MISSED and ends the script with 1, and
so do tests that fail without any fault. It takes about half an hour; `.ci/night` calls it, and
`tests/test_mutants.py` only looks whether each fault can still be put in.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutant:
    """`old`, found once in `file`, becomes `new`; `tests` are words for pytest.

    `build`: None (Python), "cpu" (setup.py build_ext), or a build of the emulator, "plain" or
    "race", in which the tests then run.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    build: str | None = None


ATTENTION = "csrc/sparse_attention/sparse_attention"
DECODE = "csrc/decode_attention/decode_attention"
MUTANTS = [
    # -- rules that every back end shares ------------------------------------------------------
    Mutant(
        "row attention forgets its oldest key",
        f"{ATTENTION}.h",
        "return offset <= rule.columns;",
        "return offset < rule.columns;",
        "tests/ops/test_sparse_attention.py -m cpu_only",
        "cpu",
    ),
    Mutant(
        "codes do not saturate",
        "csrc/formats/formats.h",
        "((above < range ? above : range) + added)",
        "(above + added)",
        "tests/ops/test_formats.py -m cpu_only",
        "cpu",
    ),
    Mutant(
        "a part of a batch draws the noise of the first rows",
        "csrc/gumbel_softmax/gumbel_softmax.h",
        "static_cast<uint64_t>((p.first_row + row) * p.num_codes)",
        "static_cast<uint64_t>(row * p.num_codes)",
        "tests/ops/test_gumbel_softmax.py -m cpu_only",
        "cpu",
    ),
    Mutant(
        "Adam corrects the variance by beta1",
        "csrc/adam16/adam16.h",
        "correction2 = 1.0 - power(args.beta2, t)",
        "correction2 = 1.0 - power(args.beta1, t)",
        "tests/ops/test_adam16.py -m cpu_only",
        "cpu",
    ),
    Mutant(
        "a skipped step is not skipped",
        "csrc/adam16/adam16.h",
        "return args.skip != nullptr && *args.skip != 0.0f;",
        "return args.skip != nullptr && *args.skip < 0.0f;",
        "tests/ops/test_adam16.py -m cpu_only",
        "cpu",
    ),
    Mutant(
        "a scale may fall one update late",
        "csrc/grad_scale/grad_scale.h",
        "falls = bad && since >= args.window",
        "falls = bad && since > args.window",
        "tests/ops/test_grad_scale.py -m cpu_only",
        "cpu",
    ),
    Mutant(
        "a ring of a row forgets its oldest slot early",
        "csrc/decode_attention/decode_attention.h",
        "return {0, slot + 1 < capacity ? slot + 1 : capacity};",
        "return {0, slot < capacity ? slot + 1 : capacity - 1};",
        "tests/ops/test_decode_attention.py -m cpu_only",
        "cpu",
    ),
    # -- CPU kernels ---------------------------------------------------------------------------
    Mutant(
        "the image of a sample does not rescale its text",
        "csrc/decode_attention/decode_attention_cpu_space.h",
        "(*text.l * of_text + *image.l * of_image)",
        "(*text.l + *image.l * of_image)",
        "tests/ops/test_decode_attention.py -m cpu_only",
        "cpu",
    ),
    Mutant(
        "a decoding layer lacks the identity path of its attention",
        "csrc/decode_layers/decode_layers.h",
        "out.residual = x, out.out",
        "out.residual = nullptr, out.out",
        "tests/ops/test_decode_layers.py -m cpu_only",
        "cpu",
    ),
    Mutant(
        "the softmax gradient lacks delta",
        f"{ATTENTION}_cpu_backward.h",
        "(load(space.ds + at) - delta)",
        "load(space.ds + at)",
        "tests/ops/test_sparse_attention.py -m cpu_only",
        "cpu",
    ),
    Mutant(
        "area_resize without aligned corners",
        "csrc/host/area_resize.h",
        "static_cast<double>(in_size - 1) / (out_size - 1)",
        "static_cast<double>(in_size) / out_size",
        "tests/test_images.py",
        "cpu",
    ),
    Mutant(
        "the error buffer keeps what was sent",
        "csrc/powersgd/powersgd_cpu.h",
        "decoded(m.error + at + j, some) - sum * f.feedback;",
        "decoded(m.error + at + j, some);",
        "tests/ops/test_powersgd.py -m cpu_only",
        "cpu",
    ),
    # -- CUDA kernels, emulated ----------------------------------------------------------------
    Mutant(
        "the online softmax does not rescale its sum",
        f"{ATTENTION}_cuda_forward.cuh",
        "l[i] *= rescale;",
        "",
        "tests/ops/test_sparse_attention_cuda.py -m emulated",
        "plain",
    ),
    Mutant(
        "the Gumbel gradient adds what it must subtract",
        "csrc/gumbel_softmax/gumbel_softmax_cuda_backward.cuh",
        "g[i] = -dot * x[i] + g[i];",
        "g[i] = dot * x[i] + g[i];",
        "tests/ops/test_gumbel_softmax_cuda.py -m emulated",
        "plain",
    ),
    Mutant(
        "tiles are read before all threads have filled them",
        f"{ATTENTION}_cuda_walk.cuh",
        "__syncthreads();  // the tile is there for all, and all have left the other slot",
        "",
        "tests/ops/test_sparse_attention_cuda.py -m emulated",
        "race",
    ),
    Mutant(
        "warps add parts that are not there yet",
        "csrc/gumbel_softmax/gumbel_softmax_cuda_row.cuh",
        "__syncthreads();\n    value = identity;",
        "value = identity;",
        "tests/ops/test_gumbel_softmax_cuda.py -m emulated",
        "race",
    ),
    Mutant(
        "a slab is written over while it is read",
        "csrc/powersgd/powersgd_cuda_products.cuh",
        "__syncthreads();  // its words are stored; its buffer is free",
        "",
        "tests/ops/test_powersgd_products.py -m emulated",
        "race",
    ),
    Mutant(
        "the rows of a tile are written over while they are added up",
        f"{DECODE}_cuda.cuh",
        "__syncthreads();  // all have read the rows and the tile",
        "",
        "tests/ops/test_decode_attention_cuda.py -m emulated",
        "race",
    ),
    Mutant(
        "chunks of the text are added up as if all had the same maximum",
        f"{DECODE}_cuda_chunk.cuh",
        "weight_of<scalar_t>(last.x - shift)",
        "weight_of<scalar_t>(0.0f)",
        "tests/ops/test_decode_attention_cuda.py -m emulated",
        "plain",
    ),
    # -- the trainer ---------------------------------------------------------------------------
    Mutant(
        "gradients are clipped when they are small",
        "python/dalle/train/update.py",
        "if clip_norm is not None and norm > clip_norm:",
        "if clip_norm is not None and norm < clip_norm:",
        "tests/system/test_loop.py tests/system/test_train_prior.py",
    ),
    Mutant(
        "a resumed run begins at step 0",
        "python/dalle/train/loop.py",
        "step = resume(task, config)",
        "step = resume(task, config) * 0",
        "tests/system/test_resume.py",
    ),
    Mutant(
        "the warm-up begins with a step size of 0",
        "python/dalle/train/schedules.py",
        "return peak * (step + 1) / steps",
        "return peak * step / steps",
        "tests/system/test_schedules.py",
    ),
    Mutant(
        "the averaged weights hardly follow",
        "python/dalle/train/averaging.py",
        "parameter.detach().float(), 1 - decay)",
        "parameter.detach().float(), (1 - decay) / 2)",
        "tests/system/test_averaging.py",
    ),
    Mutant(
        "guidance points away from the caption",
        "python/dalle/prior/decode.py",
        "logits = base + self.cond_scale * (logits - base)",
        "logits = base - self.cond_scale * (logits - base)",
        "tests/system/test_decode.py",
    ),
    Mutant(
        "a file gets its name before it is on the disk",
        "python/dalle/files.py",
        "        os.fsync(file.fileno())",
        "        file.fileno()",
        "tests/system/test_checkpoint.py tests/system/test_pretrained.py",
    ),
]
# Test words stay short: this one stands for the back end that needs no other build.
WORDS = {"cpu_only": "not emulated and not cuda"}


def problem_of(mutant: Mutant, root: Path) -> str | None:
    """Why `mutant` cannot be put into the tree at `root`, or None."""
    count = (root / mutant.file).read_text().count(mutant.old) if mutant.old else 0
    return None if count == 1 else f"{mutant.file} must hold {mutant.old!r} once, got {count}"


def run(command: list[str], root: Path, **variables: str) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'python'}", **variables}
    environment.pop("DALLE_TEST_NIGHT", None)
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def build(root: Path) -> None:
    code, text = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], root)
    if code:
        raise SystemExit(f"mutants: the copy must build, got\n{text[-3000:]}")


def tests_of(mutant: Mutant, root: Path) -> tuple[int, str]:
    """Exit status and output of the tests that guard a place, as the gate runs them."""
    words = [WORDS.get(word, word) for word in mutant.tests.split()]
    variables = {"DALLE_TEST_EMULATED": mutant.build} if mutant.build in ("plain", "race") else {}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *words]
    return run(command, root, DALLE_TEST_CACHE=str(root / "cache"), **variables)


def main() -> int:
    chosen = [m for m in MUTANTS if not sys.argv[1:] or any(w in m.name for w in sys.argv[1:])]
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
        )
        for name in filter(None, listed.stdout.decode().split("\0")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
        build(root)
        clean: dict[tuple[str, str | None], int] = {}
        for mutant in chosen:
            begin, key = time.monotonic(), (mutant.tests, mutant.build)
            if key not in clean:
                clean[key], text = tests_of(mutant, root)
                if clean[key]:
                    print(f"BROKEN  without a fault, {mutant.tests}:\n{text[-2000:]}", flush=True)
            path = root / mutant.file
            original = path.read_text()
            if problem := problem_of(mutant, root):
                code, text = 0, problem
            else:
                path.write_text(original.replace(mutant.old, mutant.new))
                if mutant.build == "cpu":
                    build(root)
                code, text = tests_of(mutant, root)
                path.write_text(original)
                if mutant.build == "cpu":
                    build(root)
            failed = re.search(r"^(?:FAILED|ERROR) (\S+)", text, re.M)
            caught = code == 1 and failed is not None and clean[key] == 0
            missed += not caught
            by = failed[1] if failed and caught else text[-300:].replace("\n", " ")
            verdict = "caught" if caught else "MISSED"
            print(f"{verdict}  {mutant.name}  ({time.monotonic() - begin:.0f} s)  {by}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} planted faults caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
