"""Sampling with a cache equals sampling without; guidance, priming, seeds, refused input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dalle_ext
from dalle.errors import EnvironmentProblem, NumericalError, UsageError
from dalle.prior.config import PAD
from dalle.prior.decode import Decoder, generate
from dalle.prior.sampling import SamplingConfig, caption_key, draw, uniform_noise
from dalle.prior.step import Step, candidate_bytes
from dalle_ext.ops.sparse_attention import KINDS
from support.prior import make, sample

MIXED = ("row", "column", "conv")


def uncached(model, text, *, samples, seed, cond_scale=1.0, prime=None, **options):
    """Sampling with the training forward at every step: the definition of `generate`."""
    slots = model.config.num_image_tokens
    keys = [caption_key(row if cond_scale else row[:0]) for row in text]  # 0 ignores the caption
    noise = torch.cat([uniform_noise(seed, key, range(samples), slots) for key in keys])
    text = text.repeat_interleave(samples, 0)
    tokens = torch.zeros(len(text), slots, dtype=torch.int64)
    start = 0
    if prime is not None:
        start = prime.shape[1]
        tokens[:, :start] = prime.repeat_interleave(samples, 0)
    for slot in range(start, slots):
        with torch.no_grad():
            logits = model(text, tokens).image_logits[:, slot]
            if cond_scale != 1:
                base = model(torch.full_like(text, PAD), tokens).image_logits[:, slot]
                logits = base + cond_scale * (logits - base)
        tokens[:, slot] = draw(logits, noise[:, slot], SamplingConfig(**options))
    return tokens.view(-1, samples, *model.config.grid)


@pytest.mark.parametrize("attention", [*((kind,) * 3 for kind in KINDS), MIXED, ()])
@pytest.mark.parametrize("given", [0, 1, 5])
def test_cached_logits_equal_uncached(attention, given):
    model = make(attention=attention, grid=(4, 5))
    text, image = sample(model, batch=3)
    with torch.no_grad():
        wanted = model(text, image).image_logits
        state = Decoder(model, 3, 2)
        state.set_text(text, image[:, :given])
        for slot in range(given, 20):
            previous = image[:, None, slot - 1].expand(-1, 2) if slot else None
            logits = state.step(slot, previous)
            for copy in range(2):
                torch.testing.assert_close(logits[:, copy], wanted[:, slot], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("cond_scale", [1.0, 2.0])
def test_reordered_samples_go_on_as_copies(cond_scale):
    """And a decoder that is given other captions has forgotten the ones before."""
    model = make(attention=("row", "column", "causal"))
    text, image = sample(model, batch=2)
    with torch.no_grad():
        wanted = model(text, image).image_logits
        if cond_scale != 1:
            base = model(torch.full_like(text, PAD), image).image_logits
            wanted = base + cond_scale * (wanted - base)
    decoder = Decoder(model, 2, 3, cond_scale=cond_scale)
    index = torch.tensor([[2, 2, 0], [1, 1, 1]])
    for _ in range(2):  # the second time over what the first has left
        decoder.set_text(text, image[:, :2])
        for slot in range(2, 12):
            if slot == 6:
                decoder.reorder(index)
            previous = image[:, None, slot - 1].repeat(1, 3)
            if slot < 6:  # the sample that is copied has the tokens, the others have not
                previous = torch.where(
                    torch.tensor([[False, False, True], [False, True, False]]), previous, 0
                )
            logits = decoder.step(slot, previous)
            for caption, copy in ((0, 0), (0, 1), (1, 0), (1, 2)) if slot >= 6 else ():
                torch.testing.assert_close(
                    logits[caption, copy], wanted[caption, slot], atol=1e-4, rtol=1e-4
                )


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda d, t: Decoder(d.prior, 0, 1), "Decoder: captions must be 1 or more, got 0"),
        (lambda d, t: Decoder(d.prior, 1, 0), "Decoder: samples must be 1 or more, got 0"),
        (lambda d, t: d.set_text(t[:1]), "Decoder: text must have 2 rows, got 1"),
        (lambda d, t: d.step(12, t[:, :1]), "Decoder: slot must be 0 .. 11, got 12"),
        (lambda d, t: d.step(-1, t[:, :1]), "Decoder: slot must be 0 .. 11, got -1"),
        (lambda d, t: d.step(1, None), "previous must be None at slot 0 alone, got None at 1"),
        (lambda d, t: d.step(1, t), r"Decoder: previous must be \(2, 1\), got \(2, 4\)"),
        (lambda d, t: d.step(1, [[1], [1]]), r"image_tokens must be \(2, 1\) int64 .*, got list"),
        (lambda d, t: d.step(1, t[:, :1].float()), "image_tokens must be .*torch.float32"),
        (lambda d, t: d.step(1, t[:, :1] * 0 + 7), "image_tokens must lie in 0 .. 6, got 7"),
        (lambda d, t: d.step(0, None), "Decoder: set_text must be called before step, got no text"),
        (lambda d, t: d.step(1.5, t[:, :1]), "Decoder: slot must be a whole number, got 1.5"),
        (lambda d, t: Decoder(d.prior, 1, 1, max_batch=0), "max_batch must be 1 or more, got 0"),
        (lambda d, t: Decoder(d.prior, 1, 1, max_batch=True), "max_batch must be a whole number"),
        (lambda d, t: d.set_text([1]), r"Prior: text must be \(B, 4\) int64, got list"),
        (lambda d, t: d.set_text(t, [1]), "generate: prime must be a tensor, got list"),
        (lambda d, t: Decoder(d.prior, 1, 1, cond_scale="x"), "cond_scale must be a finite number"),
        (
            lambda d, t: generate(d.prior, t, sampling={}),
            "sampling must be a SamplingConfig, got d",
        ),
        (lambda d, t: d.reorder(t), r"Decoder: index must be \(2, 1\) int64, got \(2, 4\)"),
        (lambda d, t: d.reorder(t[:, :1] * 0 + 1), "Decoder: index must lie in 0 .. 0, got 1"),
    ],
)
def test_a_decoder_refuses_what_does_not_fit(call, line):
    model = make()
    text, _ = sample(model)
    with pytest.raises(UsageError, match=line):
        call(Decoder(model, 2, 1), text)


def test_cached_equals_uncached_with_a_narrow_table():
    model = make(image_rank=6)
    text, _ = sample(model)
    found = model.generate(text, num_samples=2, seed=5)
    assert torch.equal(found, uncached(model, text, samples=2, seed=5))


def test_cached_bf16_is_near_uncached():
    model = make(precision="bf16")
    text, image = sample(model)
    with torch.no_grad():
        wanted = model(text, image).image_logits
        state = Decoder(model, 2, 1)
        state.set_text(text)
        for slot in range(12):
            logits = state.step(slot, image[:, slot - 1 : slot] if slot else None)
            torch.testing.assert_close(logits[:, 0], wanted[:, slot], atol=0.05, rtol=0.05)


def test_the_cache_is_really_used(monkeypatch):
    model = make()
    lengths = []
    attend = dalle_ext.sparse_attention_qkvpacked
    monkeypatch.setattr(
        dalle_ext,
        "sparse_attention_qkvpacked",
        lambda qkv, *a: lengths.append(qkv.shape[1]) or attend(qkv, *a),
    )
    generate(model, sample(model)[0], num_samples=3)
    assert lengths == [5] * 6  # the text of each caption, three layers, and nothing after


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7, "top_k": 4}, {"top_p": 0.8}, {"temperature": 0}, {"cond_scale": 2.5}],
)
def test_generate_equals_sampling_without_a_cache(options):
    model = make()
    text, _ = sample(model)
    found = model.generate(text, num_samples=3, seed=5, **options)
    assert found.shape == (2, 3, 3, 4) and found.dtype == torch.int64
    assert torch.equal(found, uncached(model, text, samples=3, seed=5, **options))


def test_seed_decides_and_the_batch_does_not():
    model = make()
    text, _ = sample(model, batch=3)
    base = model.generate(text, num_samples=4, seed=9)
    assert torch.equal(base, model.generate(text, num_samples=4, seed=9))
    assert not torch.equal(base, model.generate(text, num_samples=4, seed=10))
    assert torch.equal(base[1:2], model.generate(text[1:2], num_samples=4, seed=9))
    assert torch.equal(base[:, :2], model.generate(text, num_samples=2, seed=9))
    assert torch.equal(base[:, 2:], model.generate(text, num_samples=2, seed=9, first_sample=2))
    for max_batch in (1, 3, 5, np.int64(100)):
        assert torch.equal(base, model.generate(text, num_samples=4, seed=9, max_batch=max_batch))
    again = model.generate(text.flip(0), num_samples=2, seed=9, first_sample=np.array([2, 0, 1]))
    assert torch.equal(again[0], base[2, 2:]) and torch.equal(again[2], base[0, 1:3])


@pytest.mark.parametrize(
    "options",
    [{"prime": 4}, {"cond_scale": 2.0}, {"top_k": np.int64(3)}, {"top_p": 0.8, "prime": 5}],
)
def test_a_sample_is_the_same_alone_and_among_others(options):
    model = make()
    text, image = sample(model, batch=3)
    given = options.pop("prime", 0)
    options["seed"] = 2**40
    many = model.generate(text, num_samples=5, max_batch=4, prime=image[:, :given], **options)
    for caption, number in ((0, 4), (2, 1)):
        row = slice(caption, caption + 1)
        alone = model.generate(text[row], first_sample=number, prime=image[row, :given], **options)
        assert torch.equal(alone[0, 0], many[caption, number])


def test_two_captions_have_noise_of_their_own():
    """With logits that do not depend on the caption, samples of two captions still differ."""
    model = make()
    text, _ = sample(model, batch=2)
    with torch.no_grad():
        for weight in (model.image_head.weight, model.image_head.bias):
            weight.zero_()
    found = model.generate(text, num_samples=2, seed=0)
    assert not torch.equal(found[0], found[1])
    assert torch.equal(*model.generate(text[[0, 0]], num_samples=2, seed=0))


def test_scale_one_is_no_guidance_and_costs_nothing(monkeypatch):
    model = make()
    text, _ = sample(model)
    plain = model.generate(text, num_samples=2, seed=1)
    made = []
    build = Step.__init__
    monkeypatch.setattr(Step, "__init__", lambda s, p, *a: made.append(a) or build(s, p, *a))
    assert torch.equal(plain, model.generate(text, num_samples=2, seed=1, cond_scale=1.0))
    assert made == [(2, 2, 16, "fp32", None)]
    model.generate(text, num_samples=2, seed=1, cond_scale=3.0)
    assert made[1:] == [(4, 2, 16, "fp32", None)]  # both branches in one batch


def test_scale_zero_is_unconditional():
    model = make()
    text, _ = sample(model)
    none = torch.full_like(text, PAD)
    unconditional = model.generate(none, num_samples=2, seed=1)
    assert torch.equal(model.generate(text, num_samples=2, seed=1, cond_scale=0), unconditional)
    assert not torch.equal(unconditional, model.generate(text, num_samples=2, seed=1))


def test_guidance_leaves_the_callers_tensors():
    model = make()
    text, image = sample(model)
    prime = image[:, :4]
    before = text.clone(), prime.clone()
    model.generate(text, num_samples=2, cond_scale=2.0, prime=prime)
    assert torch.equal(text, before[0]) and torch.equal(prime, before[1])


@pytest.mark.parametrize("cond_scale", [1.0, 0.0, 2.0])
@pytest.mark.parametrize("given", [4, 7])
def test_priming_keeps_the_given_rows(given, cond_scale):
    model = make()
    text, image = sample(model)
    prime = image[:, :given]
    found = model.generate(text, num_samples=2, prime=prime, seed=2, cond_scale=cond_scale)
    assert torch.equal(found.flatten(2)[:, :, :given], prime[:, None].expand(-1, 2, -1))
    wanted = uncached(model, text, samples=2, seed=2, prime=prime, cond_scale=cond_scale)
    assert torch.equal(found, wanted)


def test_progress_and_mode_and_empty_batch():
    model = make().train()
    text, _ = sample(model, batch=3)
    calls = []
    model.generate(text, progress=lambda done, total: calls.append((done, total)), max_batch=2)
    assert calls == [(i, 24) for i in range(1, 25)] and model.training
    assert model.generate(text[:0], num_samples=2).shape == (0, 2, 3, 4)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"num_samples": 0}, "generate: num_samples must be 1 or more, got 0"),
        ({"num_samples": 1.5}, "generate: num_samples must be a whole number, got 1.5"),
        ({"seed": 2**63}, "generate: seed must be at most 9223372036854775807, got 922337"),
        ({"first_sample": [1]}, "first_sample must be one number or one for each of 2 captions"),
        ({"max_batch": 0}, "generate: max_batch must be 1 or more, got 0"),
        ({"cond_scale": float("nan")}, "generate: cond_scale must be a finite number, got nan"),
        ({"prime": torch.zeros(2, 12, dtype=torch.int64)}, r"prime must be \(2, n\) with n below"),
        ({"prime": torch.zeros(3, 4, dtype=torch.int64)}, r"prime must be .* got \(3, 4\)"),
        ({"prime": torch.full((2, 4), 7)}, "image_tokens must lie in 0 .. 6, got 7"),
        ({"temperature": -0.1}, "temperature must be 0 or more"),
    ],
)
def test_bad_input(options, line):
    model = make()
    with pytest.raises(UsageError, match=line) as error:
        model.generate(sample(model)[0], **options)
    assert "\n" not in str(error.value)


def test_too_little_memory_says_what_would_fit(monkeypatch):
    model = make()
    text, _ = sample(model)
    text = text[:1]
    each = candidate_bytes(model.config, guided=False)
    decoder = Decoder(model, 2, 3)
    assert decoder.num_bytes == 6 * each  # the estimate is what the caches hold
    assert Decoder(model, 1, 2, cond_scale=2.0).num_bytes == 4 * each
    monkeypatch.setattr("dalle.prior.step.free_memory", lambda _: 5 * each)
    monkeypatch.setattr("dalle.memory.free_memory", lambda _: 5 * each)
    line = (
        r"generate: memory must hold .* for 6 candidates at a time, got .*; max_batch 4 would fit"
    )
    with pytest.raises(EnvironmentProblem, match=line):
        model.generate(text, num_samples=6)
    model.generate(text, num_samples=6, max_batch=4)
    with pytest.raises(EnvironmentProblem, match="for 4 candidates .* max_batch 2 would fit"):
        model.generate(text, num_samples=6, max_batch=4, cond_scale=2.0)
    monkeypatch.setattr("dalle.prior.step.free_memory", lambda _: each - 1)
    monkeypatch.setattr("dalle.memory.free_memory", lambda _: each - 1)
    with pytest.raises(EnvironmentProblem, match="for 1 candidates .* take a smaller model"):
        model.generate(text, num_samples=6, max_batch=1)


@pytest.mark.parametrize("cond_scale", [1.0, 2.0])
def test_logits_have_the_same_bits_alone_and_among_others(cond_scale):
    """In any company, on any number of threads, through the kernels."""
    model = make(d_model=48, num_heads=3, attention=("row", "column", "causal"))
    text, image = sample(model, batch=3)
    shapes, logits = [(3, 7), (1, 7), (1, 1), (3, 1), (1, 2)], []
    before = torch.get_num_threads()
    try:
        for index, (captions, samples) in enumerate(shapes):
            torch.set_num_threads(1 + index % 4)
            decoder = Decoder(model, captions, samples, cond_scale=cond_scale)
            decoder.set_text(text[:captions], image[:captions, :2])
            steps = []
            for slot in range(2, 12):
                previous = image[:captions, None, slot - 1] + torch.arange(samples)
                steps.append(decoder.step(slot, previous % 7).clone())
            logits.append(torch.stack(steps))
    finally:
        torch.set_num_threads(before)
    for (captions, samples), found in zip(shapes, logits, strict=True):
        assert torch.equal(found, logits[0][:, :captions, :samples])


def test_bf16_weights_change_little():
    if dalle_ext.build_info()["cpu_isa"] != "v4_bf16":
        with pytest.raises(EnvironmentProblem, match="weights bf16 must have a CPU with bf16 dot"):
            Decoder(make(), 1, 1, weights="bf16")
        return
    model = make()
    text, image = sample(model)
    decoders = [Decoder(model, 2, 1, weights=weights) for weights in ("fp32", "bf16")]
    for decoder in decoders:
        decoder.set_text(text)
    for slot in range(12):
        previous = image[:, slot - 1 : slot] if slot else None
        wanted, found = (decoder.step(slot, previous) for decoder in decoders)
        assert not torch.equal(wanted, found)
        torch.testing.assert_close(found, wanted, atol=0.05, rtol=0.05)
    with pytest.raises(UsageError, match="Decoder: weights must be fp32 or bf16, got 'int8'"):
        Decoder(model, 1, 1, weights="int8")


def test_a_step_is_replayed_where_it_can_be_captured(monkeypatch):
    """A stand-in for CUDA graphs: what the host writes before a replay is all that changes."""
    model = make()
    text, image = sample(model)
    eager, graphed = Decoder(model, 2, 1), Decoder(model, 2, 1)
    runs = []

    def captured(run):
        runs.append(run)
        return run

    monkeypatch.setattr("dalle.prior.step.captured", captured)
    graphed._step._capture = True
    for decoder in (eager, graphed):
        decoder.set_text(text)
    for slot in range(12):
        previous = image[:, slot - 1 : slot] if slot else None
        assert torch.equal(eager.step(slot, previous).clone(), graphed.step(slot, previous))
    assert len(runs) == 1


def test_a_graph_that_is_refused_is_said_once(monkeypatch):
    model = make()
    text, image = sample(model)
    decoder = Decoder(model, 2, 1)
    decoder._step._capture = True
    decoder.set_text(text)

    def refuse():
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "Stream", refuse)
    with pytest.warns(UserWarning, match="the graph was refused: operation not permitted"):
        decoder.step(0, None)
    decoder.step(1, image[:, :1])  # a second warning would be an error


def test_logits_that_are_no_numbers_draw_nothing():
    model = make()
    text, _ = sample(model)
    with pytest.raises(NumericalError, match="logits must be finite, got .* 1e[+]39 may be too l"):
        model.generate(text, cond_scale=1e39)
    with torch.no_grad():
        model.image_head.bias[1] = float("nan")
    with pytest.raises(NumericalError, match="generate: logits must be finite, got NaN or infin"):
        model.generate(text)


def test_bad_text():
    with pytest.raises(UsageError, match=r"text must be \(B, 4\) int64"):
        make().generate(torch.zeros(1, 5, dtype=torch.int64))
