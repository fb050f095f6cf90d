"""Training over many machines (paper section 2.5, appendix E)."""

from dalle.distributed.hooks import PowerSGD

__all__ = ["PowerSGD"]
