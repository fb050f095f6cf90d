"""One decoding step of the prior at the 12b preset's width, 4 of its 64 layers and the head.

Theirs is the same prior in plain torch in bf16 with a dense static cache of text and image for each
candidate: eager, compiled as a whole with CUDA graphs (as gpt-fast does), or the same with
FlexAttention. Only for a GPU: on a CPU steps are measured in `bench_sampling.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import harness
from harness import Call, Case, Error, Ready

EAGER = "torch: SDPA, dense static cache"
FAST = "torch: SDPA, dense static cache, compiled as gpt-fast"
FLEX = "torch: FlexAttention, dense static cache, compiled as gpt-fast"
LAYERS, GOAL_MS = 4, 7.5  # of the whole 12b with 64 candidates, a step
SHORT = torch.bfloat16


class Dense(nn.Module):
    """The layers and the head in bf16; `previous` (S,), `slot` (1,) -> logits (S, K)."""

    def __init__(self, prior: Any, read: list[Any], samples: int, slot: int, flex: bool) -> None:
        super().__init__()
        c = prior.config
        self.text_len, self.heads = c.text_len, c.num_heads
        self.layers = copy.deepcopy(prior.layers).to(SHORT)
        self.norm, self.head = (copy.deepcopy(x).to(SHORT) for x in (prior.norm, prior.image_head))
        device = self.head.weight.device
        self.tables = nn.ParameterDict(
            {
                "tokens": prior.image_embedding.weight.detach().to(SHORT),
                "positions": prior.image_positions().detach().to(SHORT),
            }
        )
        masks = [pattern.mask().to(device) for pattern in prior.patterns]
        self.register_buffer("masks", torch.stack(masks))  # (layers, T + N, T + N)
        length = masks[0].shape[0]
        for index, kv in enumerate(read):  # buffers, whose addresses a CUDA graph may keep
            for name, given in (("keys", kv.keys), ("values", kv.values)):
                store = given.new_zeros(samples, *given.shape[1:2], length, given.shape[3])
                store = store.to(SHORT)
                store[:, :, : given.shape[2]] = given
                self.register_buffer(f"{name}{index}", store)
        self.blocks: list[Any] = []
        if flex:
            from torch.nn.attention.flex_attention import create_block_mask

            at = c.text_len + slot
            for mask in masks:
                row = mask[at].clone()
                self.blocks.append(
                    create_block_mask(
                        lambda b, h, q, k, row=row: row[k],
                        None,
                        None,
                        1,
                        length,
                        device=str(device),
                    )
                )

    def attend(self, index: int, q: Tensor, at: Tensor) -> Tensor:
        keys, values = getattr(self, f"keys{index}"), getattr(self, f"values{index}")
        if self.blocks:
            from torch.nn.attention.flex_attention import flex_attention

            return flex_attention(q.contiguous(), keys, values, block_mask=self.blocks[index])
        masks: Any = self.masks
        return sdpa(q, keys, values, attn_mask=masks[index].index_select(0, at)[None, None])

    def forward(self, previous: Tensor, slot: Tensor) -> Tensor:
        x = self.tables["tokens"][previous] + self.tables["positions"][slot]
        at = slot + self.text_len
        for index, layer in enumerate(self.layers):
            block: Any = layer
            one, two = block.attention, block.mlp
            q, k, v = one.qkv(one.norm(x)).view(len(x), 3, self.heads, 1, -1).unbind(1)
            getattr(self, f"keys{index}").index_copy_(2, at, k)
            getattr(self, f"values{index}").index_copy_(2, at, v)
            x = x + one.out(self.attend(index, q, at).reshape(x.shape))
            hidden = two.wide_in(two.norm(x))
            x = x + two.wide_out(hidden * torch.sigmoid(1.702 * hidden))
        logits: Tensor = self.head(self.norm(x))
        return logits


def sizes(scale: str) -> Any:
    """The preset with four layers, one of columns; in a dry run small."""
    from dalle.prior.config import PRESETS

    found = replace(PRESETS["12b"], num_layers=LAYERS, precision="bf16", checkpointing=False)
    if scale == "gpu":
        return found
    small = {"d_model": 32, "num_heads": 2, "text_len": 6, "grid": (4, 4), "kernel_size": 3}
    return replace(found, **small, text_vocab=64, image_vocab=64)


def ready(c: Any, samples: int, names: tuple[str, ...], device: str) -> Ready:
    from dalle.prior.decode import Decoder, prefill
    from dalle.prior.model import Prior

    torch.manual_seed(0)
    with torch.device(device):
        prior = Prior(c).eval()
    nn.init.normal_(prior.image_head.weight, std=c.d_model**-0.5)  # it starts at zero
    draw = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": draw, "device": device}
    text = torch.randint(c.text_vocab, (1, c.text_len - 1), **options)
    tokens = torch.randint(c.image_vocab, (1, c.num_image_tokens), **options)
    slot = c.num_image_tokens // 2
    previous = tokens[:, slot - 1].expand(samples).contiguous()

    @torch.no_grad()
    def build(name: str) -> Call:
        if name == "ours":
            decoder = Decoder(prior, 1, samples)
            decoder.set_text(text, tokens[:, :slot])
            return lambda: decoder.step(slot, previous[None])[0]
        read = prefill(prior, text, tokens[:, :slot])
        model: Any = Dense(prior, read, samples, slot, name == FLEX).eval()
        at = torch.tensor([slot], device=device)
        if name != EAGER:
            graphs = {} if harness.COMPILER else {"mode": "reduce-overhead", "fullgraph": True}
            model = torch.compile(model, dynamic=False, **(harness.COMPILER or graphs))
        return torch.no_grad()(lambda: model(previous, at))

    @torch.no_grad()
    def check(name: str, result: Tensor) -> Error:
        """Beside the forward pass of the same prior."""
        want = prior(text, tokens).image_logits[:, slot].float()
        far = (result.float() - want).norm(dim=-1).max() / want.norm()
        return Error(float(far), 0.03 if name == "ours" else 0.06)

    weights = sum(p.numel() for n, p in prior.named_parameters() if p.dim() == 2 and "layers" in n)
    weights += c.image_vocab * c.d_model
    seen = (c.text_len + samples * sum(o <= slot for o in p.offsets) for p in prior.patterns)
    moved = 2 * weights + 4 * c.d_model * sum(seen)  # keys and values, two bytes each
    calls = {name: partial(build, name) for name in ("ours", *names)}
    return Ready(calls, check, samples * 1e-3, "ktoken/s", moved, 2 * samples * weights, "bfloat16")


def cases(scale: str) -> Iterator[Case]:
    """With 64 candidates of a caption, and with one."""
    if scale == "cpu":
        return
    rivals = {EAGER: "eager", FAST: "rest", FLEX: "flex"}
    for samples in (64, 1):
        count = samples if scale == "gpu" else min(samples, 3)
        goal = GOAL_MS * 1e3 * LAYERS / 64 if samples == 64 else None
        what = f"decoding step of width 3968, {LAYERS} layers, S{samples}"
        yield Case(
            op="decode_step",
            what=what,
            ready=partial(ready, sizes(scale), count, tuple(rivals)),
            rivals=rivals,
            goal_us=goal,
        )
