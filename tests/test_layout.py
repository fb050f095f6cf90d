"""The source tree: every operator has all its files, imports point one way, files stay small."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_ROOMS = {"common", "emulator", "host"}
# On a GPU a step is one graph of the library's products and decode attention.
CPU_ONLY = {"decode_layers", "packed_linear"}
MADE_OF_OTHERS = {"decode_layers"}  # whose kernels are those of the ops in it
OPS = sorted(
    folder.name
    for folder in (ROOT / "csrc").iterdir()
    if folder.is_dir() and folder.name not in NOT_ROOMS
)
BUDGETS = [  # (glob, lines)
    ("csrc/**/*.cuh", 400),
    ("csrc/**/*.hpp", 200),
    ("csrc/**/*.cpp", 200),
    ("csrc/**/*.h", 400),
    ("csrc/**/*.cu", 200),
    ("dalle_ext/ops/*.py", 200),
    ("dalle_ext/reference/*.py", 100),
    ("python/dalle/**/*.py", 400),
    ("tests/**/*.py", 400),
    ("tests/**/*.cu", 400),
    ("benchmarks/*.py", 400),
    ("benchmarks/bench_*.py", 200),
    ("setup.py", 120),
]
LONGER = {  # files that are one topic and longer than their kind: lines, and what they hold
    "python/dalle/pipeline.py": 480,  # one class with its folder: checks, drawing, choosing
    "python/dalle/options.py": 430,  # one walk: words, files, lists, how numbers are spelt
    "dalle_ext/ops/adam16.py": 300,  # the optimizer, its checks, its groups
    "dalle_ext/ops/decode_attention.py": 300,  # the cache and the op
    "dalle_ext/ops/decode_layers.py": 225,  # a layer, the stack, and its checks
    "dalle_ext/ops/grad_scale.py": 300,  # five public functions and their two results
    "dalle_ext/ops/powersgd.py": 280,  # four public functions that share their checks
    "dalle_ext/ops/sparse_attention.py": 490,  # the pattern, its masks and costs; two ops
    "python/dalle/train/dvae.py": 560,  # one task: its recipe, warm start, codebooks and scores
    "tests/test_layout.py": 440,  # the rules of the tree
    "python/dalle/commands/dvae.py": 470,  # train and reconstruct
    "python/dalle/train/prior.py": 480,  # one task: its batches, losses, samples and scores
    "python/dalle/train/ranker.py": 495,  # one task: its batches, splices, losses and scores
    "python/dalle/distributed/cluster.py": 430,  # one world: its exchanges, problems and models
    "python/dalle/distributed/hooks.py": 420,  # one class, on FSDP2 and on DDP
    "python/dalle/distributed/powersgd.py": 445,  # one algorithm, its agreement and its state
    "benchmarks/bench_decode_attention.py": 240,  # one step, and three rivals as they would do it
    "benchmarks/bench_sampling.py": 230,  # five comparisons, with the sampler of old as a rival
    "benchmarks/bench_sparse_attention.py": 300,  # rivals, sizes, layouts and goals on CPU and GPU
    "dalle_ext/reference/adam16.py": 110,  # one rule with its random words and roundings
}
HEAD_OF_TESTS = """# What each test file proves

Generated from the first sentence of each file by `python tests/test_layout.py`.
[reliability](reliability.md) lists the numbers that must hold. Cases marked `night` are slow
variants of quicker ones and run in `.ci/night`.

| file | what it proves |
|---|---|
"""
CITATION = re.compile(r"([\w./]+\.\w+):(\w+)")  # path:name, as docs/paper.md cites code
# Files and packages of python/dalle from the ground up; each imports of its own floor and below.
GROUND = "errors version configs console files devices memory optional pages pictures masks"
GROUND += " captions dtensor pretrained config_files"
FLOORS = (
    set(GROUND.split()),
    {"precision", "tokenizer"},
    {"dvae", "prior", "ranker", "plan"},
    {"candidates", "editing", "pipeline", "data", "distributed"},
    {"train", "recipes", "evaluate"},
    {"commands", "demo", "reproduce", "serve", "cli", "options", "env", "__main__"},
)
TORCH_INCLUDE = re.compile(r"#\s*include\s*[<\"](torch|ATen|c10)/")


def imported(path: Path) -> set[str]:
    """Top-level packages a Python file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


def imported_modules(module: str, path: Path, known: set[str]) -> set[str]:
    """Modules of `known` that a file imports, anywhere in it, types included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in names}
    return (found & known) - {module}


def modules_of(folder: Path) -> dict[str, Path]:
    """Dotted name -> file, of a folder that is on Python's path."""
    named = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """Modules that are left when those that import nothing left are taken away, again and again."""
    left = {module: set(targets) for module, targets in arrows.items()}
    while free := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in free:
            del left[module]
    return sorted(left)


