"""DALL-E (Ramesh et al. 2021): discrete VAE, prior, tokenizer, reranker, and their training."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dalle.version import __version__

if TYPE_CHECKING:
    from dalle.dvae.model import DiscreteVAE
    from dalle.pipeline import Pipeline
    from dalle.prior.model import Prior
    from dalle.tokenizer import Tokenizer

__all__ = ["DiscreteVAE", "Pipeline", "Prior", "Tokenizer", "__version__"]

_HOMES = {  # imported on first use, so that `import dalle` needs no torch
    "DiscreteVAE": "dalle.dvae",
    "Pipeline": "dalle.pipeline",
    "Prior": "dalle.prior",
    "Tokenizer": "dalle.tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dalle' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
