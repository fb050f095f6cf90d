"""`dalle dvae import-openai`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dalle.commands.training import check_not_taken
from dalle.dvae.model import PRESETS, DiscreteVAE, DiscreteVAEConfig
from dalle.dvae.picture_size import DEFAULT_SIDE, remember_size
from dalle.errors import UsageError
from dalle.files import make_folder, saving
from dalle.pretrained import load_tensors, read_tensors, tensors_from_bytes

PICKLES = {".pkl", ".pt", ".pth", ".bin", ".ckpt"}


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Makes a discrete VAE of the weights that the paper's authors released.

    Args:
        encoder: the encoder's state dict as safetensors (docs/released_dvae.md).
        decoder: the decoder's.
        out: folder of the model, for --vae of `dalle prior train` and --model of
            `dalle dvae reconstruct`.
    """

    encoder: Path
    decoder: Path
    out: Path = Path("run/released-dvae")


def import_released(
    encoder: Path, decoder: Path, config: DiscreteVAEConfig = PRESETS["paper"]
) -> DiscreteVAE:
    """The discrete VAE of two state dicts in safetensors.

    Raises:
        CheckpointError: a file is missing, damaged, or has other names, shapes or types.
        UsageError: a pickle, which is never read.
    """
    with torch.device("meta"):
        vae = DiscreteVAE(config)
    vae.to_empty(device="cpu")
    for name, path in (("encoder", encoder), ("decoder", decoder)):
        if path.suffix.lower() in PICKLES:
            raise UsageError(
                f"dvae import-openai: {name} must be a safetensors file, got {path}, which may run "
                "code when read; docs/released_dvae.md says how to convert it"
            )
        part = getattr(vae, name)
        data = read_tensors(path, sum(t.nbytes for t in part.state_dict().values()))
        load_tensors(part, tensors_from_bytes(data, path), f"{path} ({name})")
    remember_size(vae, DEFAULT_SIDE)
    return vae.eval()


def import_openai(config: ImportConfig) -> None:
    """Reads, checks, saves, and says where."""
    make_folder(config.out, "dvae import-openai")
    check_not_taken("dvae import-openai", config.out, DiscreteVAE)
    vae = import_released(config.encoder, config.decoder)
    with saving("dvae import-openai", config.out):
        vae.save_pretrained(config.out)
    count = sum(p.numel() for p in vae.parameters())
    print(f"dvae import-openai: {count:,} parameters, {vae.num_tokens} codes: {config.out}")
