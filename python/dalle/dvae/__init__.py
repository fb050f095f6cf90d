"""The discrete VAE (paper section 2.1, appendix A)."""

from dalle.dvae.model import PRESETS, DiscreteVAE, DiscreteVAEConfig, DVAEOutput

__all__ = ["PRESETS", "DVAEOutput", "DiscreteVAE", "DiscreteVAEConfig"]
