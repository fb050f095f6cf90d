"""From logits to tokens: temperature, top-k, top-p, and noise that does not depend on the batch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle.configs import Named, integer
from dalle.errors import UsageError
from dalle_ext import _checks
from dalle_ext._checks import real

MAX_SEED = 2**63 - 1  # as in training
RESAMPLING, CHOOSING = 1, 2  # purposes of noise beside drawing tokens, which is 0
MAX_BATCH = 64  # images drawn at a time; more make a step hardly more efficient, and a larger cache
MIN_TEMPERATURE = 1e-37  # of float32; no two logits are so near that a lower one changes a draw


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Named):
    """How a token is drawn from its logits.

    Args:
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: only the k likeliest tokens.
        top_p: only the likeliest tokens that together have this probability.
        cond_scale: classifier-free guidance, logits = without + cond_scale * (with - without) the
            caption. 1 is none, 0 ignores the caption; neither costs a second pass.
        cache_bits: 8 keeps image keys and values of column and causal layers in 8 bits, which
            changes logits a little; None as they are.

    Raises:
        UsageError: a number out of range, or no such option.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    cond_scale: float = 1.0
    cache_bits: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache_bits", checked_bits("generate", self.cache_bits))
        if not 0 <= real(self.temperature) < math.inf:
            raise UsageError(f"generate: temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None:
            want = "a whole number of at least 1"
            _checks.integer("generate", "top_k", self.top_k, 1, requirement=want, error=UsageError)
        if self.top_p is not None and not 0 < real(self.top_p) <= 1:
            raise UsageError(f"generate: top_p must be in (0, 1], got {self.top_p}")
        if not math.isfinite(real(self.cond_scale)):
            raise UsageError(f"generate: cond_scale must be a finite number, got {self.cond_scale}")
        for name in ("temperature", "top_p", "cond_scale"):  # torch refuses very large integers
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else real(value))

    @property
    def guided(self) -> bool:
        """Whether there is a second branch, without the caption."""
        return self.cond_scale not in (0, 1)


def checked_bits(owner: str, bits: Any) -> int | None:
    """`cache_bits`, None or 8; UsageError for anything else."""
    if bits is None:
        return None
    want = "8 or left out"
    return _checks.integer(owner, "cache_bits", bits, 8, 9, requirement=want, error=UsageError)


def check_sampling(owner: str, sampling: Any) -> None:
    """Raises UsageError for what is no `SamplingConfig`."""
    if not isinstance(sampling, SamplingConfig):
        got = type(sampling).__name__
        raise UsageError(f"{owner}: sampling must be a SamplingConfig, got {got}")


PAPER = SamplingConfig()  # samples the distribution itself


@dataclass(frozen=True, kw_only=True)
class DrawConfig(Named):
    """Which samples of a caption are drawn, and how: one object down to the decoder.

    Args:
        num_samples: S, images of each caption.
        sampling: how a token is drawn.
        seed: the noise is a function of (seed, caption, number of the sample, step) alone, so an
            image does not depend on what else is drawn, nor on `max_batch`. A caption that comes
            twice gets the same images twice. With `cond_scale` 0 all captions are the empty one.
        first_sample: number of the first sample, to continue an earlier call; or one number for
            each caption.
        max_batch: images drawn at a time.
        weights: "fp32", or "bf16" on a CPU with bf16 dot products.

    Raises:
        UsageError: a number out of range; `first_sample` and `weights` are checked where captions
            and device are known.
    """

    num_samples: int = 1
    sampling: SamplingConfig = PAPER
    seed: int = 0
    first_sample: int | Sequence[int] = 0
    max_batch: int = MAX_BATCH
    weights: str = "fp32"

    def __post_init__(self) -> None:
        check_sampling("generate", self.sampling)
        for name, least, most in (
            ("num_samples", 1, None),
            ("max_batch", 1, None),
            ("seed", 0, MAX_SEED),
        ):
            value = integer("generate", name, getattr(self, name), least, most)
            object.__setattr__(self, name, value)

    def first(self, batch: int) -> list[int]:
        """The number of each caption's first sample; UsageError where `first_sample` is wrong."""
        return first_numbers("generate", "first_sample", self.first_sample, batch)


@dataclass(frozen=True, kw_only=True)
class SamplingChanges(Named):
    """What to change of a pipeline's `SamplingConfig`; None takes the pipeline's own.

    Args:
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: only the k likeliest tokens; as many as there are codes, or more, takes all.
        top_p: only the likeliest tokens that together have this probability; 1 takes all.
        cond_scale: classifier-free guidance; 1 is none.
        cache_bits: 8 keeps a part of the cache in 8 bits (docs/sampling.md): less memory, and codes
            of nearly equal chance may change.

    Raises:
        UsageError: a number out of range.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    cond_scale: float | None = None
    cache_bits: int | None = None

    def __post_init__(self) -> None:
        self.applied(PAPER)  # checks the ranges

    def applied(self, sampling: SamplingConfig) -> SamplingConfig:
        """`sampling` with these changes; UsageError where it is no `SamplingConfig`."""
        check_sampling("generate", sampling)
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return replace(sampling, **given)


def filter_logits(
    logits: Tensor, *, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Sets the logits of tokens that must not be drawn to -inf.

    Args:
        logits: (..., K).
        top_k: keep the k largest; ties with the k-th are kept.
        top_p: then keep the fewest largest whose probability together is at least top_p, one at
            least; of equal ones those of smaller index.

    Returns:
        (..., K), a new tensor unless neither option has an effect.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < _largest(logits, top_k), -math.inf)
    if top_p is not None and top_p < 1:
        logits = logits.masked_fill(~_nucleus(logits, top_p), -math.inf)
    return logits


def _largest(logits: Tensor, k: int) -> Tensor:
    """The k-th largest of each row, (..., 1)."""
    if logits.device.type != "cpu":
        return logits.topk(k, dim=-1).values[..., -1:]
    at = logits.shape[-1] - k  # NumPy selects by vectors: 0.3 ms where torch takes 1 to 3
    values = np.partition(_wide(logits).detach().numpy(), at, axis=-1)[..., at : at + 1]
    return torch.from_numpy(values.copy())


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Which tokens top_p keeps: (..., K) bool."""
    chances = _wide(logits).detach().softmax(-1)
    if chances.device.type == "cpu":  # NumPy sorts by vectors: 0.8 ms where torch takes 13
        ordered = torch.from_numpy(np.sort(chances.numpy(), axis=-1)).flip(-1)
    else:
        ordered = chances.sort(dim=-1, descending=True).values
    before = ordered.cumsum(-1) - ordered
    count = (before < top_p).sum(-1, keepdim=True).clamp(min=1)
    least = ordered.gather(-1, count - 1)
    kept = chances >= least
    over = kept.sum(-1, keepdim=True) - count  # as likely as the last one, and without a place
    if chances.device.type == "cpu" and not bool(over.any()):
        return kept
    equal = chances == least
    room = equal.sum(-1, keepdim=True) - over
    return kept & ~(equal & (equal.cumsum(-1) > room))


