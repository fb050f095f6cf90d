"""Which key a query attends to: definition, patterns, the C++ rule, the CPU kernel's walk."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dalle_ext
from dalle_ext import AttentionPattern
from dalle_ext.ops.sparse_attention import KINDS, OFFSETS

ROOT = Path(__file__).resolve().parents[2]

# Figure 11 of the paper, panels a, b, d: 6 text positions and a 4 x 4 grid, kernel 3; a line is a
# query, a column of characters a key.
FIGURE_11 = {
    "row": """
#.....................
##....................
###...................
####..................
#####.................
######................
#######...............
########..............
#########.............
##########............
###########...........
######.#####..........
######..#####.........
######...#####........
######....#####.......
######.....#####......
######......#####.....
######.......#####....
######........#####...
######.........#####..
######..........#####.
######...........#####
""",
    "column": """
#.....................
##....................
###...................
####..................
#####.................
######................
#######...............
######.#..............
######..#.............
######...#............
#######...#...........
######.#...#..........
######..#...#.........
######...#...#........
#######...#...#.......
######.#...#...#......
######..#...#...#.....
######...#...#...#....
#######...#...#...#...
######.#...#...#...#..
######..#...#...#...#.
######...#...#...#...#
""",
    "conv": """
#.....................
##....................
###...................
####..................
#####.................
######................
#######...............
########..............
######.##.............
#######.##............
########.##...........
#########.##..........
######.###.##.........
#######.###.##........
######.#.###.##.......
######..#.###.##......
######...#.###.##.....
######....#.###.##....
######.....#.###.##...
######......#.###.##..
######.......#.###.##.
######........#.###.##
""",
}


def native_mask(pattern: AttentionPattern, *, walked: bool) -> torch.Tensor:
    rule = (pattern.kind, pattern.text_len, *pattern.grid, pattern.runs)
    return torch.ops.dalle_ext._sparse_attention_mask(*rule, walked)


def picture(text: str) -> torch.Tensor:
    return torch.tensor([[c == "#" for c in line] for line in text.split()])


def assert_rules_agree(pattern: AttentionPattern) -> None:
    mask = pattern.mask()
    assert torch.equal(native_mask(pattern, walked=False), mask.byte())
    # Counts, not bits: the walk visits each attended pair exactly once and no other.
    assert torch.equal(native_mask(pattern, walked=True), mask.byte())
    assert pattern.num_pairs == int(mask.sum())


@pytest.mark.parametrize("kind", FIGURE_11)
def test_figure_11(kind):
    pattern = AttentionPattern(kind, text_len=6, grid=(4, 4), kernel_size=3)
    assert torch.equal(pattern.mask(), picture(FIGURE_11[kind]))
    assert_rules_agree(pattern)


@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_at_the_size_of_the_paper(kind):
    pattern = AttentionPattern(kind, text_len=256, grid=(32, 32))
    assert_rules_agree(pattern)
    pairs = {"row": 328_304, "column": 311_936, "conv": 356_384, "causal": 819_840}
    assert pattern.num_pairs == pairs[kind]


def test_conv_at_the_size_of_the_paper_is_rule_d():
    pattern = AttentionPattern("conv", text_len=256, grid=(32, 32), kernel_size=11)
    runs = [(0, 6), (27, 38), (59, 70), (91, 102), (123, 134), (155, 166), (187, 192)]
    assert pattern.offsets == tuple(o for begin, end in runs for o in range(begin, end))
    assert len(pattern.offsets) == 66


@pytest.mark.parametrize("size", [3, 11])
def test_other_readings_of_conv_are_data(size):
    w, half = 32 if size == 11 else 4, size // 2
    rule_a = [o for o in range(w * (size - 1)) if (o + 1) % w <= size - 1]
    rule_b = [o for o in range(w * (size - 1)) if min(o % w, -o % w) <= half]
    for offsets in (rule_a, rule_b):
        pattern = AttentionPattern("conv", text_len=6, grid=(w, w), offsets=tuple(offsets))
        assert pattern.offsets == tuple(o for o in offsets if o < w * w)
        assert_rules_agree(pattern)
        if size == 3:  # every rule on the list reproduces the figure
            assert torch.equal(pattern.mask(), picture(FIGURE_11["conv"]))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    text_len=st.integers(0, 40),
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    half=st.integers(0, 8),
)
def test_rules_agree_on_any_grid(kind, text_len, rows, columns, half):
    size = 2 * half + 1
    assert_rules_agree(
        AttentionPattern(kind, text_len=text_len, grid=(rows, columns), kernel_size=size)
    )


@settings(max_examples=30, deadline=None)
@given(
    offsets=st.sets(st.integers(1, 70)),
    text_len=st.integers(0, 9),
    grid=st.tuples(st.integers(1, 8), st.integers(1, 8)),
)
def test_rules_agree_on_any_offsets(offsets, text_len, grid):
    pattern = AttentionPattern("conv", text_len=text_len, grid=grid, offsets=(0, *offsets))
    distance = torch.arange(grid[0] * grid[1])
    distance = distance[:, None] - distance[None, :]
    image = torch.isin(distance, torch.tensor([0, *offsets]))
    assert torch.equal(pattern.mask()[text_len:, text_len:], image)
    assert_rules_agree(pattern)


@pytest.mark.parametrize("kind", KINDS)
def test_every_query_sees_itself_and_nothing_later(kind):
    mask = AttentionPattern(kind, text_len=5, grid=(6, 7), kernel_size=5).mask()
    assert bool(mask.diagonal().all()) and not bool(mask.triu(1).any())


@pytest.mark.parametrize("kind", KINDS)
def test_block_mask_of_flex_attention(kind):
    from torch.nn.attention.flex_attention import create_mask

    pattern = AttentionPattern(kind, text_len=37, grid=(9, 13), kernel_size=5)
    size = pattern.length
    dense = create_mask(pattern.mask_mod(), None, None, size, size, device="cpu")
    assert torch.equal(dense[0, 0], pattern.mask())
    block = pattern.to_block_mask()
    assert block.shape == (1, 1, size, size)
    blocks = torch.nn.functional.pad(pattern.mask(), (0, -size % 128, 0, -size % 128))
    blocks = blocks.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).any(3).any(1)
    assert torch.equal(block.to_dense()[0, 0].bool(), blocks)


def test_pattern_is_a_value():
    one = AttentionPattern("row", text_len=3, grid=(2, 5))
    assert one == AttentionPattern("row", text_len=3, grid=[2, 5])
    assert len({one, AttentionPattern("row", text_len=3, grid=(2, 5))}) == 1
    assert one != AttentionPattern("row", text_len=3, grid=(5, 2))
    assert (one.length, one.offsets, one.density) == (13, (0, 1, 2, 3, 4, 5), one.num_pairs / 91)
    with pytest.raises(AttributeError):
        one.kind = "column"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "diagonal"}, f"kind must be one of {', '.join((*KINDS, OFFSETS))}, got"),
        ({"text_len": -1}, "text_len must be an integer of at least 0, got -1"),
        ({"text_len": 2.0}, "text_len must be an integer of at least 0, got 2.0"),
        ({"grid": (4,)}, r"grid must be \(rows, columns\), integers of at least 1, got \(4,\)"),
        ({"grid": (4, 0)}, r"grid must be \(rows, columns\), integers of at least 1, got \(4, 0\)"),
        ({"kernel_size": 4}, "kernel_size must be an odd integer >= 1, got 4"),
        ({"offsets": (0, 1)}, "offsets must be for kind 'conv' or 'offsets' only"),
        ({"kind": "conv", "offsets": (1, 2)}, "offsets must be for kind .*, from 0 upwards with 0"),
        ({"kind": "offsets", "offsets": (1, 2)}, "offsets must be for kind .*, from 0 upwards"),
        ({"kind": "offsets", "offsets": (-1, 0)}, "offsets must be for kind .*, from 0 upwards"),
        ({"kind": "offsets", "offsets": ()}, r"offsets must be given for kind .*, got \(\)"),
        ({"kind": "offsets"}, r"offsets must be given for kind 'offsets', with 0, got \(\)"),
    ],
)
def test_messages(change, message):
    arguments = {"kind": "row", "text_len": 2, "grid": (4, 4), **change}
    with pytest.raises(ValueError, match=f"^AttentionPattern: {message}"):
        AttentionPattern(arguments.pop("kind"), **arguments)


def test_too_many_runs_of_offsets():
    pattern = AttentionPattern("conv", text_len=0, grid=(20, 20), offsets=tuple(range(0, 400, 2)))
    q = torch.zeros(1, 1, 400, 8)
    with pytest.raises(RuntimeError, match="sparse_attention: offsets must be at most 128 runs"):
        dalle_ext.sparse_attention(q, q, q, pattern)


@pytest.mark.parametrize("kind", ["row", "column", "conv", "causal"])
def test_replace_derives_anew(kind):
    """The offsets of the old grid used to stay."""
    old = AttentionPattern(kind, text_len=3, grid=(4, 5), kernel_size=3)
    for change in ({"grid": (6, 9)}, {"text_len": 7}, {"kernel_size": 7}):
        new = dataclasses.replace(old, **change)
        fields = {"text_len": 3, "grid": (4, 5), "kernel_size": 3, **change}
        wanted = AttentionPattern(kind, **fields)
        assert (new, new.offsets, new.runs) == (wanted, wanted.offsets, wanted.runs)
        assert torch.equal(new.mask(), wanted.mask()) and not new.custom_offsets
    assert dataclasses.replace(old, kind="row").offsets == tuple(range(6))


def test_replace_keeps_given_offsets_and_nothing_else():
    """Those beyond a small grid count again on a larger one."""
    own = AttentionPattern("conv", text_len=0, grid=(2, 2), offsets=(0, 2, 7))
    assert own.offsets == (0, 2) and own.custom_offsets == (0, 2, 7)
    assert dataclasses.replace(own, grid=(4, 4)).offsets == (0, 2, 7)
    assert dataclasses.replace(own, offsets=(0, 1)).offsets == (0, 1)
    with pytest.raises(ValueError, match="AttentionPattern: offsets must be for kind 'conv' or"):
        dataclasses.replace(own, kind="row")
    for twin in (copy.copy(own), copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert twin == own and twin.runs == own.runs and hash(twin) == hash(own)


@settings(max_examples=30, deadline=None)
@given(
    offsets=st.lists(st.integers(0, 70)),
    text_len=st.integers(0, 9),
    grid=st.tuples(st.integers(1, 8), st.integers(1, 8)),
)
def test_a_pattern_of_any_offsets(offsets, text_len, grid):
    """The short form, the kind and the other reading of "conv" are one rule."""
    pattern = AttentionPattern.offsets([*offsets, 0], text_len=text_len, grid=grid)
    assert pattern == AttentionPattern(OFFSETS, text_len=text_len, grid=grid, offsets={0, *offsets})
    assert pattern.offsets == tuple(sorted({o for o in (0, *offsets) if o < grid[0] * grid[1]}))
    conv = AttentionPattern("conv", text_len=text_len, grid=grid, offsets=(0, *offsets))
    assert torch.equal(pattern.mask(), conv.mask()) and pattern.runs == conv.runs
    assert_rules_agree(pattern)


def test_a_pattern_of_offsets_is_a_value():
    own = AttentionPattern.offsets(iter([7, 2, 0, 2]), text_len=1, grid=[2, 2])
    assert (own.kind, own.offsets, own.custom_offsets) == ("offsets", (0, 2), (0, 2, 7))
    larger = dataclasses.replace(own, grid=(4, 4))
    assert larger.offsets == (0, 2, 7) and larger.num_pairs == 1 + 16 + 16 + 14 + 9
    assert dataclasses.replace(own, kind="conv").runs == own.runs
    for twin in (copy.copy(own), copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert twin == own and twin.offsets == own.offsets and hash(twin) == hash(own)
    assert own != AttentionPattern("conv", text_len=1, grid=(2, 2), offsets=(0, 2, 7))


def test_a_kind_that_python_does_not_answer_for_is_refused():
    pattern = AttentionPattern("row", text_len=2, grid=(3, 3))
    object.__setattr__(pattern, "kind", "unknown")  # as a name that was added to KINDS alone
    for answer in (pattern.mask, lambda: pattern.offsets):
        with pytest.raises(NotImplementedError, match="kind must be one that is defined here"):
            answer()


def test_the_page_of_operators_has_a_row_for_each_kind():
    page = (ROOT / "docs/ops.md").read_text()
    assert re.findall(r'^\| `"(\w+)"` \|', page, re.M) == [*KINDS, OFFSETS]


def test_native_names_of_the_kinds():
    """The library knows the kinds that Python knows, and no other."""
    with pytest.raises(RuntimeError, match="kind must be one of") as error:
        torch.ops.dalle_ext._sparse_attention_mask("diagonal", 1, 1, 1, [], False)
    assert f"one of {', '.join((*KINDS, OFFSETS))}, got diagonal" in str(error.value)


@pytest.mark.parametrize("compiler", ["g++", "nvcc"])
def test_a_new_kind_needs_an_answer_from_every_rule(compiler, tmp_path):
    """It used to compile and to run as causal."""
    found = shutil.which(compiler) or shutil.which(f"/usr/local/cuda/bin/{compiler}")
    if found is None:
        pytest.skip(f"needs {compiler}")
    build = (ROOT / "CMakeLists.txt").read_text()
    target = "_C_cuda PRIVATE" if compiler == "nvcc" else "cpu_kernels PUBLIC"
    flags = re.search(rf"target_compile_options\({target} ([^)]*)\)", build)[1].split()
    text = (ROOT / "csrc/sparse_attention/sparse_attention.h").read_text()
    (kinds,) = re.findall(r"enum class AttentionKind : int32_t \{ ([\w, ]+) \};", text)
    source, folder = tmp_path / "kinds.cu", tmp_path / "sparse_attention"
    source.write_text('#include "sparse_attention/sparse_attention.h"\n')
    folder.mkdir()
    command = [found, "-std=c++20", *flags, f"-I{tmp_path}", f"-I{ROOT / 'csrc'}"]
    command += ["-x", "c++" if compiler == "g++" else "cu", "-c", source, "-o", tmp_path / "object"]
    # Under preloaded sanitizers, as .ci/night has them, nvcc does not start.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    for more in ("", ", kUnknown"):
        (folder / "sparse_attention.h").write_text(text.replace(kinds, kinds + more, 1))
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        unanswered = re.findall(r"In function .*?dalle::(\w+)\(.*\n.*kUnknown", done.stderr)
        assert (done.returncode, len(set(unanswered))) == ((1, 7) if more else (0, 0)), done.stderr
