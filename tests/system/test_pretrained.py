"""Saved models: bit-equal round trips, atomic writes, damaged files in one line (R25)."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from dalle.dvae.model import DiscreteVAE
from dalle.errors import CheckpointError, UsageError
from dalle.pretrained import load_config, load_weights, save_pretrained
from dalle.prior.model import Prior


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetConfig:
    width: int
    grid: tuple[int, int] = (4, 4)
    inner: Inner = Inner()  # noqa: RUF009
    top: int | None = None
    folder: Path = Path("x")
    names: tuple[tuple[str, int], ...] = ()

    def __post_init__(self):
        if self.width < 1:
            raise UsageError(f"Net: width must be 1 or more, got {self.width}")


class Net(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.width, 2)
        self.brain = nn.Parameter(torch.randn(3).bfloat16())
        self.norm = nn.BatchNorm1d(2)
        self.tied = self.linear.weight
        self.scalar = nn.Parameter(torch.randn(()))


CONFIG = NetConfig(
    width=3, grid=(2, 8), inner=Inner(rate=0.1), folder=Path("a/b"), names=(("a", 1), ("b", 2))
)


@pytest.fixture
def saved(tmp_path):
    model = Net(CONFIG)
    save_pretrained(model, tmp_path / "deep" / "net", CONFIG)
    return model, tmp_path / "deep" / "net"


def test_round_trip_is_bit_equal(saved):
    model, folder = saved
    config = load_config(folder, "Net", NetConfig)
    assert config == CONFIG and isinstance(config.names[0], tuple)
    other = Net(config)
    load_weights(other, folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text())["format_version"] == 1


def test_saving_again_replaces_and_leaves_other_files(saved):
    _, folder = saved
    (folder / "README.md").write_text("mine")
    model = Net(CONFIG)
    save_pretrained(model, folder, CONFIG)
    other = Net(CONFIG)
    load_weights(other, folder)
    assert torch.equal(other.linear.weight, model.linear.weight)
    assert (folder / "README.md").read_text() == "mine" and len(list(folder.iterdir())) == 3


def expect_line(match, action):
    with pytest.raises(CheckpointError, match=match) as caught:
        action()
    assert "\n" not in str(caught.value)


def test_missing_and_foreign_folders(tmp_path, saved):
    _, folder = saved
    expect_line("config.json: must be a readable", lambda: load_config(tmp_path, "Net", NetConfig))
    expect_line("class must be Prior, got Net", lambda: load_config(folder, "Prior", NetConfig))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for text in ('{"model_type": "clip"}', "[]", "3"):
        (foreign / "config.json").write_text(text)
        expect_line("must be written by dalle", lambda: load_config(foreign, "Net", NetConfig))
    (foreign / "config.json").write_text('{"class": ')
    expect_line("config.json: must be JSON", lambda: load_config(foreign, "Net", NetConfig))


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("format_version", 99, "format_version must be 1, got 99"),
        ("config", {"width": 3, "gird": [2, 8]}, "no option 'gird' .did you mean grid"),
        ("config", {"width": 0}, "width must be 1 or more, got 0"),
        ("config", {}, "must be a NetConfig"),
        ("config", [1], "config must be a mapping, got list"),
        ("weights_sha256", 3, "weights_sha256 must be a string"),
    ],
)
def test_config_of_another_format_or_model(saved, key, value, match):
    _, folder = saved
    head = json.loads((folder / "config.json").read_text())
    head[key] = value
    (folder / "config.json").write_text(json.dumps(head))
    expect_line(match, lambda: load_config(folder, "Net", NetConfig))


def test_weights_of_another_shape_or_name(saved):
    _, folder = saved
    match = r"(linear.weight|tied) must be \(2, 4\) torch.float32, got \(2, 3\)"
    expect_line(match, lambda: load_weights(Net(NetConfig(width=4)), folder))
    expect_line("weight must be there", lambda: load_weights(nn.Linear(3, 2), folder))
    smaller = Net(CONFIG)
    del smaller.norm
    expect_line(r"norm\.\w+ is unknown to Net", lambda: load_weights(smaller, folder))


def test_damaged_weights_are_found_and_the_module_kept(saved):
    _, folder = saved
    path, rng = folder / "model.safetensors", random.Random(0)
    whole = path.read_bytes()
    other = Net(CONFIG)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    for i in range(100):
        data = bytearray(whole)
        place = rng.randrange(len(data))
        if i % 2:
            del data[place:]
        else:
            data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        expect_line("model.safetensors", lambda: load_weights(other, folder))
    path.unlink()
    expect_line("must be a readable file", lambda: load_weights(other, folder))
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_no_write_permission_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        save_pretrained(Net(CONFIG), tmp_path / "file" / "net", CONFIG)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Prior.from_preset("tinny"), r"Prior: preset .*'tinny' \(did you mean tiny\?\)"),
        (lambda: Prior.from_preset("tiny", d_modle=8), r"got d_modle \(did you mean d_model\?\)"),
        (lambda: DiscreteVAE.from_preset("tiny", width=8), "DiscreteVAE: option .*, got width$"),
    ],
)
def test_unknown_presets_and_options_get_one_line(make, match):
    with pytest.raises(UsageError, match=match) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_loading_leaves_the_callers_generator_alone(tmp_path):
    DiscreteVAE.from_preset("tiny").save_pretrained(tmp_path)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    DiscreteVAE.from_pretrained(tmp_path)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value):
    vae = DiscreteVAE.from_preset("tiny", vocab_size=32)
    with torch.no_grad():
        vae.decoder.codebook_conv().b[3] = value
    vae.save_pretrained(tmp_path)
    expect_line(
        r"decoder.blocks.input.b must hold finite numbers, got 1 NaN or infinite of 32",
        lambda: DiscreteVAE.from_pretrained(tmp_path),
    )
