"""Best of N as a stream: rows, candidates and ends come as events, cancelled or not."""

from __future__ import annotations

import itertools
from dataclasses import asdict, fields
from functools import partial
from inspect import signature
from typing import get_type_hints

import pytest
import torch

import dalle_ext
from dalle.candidates import Best, DrawOptions, Request
from dalle.errors import UsageError
from dalle.pipeline import CandidateFinished, Finished, GenerateOptions, RowsFinished
from dalle.prior.decode import generate
from dalle.prior.model import Prior
from dalle.prior.sampling import DrawConfig, SamplingChanges, SamplingConfig
from support.toy_pipeline import CAPTION, build

OPTIONS = {"seed": 3, "temperature": 9.0}  # the toy repeats itself at 1


@pytest.fixture(scope="module", autouse=True)
def reference():
    with dalle_ext.use_reference():
        yield


@pytest.fixture(scope="module")
def pipeline():
    return build()


def test_events_come_in_order_and_agree_with_generate(pipeline):
    captions = [CAPTION, "a blue square"]
    options = {"num_candidates": 5, "top": 3, "max_batch": 3, **OPTIONS}
    wanted = pipeline.generate(captions, **options)
    events = list(pipeline.stream(captions, **options))
    kinds = [type(event) for event in events]
    part = [[RowsFinished] * 4 + [CandidateFinished] * n for n in (3, 2)]
    assert kinds == [*itertools.chain(*part), Finished] * 2
    for caption in (0, 1):
        mine = [event for event in events if event.caption == caption]
        rows = [e for e in mine if isinstance(e, RowsFinished)]
        done = [e for e in mine if isinstance(e, CandidateFinished)]
        assert [(e.rows, e.candidates) for e in rows] == [
            (row, numbers) for numbers in (range(3), range(3, 5)) for row in (1, 2, 3, 4)
        ]
        assert [e.candidate for e in done] == [0, 1, 2, 3, 4]
        for event in rows:  # so far, and decodable
            so_far = torch.stack([done[n].tokens[: event.rows] for n in event.candidates])
            assert torch.equal(event.tokens, so_far)
            assert pipeline.decode(event.tokens).shape[-2:] == (4 * event.rows, 16)
        for event in done:
            assert torch.equal(pipeline.decode(event.tokens[None])[0], event.image)
        end = mine[-1]
        assert (end.drawn, end.cancelled) == (5, False)
        for name in ("images", "scores", "tokens", "order"):
            found = getattr(end.generation, name)
            assert torch.equal(found, getattr(wanted[caption], name))
        best = sorted(done, key=lambda e: -e.score)[:3]
        assert [e.candidate for e in best] == end.generation.order.tolist()


def test_more_candidates_go_on_where_the_first_ended(pipeline):
    whole = pipeline.generate(CAPTION, num_candidates=10, top=10, **OPTIONS)
    for first, count, batch in ((0, 4, 3), (4, 6, 64), (9, 1, 1)):
        part = pipeline.generate(
            CAPTION, num_candidates=count, first_candidate=first, max_batch=batch, **OPTIONS
        )
        for name in ("images", "scores", "tokens"):
            for index, number in enumerate(part.order.tolist()):
                same = getattr(whole, name)[whole.order == number][0]
                assert torch.equal(getattr(part, name)[index], same), name
        assert sorted(part.order.tolist()) == list(range(first, first + count))


@pytest.mark.parametrize(
    ("codes", "drawn"), [(0, [0, 0]), (20, [2, 0]), (50, [5, 0]), (90, [5, 4])]
)
def test_cancelled_work_hands_over_what_is_finished(pipeline, codes, drawn):
    seen = []
    options = {"num_candidates": 5, "top": 4, "max_batch": 2, **OPTIONS}
    events = pipeline.stream(
        [CAPTION, "b"],
        cancel=lambda: len(seen) > codes,
        code_progress=lambda *done: seen.append(done),
        **options,
    )
    ends = [event for event in events if isinstance(event, Finished)]
    assert len(seen) == codes + 1
    assert [end.drawn for end in ends] == drawn
    assert [end.cancelled for end in ends] == [count < 5 for count in drawn]
    for end in ends:
        kept = min(4, end.drawn)
        assert end.generation.images.shape == (kept, 3, 16, 16)
        assert end.generation.tokens.shape == (kept, 4, 4)
        if kept:
            count = {"num_candidates": end.drawn, "top": kept}
            wanted = pipeline.generate([CAPTION, "b"][end.caption], **(options | count))
            assert torch.equal(end.generation.images, wanted.images)


def test_a_closed_stream_ends_the_work(pipeline):
    pipeline.prior.train()
    seen = []
    events = pipeline.stream(
        CAPTION, num_candidates=4, code_progress=lambda *done: seen.append(done), **OPTIONS
    )
    next(events)
    assert not pipeline.prior.training
    events.close()
    assert pipeline.prior.training and len(seen) == 4
    pipeline.prior.eval()


def test_arguments_are_checked_before_the_first_event(pipeline):
    for options, line in (
        ({"num_candidates": 0}, "pipeline: num_candidates must be 1 or more, got 0"),
        ({"max_batch": 0}, "generate: max_batch must be 1 or more, got 0"),
        ({"seed": -1}, "generate: seed must be 0 or more, got -1"),
        ({"first_candidate": [0, 1]}, "first_candidate must be one number or one for each of 1"),
        (
            {"first_candidate": 2**63 - 1, "num_candidates": 2},
            "first_candidate must be at most 922",
        ),
        ({"weights": "int8"}, "Decoder: weights must be fp32 or bf16, got 'int8'"),
        ({"top": 9, "num_candidates": 8}, "top must be 1 to num_candidates = 8, got 9"),
    ):
        with pytest.raises(UsageError, match=line):
            pipeline.stream(CAPTION, **options)


