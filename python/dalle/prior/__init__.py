"""The prior: a transformer over caption and image tokens (paper section 2.2, appendix B)."""

from dalle.prior.config import PAD, PRESETS, PriorConfig
from dalle.prior.model import Prior, PriorOutput

__all__ = ["PAD", "PRESETS", "Prior", "PriorConfig", "PriorOutput"]
