"""Models that tell how well a picture fits a caption (paper section 2.6)."""

from dalle.ranker.model import ContrastiveRanker, load_ranker

__all__ = ["ContrastiveRanker", "load_ranker"]
