"""`Pipeline.edit` keeps what it is told to, draws the rest, and chooses by weight and by rank."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import dalle_ext
from dalle import editing, masks, pictures
from dalle.candidates import CandidateFinished, Finished, RowsFinished
from dalle.errors import UsageError
from dalle.prior.particles import systematic
from dalle.prior.sampling import SamplingConfig
from support.toy_pipeline import CAPTION, build

IMAGE = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", autouse=True)
def reference():
    with dalle_ext.use_reference():
        yield


@pytest.fixture(scope="module")
def pipeline():
    return build()


def grid(text):
    return torch.tensor([[mark == "#" for mark in row] for row in text.split()])


HOLE = grid("#### #..# #..# ####")
CORNER = grid("#### #### ##.. ##..")


def same(found, wanted):
    return all(
        torch.equal(getattr(found, name), getattr(wanted, name))
        for name in ("images", "tokens", "order")
    ) and torch.equal(found.scores.nan_to_num(7), wanted.scores.nan_to_num(7))


@pytest.mark.parametrize("rows", [1, 3])
def test_given_rows_are_priming_bit_for_bit(pipeline, rows):
    options = {"num_candidates": 9, "top": 4, "seed": 3, "temperature": 1.5}
    wanted = pipeline.generate(CAPTION, prime_image=IMAGE, prime_rows=rows, **options)
    found = pipeline.edit(IMAGE, CAPTION, keep=masks.top_rows((4, 4), rows), **options)
    assert same(found, wanted)


@pytest.mark.parametrize(
    "keep", [HOLE, CORNER, grid("##.. .... .... ...."), grid("...# #### #### ####")]
)
def test_kept_tokens_are_those_of_the_picture(pipeline, keep):
    codes = pipeline.vae.encode(IMAGE[None])[0]
    options = {"keep": keep, "num_candidates": 20, "top": 5, "temperature": 3.0}
    found = pipeline.edit(IMAGE, CAPTION, **options)
    assert found.tokens.shape == (5, 4, 4) and (found.tokens[:, keep] == codes[keep]).all()
    assert torch.equal(found.images, pipeline.decode(found.tokens))
    wanted = pipeline.score(CAPTION, found.images)
    torch.testing.assert_close(found.scores, wanted)
    again = pipeline.edit(IMAGE, CAPTION, keep=keep, num_candidates=20, top=5, temperature=3.0)
    assert same(found, again)
    other = pipeline.edit(
        IMAGE, CAPTION, keep=keep, num_candidates=20, top=5, temperature=3.0, seed=1
    )
    assert not torch.equal(found.tokens, other.tokens)


def test_the_best_are_first_and_different_until_there_are_no_more(pipeline):
    count = 40
    found = pipeline.edit(IMAGE, CAPTION, keep=HOLE, num_candidates=count, top=count)
    rows = [tuple(row) for row in found.tokens.flatten(1).tolist()]
    different = len(set(rows))
    assert 1 < different < count and len(set(rows[:different])) == different
    assert (found.scores[:different].diff() <= 0).all() and len(rows) == count
    few = pipeline.edit(IMAGE, CAPTION, keep=HOLE, num_candidates=count, top=different)
    assert torch.equal(few.tokens, found.tokens[:different])
    # All together: what systematic resampling takes of the weighted candidates.
    edit = editing.checked(pipeline, IMAGE, CAPTION, HOLE)
    request = pipeline.request("edit", 1, {"num_candidates": count})
    *_, end = editing.steps(pipeline, edit, request)
    noise = editing.choosing_noise(edit, request)
    taken = end.tokens[0][systematic(end.log_weights, noise)[0]]
    assert Counter(rows) == Counter(tuple(row) for row in taken.tolist())


def test_events_of_an_edit(pipeline):
    calls, parts = [], []
    events = list(
        pipeline.edit_stream(
            IMAGE, CAPTION, keep=HOLE, num_candidates=300, top=3,
            progress=lambda *call: parts.append(call),
            code_progress=lambda *call: calls.append(call),
        )
    )  # fmt: skip
    *rest, end = events
    assert isinstance(end, Finished) and end.drawn == 300 and not end.cancelled
    rows = [event for event in rest if isinstance(event, RowsFinished)]
    assert [event.rows for event in rows] == [2, 3, 4] * 2  # the first was given, in two groups
    assert [event.candidates for event in rows[::3]] == [range(256), range(256, 300)]
    finished = [event for event in rest if isinstance(event, CandidateFinished)]
    assert len({event.candidate for event in finished}) == len(finished) < 300
    best = sorted(finished, key=lambda event: -event.score)[:3]
    assert [event.candidate for event in best] == end.generation.order.tolist()
    assert parts == [(256, 300), (300, 300)] and calls[-1] == (300 * 16, 300 * 16)
    assert calls == sorted(calls)


@pytest.mark.parametrize("after", [0, 15, 21, 25])
def test_what_is_finished_is_kept_when_it_is_cancelled(pipeline, after):
    """The first of two groups is done after 11 codes, the second after 22."""
    asked = iter(range(1000))
    events = pipeline.edit_stream(
        IMAGE, CAPTION, keep=HOLE, num_candidates=512, top=2, cancel=lambda: next(asked) >= after
    )
    *_, end = events
    assert end.drawn == {0: 0, 15: 256}.get(after, 512)  # 21: said with the very last code
    assert end.cancelled == (end.drawn < 512)
    assert len(end.generation.images) == (2 if end.drawn else 0)
    if end.drawn == 256:
        assert same(
            end.generation, pipeline.edit(IMAGE, CAPTION, keep=HOLE, num_candidates=256, top=2)
        )


def test_a_candidate_is_drawn_again(pipeline):
    sampling = SamplingConfig(temperature=2.0, top_k=9)
    for keep, count in ((HOLE, 300), (masks.top_rows((4, 4), 2), 70)):
        found = pipeline.edit(
            IMAGE, CAPTION, keep=keep, num_candidates=count, top=6, sampling=sampling, seed=2,
            paste=True,
        )  # fmt: skip
        edit = editing.checked(pipeline, IMAGE, CAPTION, keep, paste=True)
        options = {"num_candidates": count, "sampling": sampling, "seed": 2}
        request = pipeline.request("edit", 1, options)
        for index in (0, 5):
            candidate = int(found.order[index])
            tokens, image = editing.redrawn(pipeline, edit, candidate, request)
            assert torch.equal(tokens, found.tokens[index])
            assert torch.equal(image, found.images[index])


def test_pasted_pixels_are_the_pictures_own(pipeline):
    pixels = torch.ones(16, 16, dtype=torch.bool)
    pixels[5:11, 6:9] = False  # part of four tokens
    levels = (torch.arange(3 * 256) % 256).view(3, 16, 16).float() / 255
    options = {"num_candidates": 8, "temperature": 5.0}
    for keep in (pixels, masks.whole_tokens(pixels, (4, 4))):
        plain = pipeline.edit(levels, CAPTION, keep=keep, **options)
        found = pipeline.edit(levels, CAPTION, keep=keep, paste=True, **options)
        kept = pixels if keep is pixels else masks.pixels_of(keep, 4)
        assert torch.equal(found.images[..., kept], levels[:, kept].expand(8, -1, -1))
        drawn = pipeline.decode(found.tokens)
        assert torch.equal(found.images[..., ~kept], drawn[..., ~kept])
        assert (pictures.to_uint8(found.images)[:, kept] == pictures.to_uint8(levels)[kept]).all()
        assert not torch.equal(plain.images[..., kept], found.images[..., kept])
        torch.testing.assert_close(found.scores, pipeline.score(CAPTION, found.images))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": torch.rand(3, 8, 8)}, r"image must be \(3, 16, 16\), got \(3, 8, 8\)"),
        ({"image": torch.zeros(3, 16, 16, dtype=torch.uint8)}, "image must be a float tensor, got"),
        ({"image": IMAGE * 255}, r"image must hold colours in \[0, 1\]"),
        ({"image": IMAGE * torch.nan}, r"image must hold colours in \[0, 1\]"),
        ({"image": None}, "image must be a float tensor, got NoneType"),
        ({"caption": " \t"}, "caption must hold a word, got ' .t'"),
        ({"caption": ["a"]}, "caption must be a string, got list"),
        ({"caption": "a red circle " * 9}, "caption must have at most 7 tokens, got more in"),
        ({"keep": torch.ones(3, 4, dtype=torch.bool)}, "keep must be a mask of 4 x 4 tokens or"),
        ({"keep": HOLE | True}, "keep must leave a token to draw"),
        ({"keep": HOLE & False}, "keep must keep a whole token"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"first_candidate": -1}, "first_candidate must be 0 or more"),
        ({"first_candidate": 2**63 - 1}, "first_candidate must be at most"),
        ({"sampling": {}}, "sampling must be a SamplingConfig, got dict"),
        ({"num_candidates": 0}, "num_candidates must be 1 or more"),
        ({"top": 9}, "top must be 1 to num_candidates = 8"),
        ({"weights": "int1"}, "weights must be fp32 or bf16, got 'int1'"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
    ],
)
def test_refused_before_anything_is_drawn(pipeline, changes, message):
    options = {"image": IMAGE, "caption": CAPTION, "keep": HOLE, "num_candidates": 8, **changes}
    with pytest.raises(UsageError, match=f"^(edit|pipeline|Decoder): {message}") as error:
        pipeline.edit_stream(**options)
    assert "\n" not in str(error.value)


def test_without_a_ranker_they_stand_in_the_order_of_drawing():
    pipeline = build(ranker=False)
    found = pipeline.edit(IMAGE, CAPTION, keep=HOLE, num_candidates=12)
    assert found.scores.isnan().all() and len(found.images) == 8
    different = len(set(found.order.tolist()))
    assert found.order[:different].tolist() == sorted(set(found.order.tolist()))