def test_a_misspelt_keyword_is_named_with_what_is_near(pipeline):
    text = torch.zeros(1, pipeline.prior.config.text_len - 1, dtype=torch.int64)
    picture, keep = torch.zeros(3, 16, 16), torch.eye(4, dtype=torch.bool)
    edits = partial(pipeline.edit, picture, CAPTION, keep=keep)
    for call, owner, name, near in (
        (partial(pipeline.generate, CAPTION), "pipeline", "num_candidate", "num_candidates"),
        (partial(pipeline.generate, CAPTION), "pipeline", "num_samples", ""),
        (partial(pipeline.generate, [CAPTION]), "pipeline", "nonsense", ""),
        (partial(pipeline.stream, CAPTION), "pipeline", "prime_rws", "prime_rows"),
        (partial(pipeline.stream, CAPTION), "pipeline", "tempreature", "temperature"),
        (partial(pipeline.sample, [CAPTION], 3), "pipeline", "top", ""),
        (partial(pipeline.sample, [CAPTION], 3), "pipeline", "sed", "seed"),
        (edits, "edit", "pase", "paste"),
        (edits, "edit", "prime_rows", ""),
        (partial(pipeline.prior.generate, text), "generate", "nonsense", ""),
        (partial(pipeline.prior.generate, text), "generate", "tempreature", "temperature"),
        (partial(pipeline.prior.generate, text), "generate", "num_sample", "num_samples"),
        (partial(pipeline.prior.generate, text), "generate", "sampling", ""),
        (partial(generate, pipeline.prior, text), "generate", "progres", "progress"),
        (partial(generate, pipeline.prior, text), "generate", "temperature", ""),
        (DrawConfig, "DrawConfig", "max_batches", "max_batch"),
        (DrawConfig, "DrawConfig", "nonsense", ""),
        (SamplingConfig, "SamplingConfig", "topk", "top_k"),
        (SamplingChanges, "SamplingChanges", "cond", "cond_scale"),
        (Request, "Request", "num_sample", "num_samples"),
    ):
        with pytest.raises(UsageError) as error:
            call(**{name: 1})
        assert isinstance(
            error.value, TypeError
        )  # as Python's own for a function of fixed keywords
        hint = f" (did you mean {near}?)" if near else ""
        assert str(error.value) == f"{owner}: {name} is not an option{hint}"


def test_keywords_are_written_once():
    """What Python's callers may say is what a request holds, and one declaration of it."""
    said = DrawOptions.__annotations__.keys() - {f.name for f in fields(SamplingConfig)}
    held = {f.name.replace("sample", "candidate") for f in fields(Request)}
    own = GenerateOptions.__annotations__.keys() - DrawOptions.__annotations__.keys()
    assert said == held and own == {"prime_image", "prime_rows"}


def test_fields_of_sampling_agree_wherever_they_are_declared():
    """Values, changes, keywords and a signature: a checker makes none of these from another."""
    values = get_type_hints(SamplingConfig)
    optional = {name: hint | None for name, hint in values.items()}
    assert get_type_hints(SamplingChanges) == optional
    assert asdict(SamplingChanges()) == dict.fromkeys(values)
    said = get_type_hints(DrawOptions)
    assert {name: said.get(name) for name in values} == optional
    given = [p for p in signature(Prior.generate).parameters.values() if p.kind == p.KEYWORD_ONLY]
    assert {p.name: p.default for p in given} == asdict(SamplingConfig())
    assert values.items() <= get_type_hints(Prior.generate).items()


def test_each_field_of_sampling_goes_where_it_is_named(pipeline, monkeypatch):
    values = {"temperature": 0.5, "top_k": 3, "top_p": 0.75, "cond_scale": 2.0, "cache_bits": 8}
    wanted = SamplingConfig(**values)
    assert asdict(wanted) == values and values.keys() == {f.name for f in fields(SamplingConfig)}
    assert pipeline.request("pipeline", 1, values).sampling == wanted
    monkeypatch.setattr("dalle.prior.model.generate", lambda *_, sampling: sampling)
    assert pipeline.prior.generate(torch.zeros(1, 5), **values) == wanted


def test_the_best_are_kept_over_parts_and_the_first_of_equals():
    scores = torch.tensor([1.0, 3.0, float("nan"), 2.0, 3.0, -1.0, float("-inf"), 2.5])
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 2, 2)
    tokens = torch.arange(8).view(8, 1, 1)
    for size in (1, 3, 8):
        best = Best(4, (1, 1), 2)
        for start in range(0, 8, size):
            part = slice(start, start + size)
            best.add(images[part], scores[part], tokens[part], torch.arange(8)[part] + 100)
        assert best.kept.order.tolist() == [101, 104, 107, 103] and best.drawn == 8
        assert best.kept.tokens.flatten().tolist() == [1, 4, 7, 3]
        assert best.kept.images[:, 0, 0, 0].tolist() == [1, 4, 7, 3]
        assert best.kept.scores.tolist() == [3.0, 3.0, 2.5, 2.0]
