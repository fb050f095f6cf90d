"""Too little memory is one line that says what was asked for and what would fit."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from dalle import memory
from dalle.cli import describe_error, main
from dalle.commands import fits
from dalle.dvae.model import PRESETS as DVAES
from dalle.dvae.model import DiscreteVAE
from dalle.errors import EnvironmentProblem
from dalle.memory import format_bytes, free_memory, is_refusal, require_memory
from dalle.prior.config import PRESETS as PRIORS
from dalle.prior.model import Prior
from dalle.ranker.blocks import PRESETS as RANKERS
from dalle.ranker.model import ContrastiveRanker
from dalle.tokenizer import Tokenizer
from support.cli_home import DVAE, PRIOR, RECONSTRUCT, SAMPLE, make_home

GIB = 2**30


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder of `cli_home`."""
    root = tmp_path_factory.mktemp("home")
    make_home(root)
    return root


@pytest.mark.parametrize(
    ("line", "free", "match"),
    [
        (f"{PRIOR} --preset 12b", 100, r"hold \d+\.\d GiB for a batch of 2, got 100.0 GiB free; "
         "--preset 1b would fit"),
        (f"{PRIOR} --preset base --text-len 256 --batch-size 4096", 16,
         r"a batch of 4096, got 16.0 GiB free; --batch-size \d+ would fit"),
        (f"{DVAE} --preset paper --image-size 256 --batch-size 512", 16,
         r"a batch of 512 pictures of 256 pixels, got 16.0 GiB free; --batch-size \d+ would fit"),
        (f"{SAMPLE} --num-candidates 1000000 --top 1000000", 1, "--top 131072 would fit"),
        (f"{SAMPLE} --max-batch 1000000 --num-candidates 1000000", 1,
         r"for 1000000 candidates at a time, got 1.0 GiB free; max_batch \d+ would fit"),
        (f"{RECONSTRUCT} --image-size 16384", 16, "64 pictures of 16384 pixels"),
    ],
)  # fmt: skip
def test_said_before_a_model_is_built(home, tmp_path, monkeypatch, capsys, line, free, match):
    monkeypatch.chdir(home)
    monkeypatch.setattr(memory, "_of_machine", lambda: free * GIB)
    if line.startswith("prior"):
        monkeypatch.setattr(Prior, "init_weights", lambda _: pytest.fail("the prior was built"))
    words = [str(tmp_path / word) if word.startswith("out") else word for word in line.split()]
    assert main(words) == 4
    said = capsys.readouterr().err
    assert re.search(match, said), said


@pytest.mark.parametrize("part", ["prior", "vae", "ranker"])
def test_a_config_of_absurd_sizes_builds_nothing(home, tmp_path, part, capsys):
    folder = tmp_path / "pipe"
    shutil.copytree(home / "pipe", folder)
    path = folder / part / "config.json"
    head = json.loads(path.read_text())
    key = {"prior": "d_model", "vae": "n_hid", "ranker": "width"}[part]
    head["config"][key] = 2**15
    path.write_text(json.dumps(head))
    assert main(["sample", "x", "--model", str(folder), "--out", str(tmp_path / "out")]) == 3
    assert re.search(r"model.safetensors: must have at least \d+ bytes", capsys.readouterr().err)


def test_min_parameters_are_never_more_than_there_are():
    tokenizer = Tokenizer.train(["a b"], 260)
    models = [Prior(replace(PRIORS["tiny"], image_rank=rank)) for rank in (0, 16)]
    models += [DiscreteVAE(DVAES[name]) for name in ("tiny", "small")]
    models.append(DiscreteVAE(replace(DVAES["tiny"], stem="patch")))
    models.append(ContrastiveRanker(replace(RANKERS["tiny"], vocab_size=300), tokenizer))
    for model in models:
        count = sum(p.numel() for p in model.parameters())
        assert count / 4 < type(model).min_parameters(model.config) <= count


def test_training_bytes_are_a_lower_bound_of_what_is_kept():
    """Bytes that autograd saves in one forward pass, counted, are no less than the estimate's."""
    config = replace(DVAES["tiny"], vocab_size=32)
    batch, size = 4, 32
    vae, kept = DiscreteVAE(config), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = vae(torch.rand(batch, 3, size, size), tau=1.0, kl_weight=1.0)
    parameters = 4 * sum(p.numel() for p in vae.parameters())
    counted = sum(kept.values()) - parameters
    estimate = fits.dvae_bytes(config, size, batch) - fits.dvae_bytes(config, size, 0)
    assert out.loss.requires_grad and counted / 3 < estimate <= counted


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't "
                      "allocate memory: you tried to allocate 4294967296 bytes. Error code 12"),
         r"^dalle: out of memory: memory must hold another 4.0 GiB, got .* free; ask for less: "),
        (RuntimeError("std::bad_alloc"), "memory must hold what this takes, got"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total "
                                "capacity of 139.80 GiB of which 1.20 GiB is free."),
         "the GPU's memory must hold another 2.5 GiB, got 1.20 GiB free"),
        (MemoryError("Unable to allocate 1.50 TiB for an array"), "another 1.5 TiB"),
        (OSError(12, "Cannot allocate memory"), "out of memory"),
        (RuntimeError("Storage size calculation overflowed with sizes=[9, 9]"), "out of memory"),
    ],
)  # fmt: skip
def test_refusals_of_every_kind(error, match):
    line, code = describe_error(error)
    assert code == 4 and re.search(match, line) and "enforce" not in line


def test_a_real_refusal(tmp_path):
    with pytest.raises((RuntimeError, MemoryError)) as torch_says:
        torch.empty(2**46)
    with pytest.raises(MemoryError) as numpy_says:
        np.empty(2**46)
    for says in (torch_says.value, numpy_says.value):
        assert is_refusal(says) and "256.0 TiB" in describe_error(says)[0].replace("512", "256")


def test_free_memory_is_the_least_of_machine_limits_and_group(monkeypatch):
    assert 2**20 < free_memory() < 2**60
    for name, size in (("machine", 3), ("limits", None), ("group", 2)):
        monkeypatch.setattr(memory, f"_of_{name}", lambda size=size: size)
    assert free_memory() == 2
    require_memory("x", 2, "y", "z")
    with pytest.raises(EnvironmentProblem, match="x: memory must hold 3 bytes for y, got 2 bytes"):
        require_memory("x", 3, "y", "z")
    monkeypatch.setattr(memory, "_of_machine", lambda: None)
    monkeypatch.setattr(memory, "_of_group", lambda: None)
    assert free_memory() is None
    require_memory("x", 2**70, "y", "z")


def test_sizes_in_words():
    assert [format_bytes(size) for size in (0, 1023, 1536, GIB)] == [
        "0 bytes", "1023 bytes", "1.5 KiB", "1.0 GiB",
    ]  # fmt: skip
