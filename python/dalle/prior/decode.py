"""Drawing images token by token with a cache (paper 2.6).

`Decoder` holds the cache and the buffers of a step; `draw_parts` cuts the work into parts that
fit, and is the one place that does; `generate` collects what it draws.

Letters: B captions, S samples of each, R = B * S rows (twice as many with guidance), H heads, D
head size, d width, N image slots, K image vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dalle_ext
from dalle.configs import check_options, field_names, integer
from dalle.devices import without_autocast
from dalle.errors import NumericalError, UsageError
from dalle.prior.blocks import KeysValues
from dalle.prior.config import PAD
from dalle.prior.sampling import (
    DrawConfig,
    SamplingConfig,
    all_finite,
    caption_key,
    checked_bits,
    draw,
    uniform_noise,
)
from dalle.prior.step import ROWS, Step, SupportsDecoding, check_weights, require_cache

Progress = Callable[[int, int], None]


class Decoder:
    """Draws B * S images side by side, slot after slot, in buffers that stay where they are.

    With guidance, rows without the caption stand in the same batch. What a row computes does not
    depend on the others: see docs/sampling.md for where that holds bit for bit.

    Args:
        prior: in evaluation mode, and not trained while this lives.
        captions: B.
        samples: S.
        cond_scale: of `SamplingConfig`; 0 and 1 cost no second branch.
        weights: "fp32", or "bf16" on a CPU with bf16 dot products: the matrices and what they
            multiply are rounded to it.
        max_batch: on a GPU, whose library gives a row other bits among another number of rows,
            products always have so many (twice with guidance). None: B * S.
        cache_bits: of `SamplingConfig`.

    Attributes:
        batch, samples, slots, vocab: B, S, N, K.
        num_bytes: bytes of the image keys and values of all rows.

    Raises:
        UsageError: a number or `weights` out of range.
        EnvironmentProblem: no bf16 dot products here, or too little memory for the cache.
    """

    @torch.no_grad()
    def __init__(
        self,
        prior: SupportsDecoding,
        captions: int,
        samples: int,
        *,
        cond_scale: float = 1.0,
        weights: str = "fp32",
        max_batch: int | None = None,
        cache_bits: int | None = None,
    ) -> None:
        self.prior = prior
        self.cond_scale = SamplingConfig(cond_scale=cond_scale).cond_scale  # checks it
        self.batch = integer("Decoder", "captions", captions, 1)
        self.samples = integer("Decoder", "samples", samples, 1)
        self.slots, self.vocab = prior.config.num_image_tokens, prior.config.image_vocab
        self.guided = cond_scale not in (0, 1)
        bits = checked_bits("Decoder", cache_bits)
        self._next: range | None = None  # the slots that `step` may take
        if max_batch is not None:
            max_batch = integer("Decoder", "max_batch", max_batch, 1)
        device = prior.start_of_text.device
        count, branches = self.batch * self.samples, 1 + self.guided
        rows = ROWS if device.type == "cpu" else max(count, max_batch or 0) * branches
        require_cache(prior, count, self.guided, bits)
        self._step = Step(prior, self.batch * branches, self.samples, rows, weights, bits)

    @property
    def num_bytes(self) -> int:
        """Bytes of the image keys and values of all rows."""
        return self._step.num_bytes

    @torch.no_grad()
    def set_text(self, text: Tensor, prime: Tensor | None = None) -> None:
        """Reads other captions; the next step is that of the first slot not given.

        Args:
            text: (B, text_len - 1) int64 with PAD.
            prime: (B, n) int64, the first n tokens of every sample of a caption, n < N.

        Raises:
            UsageError: shapes or tokens that do not fit.
        """
        self.prior.check_text(text)
        if len(text) != self.batch:
            raise UsageError(f"Decoder: text must have {self.batch} rows, got {len(text)}")
        prime = text.new_empty(self.batch, 0) if prime is None else prime
        check_prime(self.prior, prime, self.batch)
        device = self.prior.start_of_text.device
        text, prime = text.to(device), prime.to(device)
        none = torch.full_like(text[:1], PAD)
        branches = [none.expand_as(text) if self.cond_scale == 0 else text]
        if self.guided:
            branches.append(none.expand_as(text))
        # One caption at a time: its keys do not depend on its neighbours. Equal ones are read once.
        known: dict[bytes, list[KeysValues]] = {}
        read = []
        for branch in branches:
            for row, given in zip(branch, prime, strict=True):
                key = torch.cat([row, given]).cpu().numpy().tobytes()
                if key not in known:
                    with without_autocast(text):  # the prior computes in a dtype of its own
                        known[key] = prefill(self.prior, row[None], given[None])
                read.append(known[key])
        self._step.fill(read, prime.shape[1])
        self._next = range(prime.shape[1], prime.shape[1] + 1)

    @torch.no_grad()
    def step(self, slot: int, previous: Tensor | None) -> Tensor:
        """Logits of the token at `slot`, guided where `cond_scale` says so.

        Args:
            slot: slots come in order, from the first that was not given; the last one may come
                again, its key is written anew.
            previous: (B, S) int64, tokens of slot - 1; None at slot 0.

        Returns:
            (B, S, K) fp32, overwritten by the next step.

        Raises:
            UsageError: a slot out of range or order, tokens that do not fit, or no `set_text`.
        """
        slot = integer("Decoder", "slot", slot)
        if not 0 <= slot < self.slots:
            raise UsageError(f"Decoder: slot must be 0 .. {self.slots - 1}, got {slot}")
        if (previous is None) != (slot == 0):
            got = "None" if previous is None else "tokens"
            raise UsageError(f"Decoder: previous must be None at slot 0 alone, got {got} at {slot}")
        if previous is not None:
            want = (self.batch, self.samples)
            if isinstance(previous, Tensor) and tuple(previous.shape) != want:
                raise UsageError(f"Decoder: previous must be {want}, got {tuple(previous.shape)}")
            self.prior.check_image_tokens(previous, self.samples, self.batch)
        if self._next is None:
            raise UsageError("Decoder: set_text must be called before step, got no text")
        if slot not in self._next:
            order = " or ".join(map(str, self._next))
            raise UsageError(f"Decoder: slot must be {order}, slots come in order, got {slot}")
        logits = self._step(slot, previous)  # (G * B, S, K)
        self._next = range(slot, min(slot + 2, self.slots))
        if self.guided:
            logits, base = logits.view(2, self.batch, self.samples, -1).unbind(0)
            logits = base + self.cond_scale * (logits - base)
        return logits

    @torch.no_grad()
    def reorder(self, index: Tensor) -> None:
        """Makes sample s of caption b a copy of its sample index[b, s], in all branches.

        Args:
            index: (B, S) int64 in 0 .. S - 1.

        Raises:
            UsageError: another shape or dtype, or a number out of range.
        """
        want = (self.batch, self.samples)
        if tuple(index.shape) != want or index.dtype != torch.int64:
            got = f"{tuple(index.shape)} {index.dtype}"
            raise UsageError(f"Decoder: index must be {want} int64, got {got}")
        if index.device.type == "cpu" and not 0 <= int(index.min()) <= int(index.max()) < want[1]:
            got = f"{int(index.min())} .. {int(index.max())}"
            raise UsageError(f"Decoder: index must lie in 0 .. {want[1] - 1}, got {got}")
        self._step.reorder(index.repeat(1 + self.guided, 1))


def prefill(prior: SupportsDecoding, text: Tensor, prime: Tensor) -> list[KeysValues]:
    """Keys and values of every layer, (B, H, text_len + n, D), of captions and n given tokens."""
    c = prior.config
    x, given = prior.embed_text(text), prime.shape[1]
    if not given:
        text_only = dalle_ext.AttentionPattern("causal", text_len=c.text_len - 1, grid=(1, 1))
        return prior.run_layers(x, (text_only,) * c.num_layers)[1]
    # Attention is causal: the filler after the prime has no effect.
    filler = prime.new_zeros(len(prime), c.num_image_tokens - given)
    x = torch.cat([x, prior.embed_image(torch.cat([prime, filler], 1))], 1)
    _, read = prior.run_layers(x, prior.patterns)
    length = c.text_len + given
    return [KeysValues(kv.keys[:, :, :length], kv.values[:, :, :length]) for kv in read]


@dataclass(frozen=True)
class Drawn:
    """What a part has drawn after a step.

    Attributes:
        captions, samples: which of the call: rows of `text`, columns of the result.
        slots: image slots that are filled.
        tokens: (b, s, N) int64 on the prior's device; those behind `slots` mean nothing. The next
            step writes into it.
        done: whether the part is finished.
        part, parts: number of the part, and how many there are.
    """

    captions: range
    samples: range
    slots: int
    tokens: Tensor
    done: bool
    part: int
    parts: int


def draw_parts(
    prior: SupportsDecoding, text: Tensor, config: DrawConfig, prime: Tensor | None = None
) -> Generator[Drawn]:
    """Draws like `generate`, and hands over after every step what there is.

    A part is the samples of as many captions as `max_batch` holds, or some samples of one caption.
    Closing the iterator ends the work and puts the prior's mode back.

    Raises:
        UsageError: shapes or token ranges that do not fit; before anything is drawn.
        NumericalError: logits that are NaN or infinite.
    """
    prior.check_text(text)
    first = config.first(len(text))
    prime = text.new_empty(len(text), 0) if prime is None else prime
    check_prime(prior, prime, len(text))
    check_weights(config.weights, prior.start_of_text.device)
    count, width = config.num_samples, min(config.num_samples, config.max_batch)
    height = max(1, config.max_batch // width)
    parts = [
        (range(top, min(top + height, len(text))), range(left, min(left + width, count)))
        for top in range(0, len(text), height)
        for left in range(0, count, width)
    ]
    return _drawn(prior, text, config, prime, first, parts)


def decoder_options(config: DrawConfig, max_batch: int) -> dict[str, Any]:
    """Keywords of `Decoder`."""
    sampling = config.sampling
    how = {"cond_scale": sampling.cond_scale, "cache_bits": sampling.cache_bits}
    return {**how, "weights": config.weights, "max_batch": max_batch}


def _drawn(
    prior: SupportsDecoding,
    text: Tensor,
    config: DrawConfig,
    prime: Tensor,
    first: list[int],
    parts: list[tuple[range, range]],
) -> Generator[Drawn]:
    """The work of `draw_parts`, whose arguments have been checked."""
    sampling = config.sampling
    device, slots = prior.start_of_text.device, prior.config.num_image_tokens
    # With a scale of 0 all captions are the empty one.
    keys = [caption_key(row[:0] if sampling.cond_scale == 0 else row) for row in text.cpu()]
    training = prior.training
    prior.eval()
    decoder: Decoder | None = None
    try:
        for number, (rows, columns) in enumerate(parts):
            shape = len(rows), len(columns)
            if decoder is None or (decoder.batch, decoder.samples) != shape:
                del decoder  # its cache goes before the next one comes
                decoder = Decoder(prior, *shape, **decoder_options(config, config.max_batch))
            inside = slice(rows.start, rows.stop)
            decoder.set_text(text[inside], prime[inside])
            each = [(r, range(first[r] + columns.start, first[r] + columns.stop)) for r in rows]
            drawn_from = [uniform_noise(config.seed, keys[row], own, slots) for row, own in each]
            noise = torch.stack(drawn_from, -1)  # (s, N, b)
            noise = noise.permute(1, 2, 0).contiguous().to(device)  # (N, b, s)
            tokens = torch.empty(*shape, slots, dtype=torch.int64, device=device)
            given = prime.shape[1]
            tokens[:, :, :given] = prime[inside, None].to(device)
            # Read once, at the end: reading it makes the host wait for a GPU.
            finite = torch.ones((), dtype=torch.bool, device=device)
            for slot in range(given, slots):
                with torch.no_grad():
                    logits = decoder.step(slot, tokens[:, :, slot - 1] if slot else None)
                    finite &= all_finite(logits)
                    drawn = draw(logits.flatten(0, 1), noise[slot].flatten(), sampling)
                    tokens[:, :, slot] = drawn.view(shape)
                done = slot + 1 == slots
                if done and not finite:
                    raise not_finite(sampling)
                yield Drawn(rows, columns, slot + 1, tokens, done, number, len(parts))
    finally:
        prior.train(training)


def not_finite(sampling: SamplingConfig) -> NumericalError:
    scale = sampling.cond_scale
    hint = "" if scale in (0, 1) else f"; cond_scale {scale} may be too large"
    return NumericalError(f"generate: logits must be finite, got NaN or infinity{hint}")


def generate(
    prior: SupportsDecoding,
    text: Tensor,
    *,
    prime: Tensor | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Tensor:
    """Draws image tokens for captions.

    Args:
        prior: the model; its mode is put back afterwards.
        text: (B, text_len - 1) int64, PAD where there is no token; not changed.
        prime: (B, n) int64, the first n tokens of each image in raster order, kept as they are.
        progress: called as progress(tokens drawn, tokens in all).
        options: of `DrawConfig`. The caption-free branch of guidance reads padding only, so train
            with `caption_dropout` for scales above 1.

    Returns:
        (B, num_samples, rows, columns) int64 on the CPU.

    Raises:
        UsageError: shapes, token ranges or options that do not fit.
        NumericalError: logits that are NaN or infinite.
    """
    check_options("generate", options, (*field_names(DrawConfig), "prime", "progress"))
    config = DrawConfig(**options)
    steps = draw_parts(prior, text, config, prime)
    slots = prior.config.num_image_tokens
    out = torch.empty(len(text), config.num_samples, slots, dtype=torch.int64, device="cpu")
    for drawn in steps:
        if progress is not None:
            progress(drawn.part * slots + drawn.slots, drawn.parts * slots)
        if drawn.done:
            rows, columns = drawn.captions, drawn.samples
            out[rows.start : rows.stop, columns.start : columns.stop] = drawn.tokens.cpu()
    return out.view(len(text), config.num_samples, *prior.config.grid)


def check_prime(prior: SupportsDecoding, prime: Tensor, batch: int) -> None:
    """Raises UsageError unless prime is (batch, n) tokens with a slot left to draw."""
    slots = prior.config.num_image_tokens
    if not isinstance(prime, Tensor):
        raise UsageError(f"generate: prime must be a tensor, got {type(prime).__name__}")
    if prime.dim() != 2 or len(prime) != batch or prime.shape[1] >= slots:
        want = f"({batch}, n) with n below {slots} for the grid {prior.config.grid}"
        raise UsageError(f"generate: prime must be {want}, got {tuple(prime.shape)}")
    prior.check_image_tokens(prime, prime.shape[1], batch)
