"""16-bit training that does not diverge (paper 2.4, appendix D)."""

from dalle.precision.ends import BlockEnds
from dalle.precision.linear import linear
from dalle.precision.nonfinite import first_nonfinite
from dalle.precision.scaler import ResblockScaler, ScalerStep

__all__ = ["BlockEnds", "ResblockScaler", "ScalerStep", "first_nonfinite", "linear"]
