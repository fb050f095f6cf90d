"""Captions and prompts are cleaned by the same rule, wherever they come from."""

from __future__ import annotations

import random
import unicodedata

from dalle.captions import caption_lines, clean
from dalle.commands.sample import SampleConfig, read_captions
from dalle.data.emoji import names
from dalle.data.shapes import captions
from dalle.tokenizer import lower

SPACES = [chr(code) for code in range(0x110000) if chr(code).isspace()]
CONTROLS = [chr(code) for code in [*range(0x20), *range(0x7F, 0xA0)]]


def test_white_space_of_any_kind_is_one_space_between_words():
    assert len(SPACES) == 29
    for space in [*SPACES, *CONTROLS, "\u200b"]:
        for text in (f"a{space}red", f"{space}a {space}{space}red{space}", f"a{space}\u2028red\n"):
            assert clean(text) == "a red", ascii(space)
        assert clean(space) == ""


def test_marks_and_composition():
    assert clean("\ufeffa red\ufeff circle\u2060") == "a red circle"
    assert clean("cafe\u0301 \u1100\u1161\u11a8") == "caf\u00e9 \uac01"
    assert clean("A RED Circle") == "A RED Circle"
    assert clean("caf\udce9") == "caf\ufffd"  # a byte that was not UTF-8
    assert clean("caf\udce9 ", keep_bytes=True) == "caf\udce9"
    assert clean("\ud83d\ude00") == clean("\ud83d\ude00", keep_bytes=True) == "\U0001f600"
    joined = "\u0645\u06cc\u200c\u062e \u200f\u05e7\u05d8\u05d4"  # marks that letters need stay
    for kept in ("\U0001f469\u200d\U0001f680", "\U0001f3f3\ufe0f\u200d\U0001f308", joined):
        assert clean(kept) == kept
    for nothing in ("", "\u200b\ufeff\u2060", "\u200e\u200f \u202e", "\0\x7f"):
        assert clean(nothing) == ""


def test_what_is_clean_stays_so():
    rng = random.Random(0)
    blocks = [(0, 0x250), (0x300, 0x370), (0x1100, 0x1200), (0x2000, 0x2070), (0xD800, 0xDFFF)]
    for _ in range(4_000):
        ranges = rng.choices([*blocks, (0xAC00, 0xAC20), (0xFE00, 0xFF00), (0, 0x10FFFF)], k=5)
        text = "".join(chr(rng.randint(*block)) for block in ranges)
        once = clean(text)
        assert clean(once) == once and lower(lower(text)) == lower(text) == lower(once)
        assert unicodedata.is_normalized("NFC", once) and not once[:1].isspace()
    own = [*captions("train"), *captions("test"), *captions("zero"), *(c for _, c in names())]
    assert [caption for caption in own if clean(caption) != caption] == []


def test_lines():
    text = "\ufeffone\r\ntwo\u2028still two\x0b!\n\n \u200b\nthree\rfour\u0085"
    assert caption_lines(text) == ["one", "two still two !", "three", "four"]


def test_prompts_of_arguments_and_files(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa\u00a0blue  cafe\u0301\u2028square\r\n\r\n\tsecond\n".encode())
    given = SampleConfig(captions=("\ufeffa red\u2028circle ", "\u200b", "caf\udce9"), file=file)
    assert read_captions(given) == [
        "a red circle", "caf\udce9", "a blue caf\u00e9 square", "second"]  # fmt: skip