def test_no_import_circle():
    files = modules_of(ROOT / "python")
    arrows = {m: imported_modules(m, path, set(files)) for m, path in files.items()}
    assert sum(map(len, arrows.values())) > 300 and circles(arrows) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def floor_of(module: str) -> int | None:
    """Where a module of `dalle` stands in FLOORS; None for the package itself."""
    parts = module.split(".")
    if len(parts) == 1:
        return None
    return next(i for i, names in enumerate(FLOORS) if parts[1] in names)


def test_arrows_between_packages_go_down():
    files = modules_of(ROOT / "python")
    upward = []
    for module, path in files.items():
        own = floor_of(module) if module.startswith("dalle.") else None
        for target in imported_modules(module, path, set(files)):
            there = floor_of(target) if target.startswith("dalle.") else None
            if own is not None and there is not None and there > own:
                upward.append(f"{module} imports {target}")
    assert upward == []


def test_no_test_module_is_imported_and_no_path_is_changed():
    """What tests share stands in tests/support, which pytest's settings put on the path."""
    for path in (ROOT / "tests").rglob("*.py"):
        where = path.relative_to(ROOT)
        assert not {n for n in imported(path) if n.startswith(("test_", "conftest"))}, where
        assert path.name == "test_layout.py" or "sys.path" not in path.read_text(), where


