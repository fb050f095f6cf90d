"""The rivals, by the names that result files use."""

from __future__ import annotations

FLASH = "SDPA flash, dense causal"
CUDNN = "SDPA cuDNN, dense causal"
MASK = "SDPA, mask"
FLEX = "FlexAttention"
FLEX_COLUMNS = "FlexAttention, tokens in column order"
ALONE = "F.gumbel_softmax (sample only)"
ALONE_COMPILED = "F.gumbel_softmax (sample only), compiled"
BY_HAND = "torch by hand: sample, argmax, KL"
BY_HAND_COMPILED = "torch by hand: sample, argmax, KL, compiled"
COPY = "device copy of the same bytes"
AMP = "torch._amp_foreach_non_finite_check_and_unscale_"
ADAMW = "torch.optim.AdamW(fused=True)"
ADAMW8 = "bitsandbytes AdamW8bit"
ROUNDED = "ours, stochastic rounding"