def all_finite(logits: Tensor) -> Tensor:
    """() bool: no NaN and no infinity. An extreme is NaN where any number is."""
    low, high = torch.aminmax(logits)
    return low.isfinite() & high.isfinite()


def draw(logits: Tensor, noise: Tensor, sampling: SamplingConfig = PAPER) -> Tensor:
    """Draws one token per row by inverting the cumulative distribution.

    Equivalent to `torch.multinomial(filter_logits(logits / temperature).softmax(-1), 1)` with the
    randomness given; temperature 0 takes the largest logit.

    Args:
        logits: (B, K).
        noise: (B,) float64, uniform in [0, 1).
        sampling: its `cond_scale` has been applied.

    Returns:
        (B,) int64.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scaled = logits.float()
    if sampling.temperature != 1:
        # Relative to the maximum, divided by a normal number: no temperature makes them infinite.
        scaled = scaled - scaled.amax(-1, keepdim=True)
        scaled /= max(float(sampling.temperature), MIN_TEMPERATURE)
    filtered = filter_logits(scaled, top_k=sampling.top_k, top_p=sampling.top_p)
    cumulative = filtered.softmax(-1).cumsum(-1, dtype=torch.float64)
    whole = cumulative[:, -1:].contiguous()
    target = noise[:, None].to(whole.device) * whole
    index = torch.searchsorted(cumulative, target, right=True)
    # Rounding must not reach a token behind the last one that may be drawn, where the sum is whole.
    last = torch.searchsorted(cumulative, whole)
    return torch.minimum(index, last)[:, 0].clamp(max=logits.shape[-1] - 1)  # beyond it: of NaN


def log_likelihood(logits: Tensor, tokens: Tensor, sampling: SamplingConfig = PAPER) -> Tensor:
    """Log of the chance with which `draw` takes given tokens; at temperature 0 that of 1.

    Args:
        logits: (..., K).
        tokens: (...) int64 in 0 .. K - 1.
        sampling: its `cond_scale` has been applied.

    Returns:
        (...) float64, in nats; -inf where top_k or top_p leaves a token out.
    """
    relative = logits.double() - logits.amax(-1, keepdim=True).double()
    scaled = relative / max(float(sampling.temperature) or 1.0, MIN_TEMPERATURE)
    filtered = filter_logits(scaled, top_k=sampling.top_k, top_p=sampling.top_p)
    return filtered.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def first_numbers(owner: str, name: str, first: Any, batch: int) -> list[int]:
    """The number of each caption's first sample: `first` for all, or one for each of `batch`.

    Raises:
        UsageError: another count of them, no whole number, or not in 0 .. 2^63 - 1.
    """
    numbers = list(first) if np.ndim(first) else [first] * batch
    if len(numbers) != batch:
        raise UsageError(
            f"{owner}: {name} must be one number or one for each of {batch} captions, "
            f"got {len(numbers)}"
        )
    return [integer(owner, name, number, 0, MAX_SEED) for number in numbers]


def caption_key(tokens: Tensor) -> int:
    """A 64-bit number for one caption, (length,) ids; padding behind it does not count."""
    ids = tokens.cpu().numpy()
    used = len(ids) - int((ids[::-1] >= 0).argmax()) if (ids >= 0).any() else 0
    digest = hashlib.blake2b(ids[:used].astype("<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniform_noise(seed: int, caption: int, samples: range, steps: int, purpose: int = 0) -> Tensor:
    """(len(samples), steps) float64 in [0, 1): a pure function of (seed, caption, sample, step).

    Philox4x64-10 (Salmon et al. 2011) with the key (seed, caption) and the counter
    (call, 0, sample, purpose): step t is the top 53 bits of word t % 4 of call t // 4 + 1. So no
    two of these streams meet, and a number depends on no other sample, caption or batch.

    Args:
        seed: 0 .. `MAX_SEED`.
        caption: its `caption_key`.
        samples: numbers of the samples, 0 .. 2^64 - 1.
        steps: numbers drawn of each stream.
        purpose: 0 for tokens; `RESAMPLING` and `CHOOSING` of an edit, where the sample is the first
            of its group.
    """
    key = np.array([seed, caption], dtype=np.uint64)
    counters = (purpose << 192 | s << 128 for s in samples)
    rows = [np.random.Philox(key=key, counter=c).random_raw(steps) for c in counters]
    words = np.stack(rows) if rows else np.empty((0, steps), np.uint64)
    return torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)