def test_there_are_ops():
    assert {"sparse_attention", "gumbel_softmax"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_op_has_all_its_files(op):
    pieces = [
        f"csrc/{op}/{op}.h",
        f"csrc/{op}/{op}.hpp",
        f"csrc/{op}/{op}.cpp",
        f"csrc/{op}/{op}_cpu.h",
        f"csrc/{op}/{op}_cuda.cu",
        f"csrc/{op}/{op}_cuda.cuh",
        f"csrc/{op}/{op}_cuda_budget.txt",
        f"dalle_ext/ops/{op}.py",
        f"dalle_ext/reference/{op}.py",
        f"tests/ops/test_{op}.py",
        f"benchmarks/bench_{op}.py",
    ]
    if op in CPU_ONLY:
        gpu = {piece for piece in pieces if "_cuda" in piece}
        pieces = [piece for piece in pieces if piece not in gpu]
        assert not any((ROOT / piece).exists() for piece in gpu)
    if op in MADE_OF_OTHERS:
        pieces.remove(f"csrc/{op}/{op}_cpu.h")
    assert [piece for piece in pieces if not (ROOT / piece).exists()] == []


@pytest.mark.parametrize("op", OPS)
def test_folder_of_an_op_holds_nothing_else(op):
    strangers = [p.name for p in (ROOT / "csrc" / op).iterdir() if not p.name.startswith(op)]
    assert strangers == []


@pytest.mark.parametrize("folder", ["dalle_ext/ops", "dalle_ext/reference"])
def test_every_op_is_one_file(folder):
    files = {path.stem for path in (ROOT / folder).glob("*.py")}
    assert files == {"__init__", *OPS}


def exported(init: str, op: str) -> set[str]:
    """What `dalle_ext/__init__.py` takes from an op's module."""
    nodes = [node for node in ast.walk(ast.parse(init)) if isinstance(node, ast.ImportFrom)]
    taken = [node for node in nodes if node.module == f"dalle_ext.ops.{op}"]
    return {alias.name for node in taken for alias in node.names}


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_exported_and_in_the_table_of_operators(op):
    init = (ROOT / "dalle_ext/__init__.py").read_text()
    table = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/ops.md").read_text(), re.M)
    documented = set(re.findall(r"`(\w+)`", " ".join(table)))
    functions = {name for name in exported(init, op) if name.islower()}
    assert exported(init, op) & documented and functions <= documented
    assert exported(init, op) <= set(re.findall(r'^    "(\w+)",$', init, re.M)), "__all__"


def test_no_torch_in_kernel_headers_or_host_module():
    headers = [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cuh"), *ROOT.glob("csrc/host/*")]
    assert headers
    for path in headers:
        assert not TORCH_INCLUDE.search(path.read_text()), f"{path.relative_to(ROOT)}"


def test_cpu_kernels_build_and_are_tested_on_any_processor():
    """Intrinsics stand where their portable twins are; each kernel is in `tests/cpp/kernels`."""
    twins = ("common/vector_intrinsics.h", "common/philox_lanes.h", "common/pairs.h")
    intrinsic = re.compile(r"\b_mm\d*_\w+\(|# *include <(immintrin|arm_neon)")
    found = [p for p in ROOT.glob("csrc/*/*.h") if intrinsic.search(p.read_text())]
    assert {str(p.relative_to(ROOT / "csrc")) for p in found} == {*twins}
    tested = "".join(p.read_text() for p in ROOT.glob("tests/cpp/kernels/*.cpp"))
    kernels = [p.stem for p in ROOT.glob("csrc/*/*_cpu.h")]
    assert kernels and [k for k in kernels if f"({k})" not in tested] == []


def comment_above(lines: list[str], at: int) -> str:
    """The comment right above line `at`, or above the template that begins there."""
    while at > 0 and not re.match(r"(//|})", lines[at - 1]) and lines[at - 1]:
        at -= 1
    first = at
    while first > 0 and lines[first - 1].startswith("//"):
        first -= 1
    return " ".join(line.removeprefix("//").strip() for line in lines[first:at])


def test_every_kernel_says_what_a_thread_does():
    """And every launch says what becomes of the shapes: `x (N) -> a block each -> y (N)`."""
    silent, kernels, launches = [], 0, 0
    for path in ROOT.glob("csrc/*/*.cuh"):
        lines = path.read_text().splitlines()
        for at, line in enumerate(lines):
            kernel = line.startswith("__global__")
            launch = re.match(
                rf"(inline )?cudaError_t launch_({path.parent.name}|exact)\w*\(", line
            )
            if not kernel and not launch:
                continue
            kernels, launches = kernels + kernel, launches + (launch is not None)
            wanted = r"\b([Tt]hread|[Ww]arp|lane)\b" if kernel else r"\) .*-> .*\("
            if not re.search(wanted, comment_above(lines, at)):
                silent.append(f"{path.relative_to(ROOT)}:{at + 1}: {line}")
    assert silent == [] and kernels >= 20 and launches >= 15, (silent, kernels, launches)


def test_import_arrows():
    for path in (ROOT / "dalle_ext").rglob("*.py"):
        assert "dalle" not in imported(path), f"{path.relative_to(ROOT)} imports dalle"
    for path in (ROOT / "dalle_ext/reference").glob("*.py"):
        extra = imported(path) - {"torch", "math", "__future__", "typing", "collections"}
        extra -= {"dalle_ext"} if path.stem in MADE_OF_OTHERS else set()
        assert extra == set(), f"{path.relative_to(ROOT)} imports {extra}"


def test_torch_ops_only_where_ops_live():
    for path in (ROOT / "dalle_ext").glob("*.py"):
        assert path.name == "_native.py" or "torch.ops." not in path.read_text(), path.name
    for path in (ROOT / "python/dalle").rglob("*.py"):
        text = path.read_text()
        assert "torch.ops." not in text, f"{path.relative_to(ROOT)} calls torch.ops"
        assert not re.search(r"_C_c(pu|uda)", text), f"{path.relative_to(ROOT)} names a library"


def test_no_pickle():
    for folder in ("dalle_ext", "python/dalle"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not imported(path) & {"pickle", "cloudpickle", "dill", "joblib"}, path
            assert not re.search(r"torch\.(load|save)\(", path.read_text()), path


@pytest.mark.parametrize(("pattern", "budget"), BUDGETS)
def test_budgets(pattern, budget):
    over = []
    for path in ROOT.glob(pattern):
        name, lines = str(path.relative_to(ROOT)), len(path.read_text().splitlines())
        most = LONGER.get(name, budget)
        if lines > most:
            over.append(f"{name}: {lines} lines, budget {most}")
    assert over == []


def test_raised_budgets_are_needed():
    """A file that fits the budget of its kind has no number of its own."""
    budgets = {path: lines for pattern, lines in BUDGETS for path in ROOT.glob(pattern)}
    for name, lines in LONGER.items():
        budget = budgets[ROOT / name]
        assert budget < len((ROOT / name).read_text().splitlines()) <= lines, name


def test_fast_math_is_nowhere():
    for path in [ROOT / "CMakeLists.txt", ROOT / "setup.py", *ROOT.glob("csrc/**/*")]:
        if path.is_file():
            text = re.sub(r"(//|#).*", "", path.read_text())
            assert "fast_math" not in text and "-ffast-math" not in text, path


def test_no_path_is_resolved_that_a_caller_gave():
    """`Path.resolve` raises a RuntimeError at a link to itself; `files.real_path` does not."""
    for path in (ROOT / "python/dalle").rglob("*.py"):
        assert not re.search(r"(?<!Path\(dalle\.__file__\))\.resolve\(", path.read_text()), path


def test_packages_are_all_listed():
    """Two roots in one distribution: a folder missing from the list would not be installed."""
    listed = set(re.findall(r'^  "(dalle[\w.]*)",$', (ROOT / "pyproject.toml").read_text(), re.M))
    found = {"dalle_ext", "dalle_ext.ops", "dalle_ext.reference"}
    for init in (ROOT / "python/dalle").rglob("__init__.py"):
        found.add(".".join(init.parent.relative_to(ROOT / "python").parts))
    assert listed == found


def test_data_of_the_packages_is_installed():
    """A file that is no module comes along only where a pattern names it."""
    given = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package, folder in given["package-dir"].items():
        for path in (ROOT / folder).rglob("*"):
            name = str(path.relative_to(ROOT / folder))
            if path.is_file() and path.suffix not in (".py", ".pyc", ".tmp"):
                assert any(fnmatch(name, x) for x in given["package-data"][package]), name


def test_every_test_that_the_docs_name_is_there():
    text = (ROOT / "docs/reliability.md").read_text()
    named = re.findall(r"`((?:tests/|test_)[\w/]+\.py)`", text)
    known = {path.name for path in ROOT.glob("tests/**/*.py")}
    assert named and {Path(path).name for path in named} <= known


def miscited(page: str) -> list[str]:
    """Code spans with a slash that are not `path:name`, or whose file does not define that name."""
    wrong = []
    for span in re.findall(r"`([^`\s]*/[^`\s]*)`", page):
        cited = CITATION.fullmatch(span)
        if not cited or not (ROOT / cited[1]).is_file():
            wrong.append(span)
            continue
        path, name = cited.groups()
        text = (ROOT / path).read_text()
        if path.endswith(".py"):
            defined = rf"^\s*(?:(?:def|class) {name}\b|{name}(?::| =))"
        else:
            defined, text = rf"\b{name}\b", re.sub(r"//.*", "", text)
        if not re.search(defined, text, re.M):
            wrong.append(span)
    return wrong


def test_paper_page_cites_what_is_there():
    page = (ROOT / "docs/paper.md").read_text()
    assert len(re.findall(CITATION, page)) > 80 and miscited(page) == []
    bad = [
        "python/dalle/prior/sampling.py:prime_tokens",
        "python/dalle/gone.py:draw",
        "csrc/formats/",
    ]
    assert miscited(" ".join(f"`{span}`" for span in bad)) == bad


def broken_links(path: Path, text: str) -> list[str]:
    """Relative link targets, and result files named in any way, that are not there."""
    links = re.findall(r"\]\((?!https?://)([^)#\s]+)", text)
    broken = [link for link in links if not (path.parent / link).exists()]
    results = re.findall(r"benchmarks/results/([\w.-]+\.json)", text)
    return broken + [name for name in results if not (ROOT / "benchmarks/results" / name).is_file()]


def test_links_of_the_pages_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    assert {p.name: bad for p in pages if (bad := broken_links(p, p.read_text()))} == {}
    bad = "[a](docs/gone.md) `benchmarks/results/2026-01-01_cpu.json`"
    assert broken_links(ROOT / "README.md", bad) == ["docs/gone.md", "2026-01-01_cpu.json"]


def test_changelog_has_one_line_an_item():
    """The form of keepachangelog.com. A union merge may bring old lines back: delete them."""
    kinds = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    for version in (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1:]:
        lines = [line for line in version.splitlines()[1:] if line]
        odd = [x for x in lines if not x.startswith(("- ", "### ")) or len(x) > 160]
        assert odd == [], "CHANGELOG.md: an item must be one line of at most 160 letters"
        assert sorted({x for x in lines if lines.count(x) > 1}) == []
        sections = [line[4:] for line in lines if line.startswith("### ")]
        assert sections == [kind for kind in kinds if kind in sections]


def what_tests_prove() -> str:
    """docs/tests.md: each test file and its first sentence."""
    rows = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        first = " ".join(doc.split("\n\n")[0].split())
        assert len(first) > 20, f"{path.relative_to(ROOT)} must say in its docstring what it proves"
        rows.append(f"| `{path.relative_to(ROOT)}` | {first.replace('|', ',')} |")
    return HEAD_OF_TESTS + "\n".join(rows) + "\n"


def test_docs_say_what_each_test_file_proves():
    """`python tests/test_layout.py` writes the page."""
    assert (ROOT / "docs/tests.md").read_text() == what_tests_prove()


def test_nothing_built_is_tracked():
    run = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False
    )
    if run.returncode:
        pytest.skip("not a git checkout")
    bad = [f for f in run.stdout.splitlines() if re.search(r"\.(so|o|pyc|pt|pth|pkl)$", f)]
    assert bad == []


if __name__ == "__main__":
    (ROOT / "docs/tests.md").write_text(what_tests_prove())
