"""The decisions of the build, and its messages in unsuitable environments."""

from __future__ import annotations

from pathlib import Path

import pytest

import emulated
import torch_dir

ROOT = Path(__file__).resolve().parents[1]


def fake_torch(folder: Path, version: str, cuda: str | None = None) -> Path:
    (folder / "include/torch/csrc/stable").mkdir(parents=True)
    text = f"__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\n"
    (folder / "version.py").write_text(text)
    return folder


def test_finds_the_running_torch():
    import torch

    assert torch_dir.find_torch() == Path(torch.__file__).parent
    assert torch_dir.torch_version(torch_dir.find_torch())[0] == torch.__version__


def test_torch_dir_variable_wins(tmp_path, monkeypatch):
    folder = fake_torch(tmp_path / "torch", "2.12.1+cu130", "13.0")
    monkeypatch.setenv("DALLE_EXT_TORCH_DIR", str(folder))
    assert torch_dir.find_torch() == folder
    assert torch_dir.torch_version(folder) == ("2.12.1+cu130", "13.0")
    monkeypatch.setenv("DALLE_EXT_TORCH_DIR", str(tmp_path / "nowhere"))
    assert torch_dir.find_torch() is None


def test_old_torch_is_refused(tmp_path):
    folder = fake_torch(tmp_path / "torch", "2.9.0")
    with pytest.raises(SystemExit, match=r"torch must be >= 2.11, got 2.9.0; type: pip install"):
        torch_dir.torch_version(folder)


def test_unknown_variable_is_refused(monkeypatch):
    monkeypatch.setenv("DALLE_EXT_CUDDA", "1")
    with pytest.raises(SystemExit, match="DALLE_EXT_CUDDA must be one of DALLE_EXT_CPU_ISA"):
        torch_dir.check_variables()


@pytest.mark.parametrize(
    ("wish", "torch_cuda", "nvcc", "expected"),
    [
        (None, "13.0", "/nvcc", True),
        (None, None, "/nvcc", False),
        (None, "13.0", None, False),
        ("auto", "13.0", "/nvcc", True),
        ("0", "13.0", "/nvcc", False),
        ("1", None, "/nvcc", True),
    ],
)
def test_cuda_choice(monkeypatch, wish, torch_cuda, nvcc, expected):
    monkeypatch.delenv("FORCE_CUDA", raising=False)
    monkeypatch.delenv("DALLE_EXT_CUDA", raising=False)
    if wish:
        monkeypatch.setenv("DALLE_EXT_CUDA", wish)
    assert torch_dir.want_cuda(torch_cuda, nvcc) is expected


def test_cuda_choice_refuses(monkeypatch):
    monkeypatch.setenv("DALLE_EXT_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc must be on PATH or under CUDA_HOME"):
        torch_dir.want_cuda("13.0", None)
    monkeypatch.setenv("DALLE_EXT_CUDA", "yes")
    with pytest.raises(SystemExit, match="DALLE_EXT_CUDA must be auto, 1 or 0, got yes"):
        torch_dir.want_cuda("13.0", None)
    monkeypatch.delenv("DALLE_EXT_CUDA")
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert torch_dir.want_cuda(None, "/nvcc") is True


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ("", "80-real;90a-real;90-virtual"),
        ("8.0;9.0a+PTX", "80-real;90a"),
        ("8.0 9.0", "80-real;90-real"),
        ("native", "native"),
    ],
)
def test_architectures(monkeypatch, wish, expected):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    assert torch_dir.cuda_architectures() == expected


def test_architectures_refuse(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "hopper")
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST must be like"):
        torch_dir.cuda_architectures()


def test_constraints_pin_torch():
    assert torch_dir.pinned_torch(ROOT).startswith("torch==2.")


def test_cuda_headers_of_the_toolkit_or_of_wheels(tmp_path, monkeypatch):
    toolkit, wheels = tmp_path / "toolkit/include", tmp_path / "nvidia/cu13/include"
    for folder, cccl in ((toolkit, toolkit), (wheels, wheels / "cccl")):
        (cccl / "nv").mkdir(parents=True)
        for file in (folder / "cuda_fp16.h", folder / "vector_types.h", cccl / "nv/target"):
            file.touch()
    monkeypatch.setenv("CUDA_HOME", str(toolkit.parent))
    assert emulated.cuda_include() == [toolkit]
    (toolkit / "cuda_fp16.h").unlink()
    monkeypatch.setattr(emulated.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(emulated, "SYSTEM_TOOLKIT", str(tmp_path / "none"))
    assert emulated.cuda_include() == [wheels, wheels / "cccl"]
    (wheels / "vector_types.h").unlink()
    with pytest.raises(RuntimeError, match="^emulator: CUDA's headers must be .*, got none; type"):
        emulated.cuda_include()


def test_emulator_names_the_missing_tool(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="^emulator: cmake must be on PATH, got none; type: pip"):
        emulated.build("_C_emulated_plain")
