"""Brings dalle-pytorch 1.6.6 up on a torch of today, unchanged, for comparison only.

It wants packages at import that its model code never calls (taming, youtokentome, torchvision,
pkg_resources): empty modules stand in for those that are missing. Install it beside us with

    pip install --no-deps dalle-pytorch==1.6.6
    pip install einops axial-positional-embedding rotary-embedding-torch ftfy regex
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import torch

# module -> names its importers take from it
UNUSED = {
    "youtokentome": ("BPE", "OutputType"),
    "taming": (),
    "taming.models": (),
    "taming.models.vqgan": ("VQModel", "GumbelVQ"),
    "transformers": ("BertTokenizer",),
    "pkg_resources": ("get_distribution",),
    "torchvision": (),
    "torchvision.transforms": ("Compose", "Lambda", "RandomResizedCrop", "ToTensor"),
    "omegaconf": ("OmegaConf",),
    "requests": (),
}


def _stand_in(name: str, attributes: tuple[str, ...]) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for attribute in attributes:
        setattr(module, attribute, type(attribute, (), {}))
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def installed() -> bool:
    """Whether dalle-pytorch can be measured here."""
    return importlib.util.find_spec("dalle_pytorch") is not None


def build(
    *, dim: int, depth: int, heads: int, head_size: int, text_len: int, grid: int, text_vocab: int
) -> tuple[Any, int]:
    """A `DALLE` with its row and column attention, and its number of image codes."""
    for name, attributes in UNUSED.items():
        if name not in sys.modules and importlib.util.find_spec(name.split(".")[0]) is None:
            _stand_in(name, attributes)
        elif name.partition(".")[0] in sys.modules and name not in sys.modules:
            _stand_in(name, attributes)
    package = importlib.import_module("dalle_pytorch")
    codes = 1024
    vae = package.DiscreteVAE(
        image_size=8 * grid, num_layers=3, num_tokens=codes, codebook_dim=128, hidden_dim=32
    )
    model = package.DALLE(
        dim=dim,
        vae=vae,
        num_text_tokens=text_vocab,
        text_seq_len=text_len,
        depth=depth,
        heads=heads,
        dim_head=head_size,
        attn_types=("axial_row", "axial_col", "axial_row", "axial_row"),
    )
    return model, codes


def keep_the_cache(model: Any) -> None:
    """As shipped, guidance drops the cache at scale 1 and every token recomputes the sequence.

    Putting it back is fair to the rival: its sampling is then several times as fast.
    """

    def forward(self: Any, *args: Any, cond_scale: float = 1, cache: Any = None, **kw: Any) -> Any:
        return self(*args, cache=cache, **kw)

    type(model).forward_with_cond_scale = forward


def trainable(model: Any) -> list[torch.nn.Parameter]:
    """The parameters its training updates (its dVAE is frozen)."""
    return [p for p in model.parameters() if p.requires_grad]
