"""A pipeline of the smallest parts, with random weights."""

from __future__ import annotations

import torch

from dalle.dvae.model import DiscreteVAE, DiscreteVAEConfig
from dalle.pipeline import Pipeline
from dalle.prior.config import PriorConfig
from dalle.prior.model import Prior
from dalle.ranker.model import ContrastiveRanker
from dalle.tokenizer import Tokenizer

CAPTION = "a red circle"


def build(ranker=True, codes=16, prior_codes=16, **options):
    """Draws 16 x 16 pixels of 4 x 4 codes; `options` go to `Pipeline`."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([CAPTION, "a blue square"] * 4, vocab_size=280)
    vae = DiscreteVAE(
        DiscreteVAEConfig(stem="patch", patch=4, n_hid=8, n_blk_per_group=1, n_init=8,
                          vocab_size=codes)
    )  # fmt: skip
    prior = Prior(
        PriorConfig(text_vocab=280, image_vocab=prior_codes, text_len=8, grid=(4, 4), d_model=32,
                    num_heads=2, num_layers=2, kernel_size=3)
    )  # fmt: skip
    for parameter in prior.image_head.parameters():
        torch.nn.init.normal_(parameter)
    judge = None
    if ranker:
        judge = ContrastiveRanker.from_preset(
            "tiny", tokenizer=tokenizer, image_size=16, grid=4, width=32, depth=1, embed_dim=16
        ).eval()
    return Pipeline(tokenizer, vae.eval(), prior.eval(), judge, **options)
