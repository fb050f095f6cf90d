"""Figures 4 and 12: a gradient scale for each residual block, from a short fp16 run made here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dalle.console import progress_shown
from dalle.data.pairs import evenly_spaced
from dalle.data.split import Subset
from dalle.evaluate.results import table
from dalle.precision import ResblockScaler
from dalle.precision.compare import ONE, OWN, SHARES, kept_gradients, mean_of_late_half, use_scaler
from dalle.precision.plots import kept_figure, scales_figure
from dalle.prior.config import PriorConfig
from dalle.prior.model import Prior
from dalle.reproduce.context import Context
from dalle.reproduce.figure import Figure
from dalle.train.prior import PriorTask
from dalle.train.prior_recipe import PriorTrainConfig

BATCH, RECORDS = 8, 50
# The paper's constants are of 430,000 updates. A run of some hundred updates goes through the same
# motion with a faster growth, a shorter window and bounds that none of the blocks reaches.
GROWTH, WINDOW = 2 ** (1 / 40), 16
INITIAL, LOW, HIGH = 2.0**22, 2.0**-8, 2.0**60


def figure_12(context: Context) -> Figure:
    """The scales of all blocks over a run with `ResblockScaler`."""
    sizes = context.sizes.scales
    task = _task(context, sizes.width, sizes.layers, "fp16-scaled", sizes.updates)
    every = max(1, sizes.updates // RECORDS)
    scaler = ResblockScaler(
        task.model.resblocks(),
        initial=INITIAL,
        growth=GROWTH,
        window=WINDOW,
        low=LOW,
        high=HIGH,
        sample_every=every,
    )
    task.scaler = use_scaler(task.model, scaler)
    records: list[dict[str, Any]] = []
    losses, skipped = [], 0.0
    with progress_shown("figure 12: fp16 run") as show:
        for step in range(sizes.updates):
            values = {key: _plain(value) for key, value in task.train_step(step).items()}
            losses.append(values["loss"])
            skipped += values["skipped"]
            if (step + 1) % every == 0:
                records.append({"step": step + 1, **values})
            show(step + 1, sizes.updates)
    last = _ended(records)
    ranked = sorted(last, key=last.__getitem__)
    spread = last[ranked[-1]] - last[ranked[0]]
    blocks = len(last)
    second = "layers.1.mlp"
    ours = {
        "blocks": blocks,
        "updates": sizes.updates,
        "log2_scale": last,
        "range_bits": spread,
        "highest": ranked[-1],
        "lowest": ranked[0],
        "skipped_share": skipped / sizes.updates,
        "losses": [losses[0], losses[-1]],
    }
    stated = {
        "blocks": 128,
        "parameters": 2.8e9,
        "range_bits": 4,
        "outlier": "the second MLP resblock, near 2^24",
    }
    rows: list[list[Any]] = [
        ["residual blocks", blocks, 128],
        ["log2 of the scales, lowest to highest", [last[ranked[0]], last[ranked[-1]]], ""],
        ["range in bits", spread, "4, but for one block"],
        ["highest scale", ranked[-1], "second MLP block, near 2^24"],
        ["updates skipped", skipped / sizes.updates, 0.05],
    ]
    return Figure(
        text="log2 of each residual block's gradient scale. A scale grows at each clean update and "
        "falls when a parameter gradient of its block is not finite. Middle and right: the shares "
        "that fp16 loses at the last update, and where the gradients lie in its range.",
        ours=ours,
        paper=stated,
        tables=[table(["", "ours", "paper"], rows)],
        pictures=[context.plot("figure_12.png", scales_figure(records))],
        command=context.own_command("figure_12"),
        differs=f"A prior of {sizes.layers} layers of width {sizes.width} in place of 64 layers of "
        f"width 1920, {sizes.updates} updates of {BATCH} pairs in place of a whole training. "
        "Scales start at 2^22 (2^13 a replica), grow by 2^(1/40) an update (2^(1/1000)), may fall "
        f"every {WINDOW} updates (125), and are not bounded by 2^7 and 2^24, so that a short run "
        "shows where each one settles: the mean of its last quarter counts. So fast a growth makes "
        f"many updates overflow, which are skipped. The scale of {second} there is "
        f"2^{last[second]:.1f}. The paper's 5 % of skipped updates is of its 12-billion-parameter "
        "model.",
    )


def figure_4(context: Context) -> Figure:
    """What one scale for the whole model loses, and a scale for each block does not."""
    sizes = context.sizes.scales
    shape = {"gain": sizes.deep_gain}
    plain = _task(context, sizes.deep_width, sizes.deep_layers, "fp32", sizes.deep_updates, **shape)
    with progress_shown("figure 4: deep run") as show:
        for step in range(sizes.deep_updates):
            plain.train_step(step)
            show(step + 1, sizes.deep_updates)
    half = Prior(_shape(context, sizes.deep_width, sizes.deep_layers, "fp16-scaled", **shape))
    half.load_state_dict(plain.model.state_dict())
    half.to(context.device)
    batch = plain.batch(sizes.deep_updates)
    kept = kept_gradients(half, (batch.text.to(context.device), batch.tokens))
    late = {
        name: {share: mean_of_late_half(kept[name][share]) for share in SHARES}
        for name in (ONE, OWN)
    }
    words = {
        "block_underflow": "gradient elements that become zero",
        "block_subnormal": "gradient elements that become subnormal",
        "error": "error of the parameter gradients, relative to their norm",
    }
    rows = [[words[share], late[ONE][share], late[OWN][share]] for share in SHARES]
    grown = kept["quantiles"]["50%"]
    ours = {
        "blocks": 2 * sizes.deep_layers,
        "late_half": late,
        "median_log2_gradient": {"first block": grown[0], "last block": grown[-1]},
    }
    stated = {
        "blocks": 128,
        "global_scale": "underflow was the cause of divergence past 1 billion parameters",
        "dataflow": "fp32 identity path, fp16 inside; scale and filter at both ends of each block",
    }
    heads = ["late half of the blocks", "one scale for the model", "a scale for each block"]
    return Figure(
        text="The paper's figure draws the data flow of a residual block with its own scale. Here "
        "is what it buys: the gradients of one batch, computed in fp16 with one scale for the "
        "whole model and with a scale for each block, each the largest power of two without "
        f"nonfinite gradients. The median gradient is 2^{grown[0]:.0f} in the first block and "
        f"2^{grown[-1]:.0f} in the last.",
        ours=ours,
        paper=stated,
        tables=[table(heads, rows)],
        pictures=[context.plot("figure_4.png", kept_figure([kept]))],
        command=context.own_command("figure_4"),
        differs=f"{2 * sizes.deep_layers} blocks of width {sizes.deep_width}, after "
        f"{sizes.deep_updates} updates in fp32 of {BATCH} pairs. Weights start with gain "
        f"{sizes.deep_gain:g} (paper: 0.125), as a model this small does not otherwise reach the "
        "spread of gradients that the paper met past 1 billion parameters. The paper draws the "
        "mechanism and gives no numbers for it. Three seeds: docs/precision.md.",
    )


def _shape(
    context: Context, width: int, layers: int, precision: str, gain: float = 0.5
) -> PriorConfig:
    pipeline = context.pipeline
    return PriorConfig(
        text_vocab=pipeline.tokenizer.vocab_size,
        image_vocab=pipeline.vae.num_tokens,
        text_len=pipeline.prior.config.text_len,
        grid=pipeline.vae.grid(context.side),
        d_model=width,
        num_heads=max(1, width // 16),
        num_layers=layers,
        kernel_size=5,
        init_gain=gain,
        precision=precision,
    )


def _task(
    context: Context, width: int, layers: int, precision: str, updates: int, **shape: Any
) -> PriorTask:
    """A new prior's training on codes of the pipeline's dVAE; AdamW of fp32 weights."""
    torch.manual_seed(context.seed)
    prior = Prior(_shape(context, width, layers, precision, **shape)).to(context.device)
    recipe = PriorTrainConfig(
        batch_size=BATCH,
        lr=2e-3 if layers < 32 else 5e-4,
        warmup_steps=max(1, updates // 10),
        decay="none",
        augment="none",
        bpe_dropout=0.0,
    )
    pairs = Subset(context.train, evenly_spaced(len(context.train), BATCH * max(updates, 2)))
    pipeline = context.pipeline
    return PriorTask(prior, pipeline.tokenizer, pipeline.vae, pairs, recipe, seed=context.seed)


def _plain(value: float | Tensor) -> Any:
    """A step's value as JSON has it."""
    return value.tolist() if isinstance(value, Tensor) else value


def _ended(records: list[dict[str, Any]]) -> dict[str, float]:
    """Block -> mean of log2 of its scale over the last quarter of the run."""
    rows = [record["block_scale"] for record in records[-max(1, len(records) // 4) :]]
    means = torch.tensor(rows, dtype=torch.float64, device="cpu").mean(0).tolist()
    names = [f"layers.{i // 2}.{('attention', 'mlp')[i % 2]}" for i in range(len(means))]
    return dict(zip(names, means, strict=True))
