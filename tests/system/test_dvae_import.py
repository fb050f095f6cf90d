"""The released dVAE's weights load; anything else is refused, and pickles are never read."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from dalle.cli import main
from dalle.commands.dvae_import import import_released
from dalle.dvae.model import DiscreteVAE, DiscreteVAEConfig
from dalle.errors import CheckpointError, UsageError

NARROW = DiscreteVAEConfig(n_hid=8, n_init=6, vocab_size=16)  # all 150 names, small tensors


def write_state(folder, config, *, changes=None):
    """The two files of a model of `config`, and its tensors; `changes` are put into the encoder."""
    torch.manual_seed(0)
    vae, paths = DiscreteVAE(config).eval(), []
    for name in ("encoder", "decoder"):
        tensors = {k: v.detach() for k, v in getattr(vae, name).state_dict().items()}
        if name == "encoder":
            tensors |= changes or {}
        tensors = {k: v for k, v in tensors.items() if v is not None}
        paths.append(folder / f"{name}.safetensors")
        save_file(tensors, paths[-1])
    return vae, *paths


def test_every_tensor_arrives(tmp_path):
    vae, encoder, decoder = write_state(tmp_path, NARROW)
    found = import_released(encoder, decoder, NARROW)
    assert len(found.state_dict()) == 150 and not found.training
    for name, tensor in vae.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(found.logits(images), vae.logits(images))


@pytest.mark.slow
def test_command_makes_a_model_of_the_released_size(tmp_path, capsys):
    with torch.device("meta"):
        vae = DiscreteVAE.from_preset("paper")
    for name in ("encoder", "decoder"):
        tensors = {
            key: torch.full(value.shape, i / 256)
            for i, (key, value) in enumerate(getattr(vae, name).state_dict().items())
        }
        save_file(tensors, tmp_path / f"{name}.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in ("encoder", "decoder")]
    words = ["dvae", "import-openai", "--encoder", str(files[0]), "--decoder", str(files[1])]
    assert main([*words, "--out", str(tmp_path / "vae")]) == 0
    assert "97,616,006 parameters, 8192 codes" in capsys.readouterr().out
    for file in files:
        file.unlink()
    found = DiscreteVAE.from_pretrained(tmp_path / "vae")
    assert found.config == DiscreteVAEConfig()
    for part in (found.encoder, found.decoder):
        for i, tensor in enumerate(part.state_dict().values()):
            assert float(tensor.flatten()[-1]) == i / 256


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"blocks.input.b": None}, r"encoder.*: blocks.input.b must be there, got no such tensor"),
        ({"blocks.group_5.w": torch.zeros(1)}, "blocks.group_5.w is unknown to Encoder"),
        ({"blocks.input.w": torch.zeros(8, 3, 5, 5)}, r"must be \(8, 3, 7, 7\) .* \(8, 3, 5, 5\)"),
        ({"blocks.input.b": torch.zeros(8).half()}, "torch.float32, got .* torch.float16"),
    ],
)
def test_other_names_shapes_and_types_are_refused(tmp_path, changes, match):
    _, encoder, decoder = write_state(tmp_path, NARROW, changes=changes)
    with pytest.raises(CheckpointError, match=match) as caught:
        import_released(encoder, decoder, NARROW)
    assert "\n" not in str(caught.value)


def test_files_given_the_wrong_way_round_are_refused(tmp_path):
    _, encoder, decoder = write_state(tmp_path, NARROW)
    with pytest.raises(CheckpointError, match=r"decoder.safetensors \(encoder\): blocks.input.w"):
        import_released(decoder, encoder, NARROW)


@pytest.mark.parametrize("cut", [0, 7, 500])
def test_truncated_files_are_refused(tmp_path, cut):
    _, encoder, decoder = write_state(tmp_path, NARROW)
    decoder.write_bytes(decoder.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="decoder.safetensors: must be a safetensors file"):
        import_released(encoder, decoder, NARROW)


def test_pickles_are_not_opened(tmp_path):
    path = tmp_path / "encoder.pkl"
    path.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(UsageError, match="encoder must be a safetensors file, got .*encoder.pkl"):
        import_released(path, path, NARROW)
    renamed = path.rename(tmp_path / "encoder.safetensors")
    with pytest.raises(CheckpointError, match="must be a safetensors file"):
        import_released(renamed, renamed, NARROW)


def test_command_errors_are_one_line(tmp_path, capsys):
    words = ["dvae", "import-openai", "--encoder", str(tmp_path / "no"), "--decoder", "no"]
    assert main(words) == 3
    assert (
        capsys.readouterr().err
        == f"{tmp_path}/no: must be a readable file, got: No such file or directory\n"
    )
