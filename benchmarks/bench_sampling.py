"""Steps of drawing beside the matrix products alone, today's sampler of old, and dalle-pytorch.

The sampler of old is kept here: plain torch, some twenty calls a layer, every slot cached, guidance
in two passes. "products" are `torch.nn.functional.linear` with the weights of a step and nothing
else; "weights read" sums them once.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import harness
import rival_dalle_pytorch as rival
from dalle.prior.blocks import AttentionBlock, Layer, MlpBlock
from dalle.prior.config import PAD, PRESETS, PriorConfig
from dalle.prior.decode import Decoder, generate, prefill
from dalle.prior.model import Prior

SMALL = PriorConfig(  # 15 M parameters in its matrices
    text_vocab=8192, image_vocab=1024, text_len=64, grid=(16, 16), d_model=384, num_heads=6,
    num_layers=8,
)  # fmt: skip
CONFIGS = {"15 M": SMALL, "base": PRESETS["base"]}


@cache
def prior(name: str) -> Prior:
    torch.manual_seed(0)
    return Prior(CONFIGS[name]).eval()


def matrices(model: Prior) -> list[Tensor]:
    """The weights that a step multiplies, in order."""
    found = []
    for layer in model.layers:
        assert isinstance(layer, Layer)
        parts = layer.attention.qkv, layer.attention.out, layer.mlp.wide_in, layer.mlp.wide_out
        found += [part.weight.detach() for part in parts]
    return [*found, model.image_head.weight.detach()]


def products(model: Prior, rows: int) -> Callable[[], None]:
    weights = matrices(model)
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1]) for w in weights}

    @torch.inference_mode()
    def run() -> None:
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    return run


def reading(model: Prior) -> Callable[[], Tensor]:
    flat = torch.cat([weight.flatten() for weight in matrices(model)])
    return flat.sum


class Old:
    """The state of the sampler of old: one caption, S samples, every slot kept."""

    def __init__(self, model: Prior, text: Tensor, samples: int) -> None:
        self.model, self.samples = model, samples
        c = model.config
        self.text = prefill(model, text, text[:, :0])
        shape = 1, samples, c.num_heads, c.num_image_tokens, c.d_model // c.num_heads
        self.image = [(torch.zeros(shape), torch.zeros(shape)) for _ in self.text]
        self.positions = model.image_positions()

    def step(self, slot: int, previous: Tensor | None) -> Tensor:
        model = self.model
        if previous is None:
            x = model.start_of_image.expand(self.samples, 1, -1)
        else:
            x = model.image_widen(model.image_embedding(previous.reshape(-1, 1)))
        x = x + self.positions[slot]
        for index, layer in enumerate(model.layers):
            assert isinstance(layer.attention, AttentionBlock) and isinstance(layer.mlp, MlpBlock)
            x = layer.mlp(self.attend(index, layer.attention, slot, x))
        logits: Tensor = model.image_head(model.image_narrow(model.norm(x)))
        return logits.view(1, self.samples, -1)

    def attend(self, index: int, block: AttentionBlock, slot: int, x: Tensor) -> Tensor:
        query, key, value = block.project(x)
        image_keys, image_values = self.image[index]
        batch, samples, heads, _, size = image_keys.shape
        image_keys[:, :, :, slot] = key.view(batch, samples, heads, size)
        image_values[:, :, :, slot] = value.view(batch, samples, heads, size)
        pattern = self.model.patterns[index]
        columns = pattern.grid[1]
        seen: slice | Tensor
        if pattern.kind == "row":
            seen = slice(max(0, slot - columns), slot + 1)
        elif pattern.kind == "column":
            seen = slice(slot % columns, slot + 1, columns)
        else:
            seen = torch.tensor([slot - o for o in reversed(pattern.offsets) if o <= slot])
        queries = query.view(batch, samples, heads, 1, size)
        shared = queries[:, :, :, 0].transpose(1, 2)
        text = self.text[index]
        text_scores = (shared @ text.keys.transpose(-2, -1)).transpose(1, 2)
        image_scores = (queries @ image_keys[:, :, :, seen].transpose(-2, -1))[:, :, :, 0]
        weights = (torch.cat([text_scores, image_scores], -1) / math.sqrt(size)).softmax(-1)
        of_text, of_image = weights.split([text.keys.shape[2], image_scores.shape[-1]], -1)
        mixed = (of_text.transpose(1, 2) @ text.values).transpose(1, 2)
        mixed = mixed + (of_image[:, :, :, None] @ image_values[:, :, :, seen])[:, :, :, 0]
        return block.merge(x, mixed.reshape(batch * samples, heads, 1, size))


def caption(model: Prior) -> Tensor:
    return torch.randint(1, 99, (1, model.config.text_len - 1))


def stepper(model: Prior, samples: int, **options: Any) -> Callable[[], Tensor]:
    """A step in the middle of the grid."""
    decoder = Decoder(model, 1, samples, **options)
    at = model.config.num_image_tokens // 2
    given = torch.randint(0, model.config.image_vocab, (1, at))
    decoder.set_text(caption(model), given)
    previous = torch.randint(0, model.config.image_vocab, (1, samples))
    return lambda: decoder.step(at, previous)


def old_stepper(model: Prior, samples: int, guided: bool = False) -> Callable[[], Tensor]:
    text = caption(model)
    states = [Old(model, text, samples)]
    if guided:
        states.append(Old(model, torch.full_like(text, PAD), samples))
    at = model.config.num_image_tokens // 2
    previous = torch.randint(0, model.config.image_vocab, (1, samples))

    @torch.no_grad()
    def run() -> Tensor:
        return [state.step(at, previous) for state in states][-1]

    return run


def test_memory_does_not_grow_with_the_candidates() -> None:
    """Peak resident memory; the first test, since a peak never falls."""
    model = prior("15 M")
    text = caption(model)
    given = torch.randint(0, 99, (1, model.config.num_image_tokens - 2))  # two codes are drawn
    peaks = []
    for count in (8, 64, 512):
        generate(model, text, num_samples=count, prime=given)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print("peak MiB after 8, 64, 512 candidates:", [round(peak) for peak in peaks])
    assert peaks[2] < 1.1 * peaks[1]


def test_the_old_sampler_gives_the_same_logits() -> None:
    model = prior("15 M")
    text, previous = caption(model), torch.tensor([[1, 2]])
    new, old = Decoder(model, 1, 2), Old(model, text, 2)
    new.set_text(text)
    with torch.no_grad():
        for slot in range(3):
            before = previous if slot else None
            torch.testing.assert_close(new.step(slot, before), old.step(slot, before))


def test_64_candidates() -> None:
    for name in CONFIGS:
        model = prior(name)
        rivals = {"torch: products alone": products(model, 64), "old": old_stepper(model, 64)}
        what = f"a step of 64 candidates, {name}"
        goals = {"torch: products alone": 1 / 1.35}
        harness.compare(what, stepper(model, 64), rivals, goals=goals, work=64, unit="token/s")


def test_one_candidate() -> None:
    model = prior("15 M")
    rivals: dict[str, Callable[[], Any]] = {
        "weights read once": reading(model),
        "torch: products alone": products(model, 1),
        "old": old_stepper(model, 1),
    }
    goals = {"weights read once": 1 / 1.8, "old": 2.5}
    what = "a step of 1 candidate, 15 M"
    harness.compare(what, stepper(model, 1), rivals, goals=goals, work=1, unit="token/s")


def test_guidance() -> None:
    model = prior("15 M")
    rivals = {"without guidance": stepper(model, 64), "old": old_stepper(model, 64, guided=True)}
    ours = stepper(model, 64, cond_scale=2.0)
    goals = {"without guidance": 1 / 2.05}
    what = "a guided step of 64 candidates, 15 M"
    harness.compare(what, ours, rivals, goals=goals, work=64, unit="token/s")


def test_one_image() -> None:
    model = prior("15 M")
    text = caption(model)
    rivals: dict[str, Callable[[], Any]] = {}
    goals = {}
    if rival.installed():
        theirs = rival.build(
            dim=384, depth=8, heads=6, head_size=64, text_len=64, grid=16, text_vocab=8192
        )[0].eval()
        rival.keep_the_cache(theirs)
        full = torch.randint(1, 8192, (1, 64))
        rivals["dalle-pytorch, cache on"] = torch.no_grad()(
            lambda: theirs.generate_images(full, filter_thres=0.9, use_cache=True)
        )
        goals["dalle-pytorch, cache on"] = 15.0
    ours = lambda: generate(model, text)  # noqa: E731
    what = "one image of 256 tokens, 15 M"
    harness.compare(what, ours, rivals, goals=goals, work=1, unit="image/s", rounds=3)
