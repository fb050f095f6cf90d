"""Pairs of two models' pictures for the same captions, with sides that the seed draws."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from dalle.captions import clean
from dalle.configs import integer
from dalle.console import progress_shown
from dalle.data.pairs import evenly_spaced
from dalle.errors import DataError
from dalle.evaluate.results import png
from dalle.evaluate.scores import Set
from dalle.evaluate.session import Session
from dalle.evaluate.sets import Source, is_pipeline


@dataclass(frozen=True)
class Tasks:
    """Pairs of pictures for the same captions.

    Attributes:
        captions: N.
        ours, theirs: the sets.
        items: of each task, its picture in each set.
        swapped: of each task, whether picture 1 is theirs; half of them are.
    """

    captions: list[str]
    ours: Source
    theirs: Source
    items: list[tuple[int, int]]
    swapped: list[bool]

    def __len__(self) -> int:
        return len(self.captions)

    def pixels(self, task: int, place: int) -> np.ndarray:
        """Picture 1 or 2 of a task as it is shown: (H, W, 3) uint8."""
        model = int((place == 2) != self.swapped[task])
        return (self.ours, self.theirs)[model].pairs.load(self.items[task][model])

    def shown(self, task: int, place: int) -> bytes:
        """The same as a PNG."""
        return png(Image.fromarray(self.pixels(task, place)))


def make_tasks(session: Session, ours: Set, theirs: Set) -> Tasks:
    """Pairs of the first picture of each caption that both sets have, sides by the seed.

    Raises:
        DataError: the sets share no caption, or no pair can be used.
    """
    owner, setup = session.owner, session.setup
    count = None if setup.count is None else integer(owner, "count", setup.count, 1)
    session.look(ours, theirs)

    def take(name: str, source: Set, other: Source | None) -> Source:
        # Of sets all pictures are opened: the same captions may stand anywhere in them.
        session.setup = replace(setup, count=count if is_pipeline(source) else None)
        return session.take(name, source, other)

    if is_pipeline(ours) and not is_pipeline(theirs):
        second = take("theirs", theirs, None)
        first = take("ours", ours, second)
    else:
        first = take("ours", ours, None)
        second = take("theirs", theirs, first)
    session.setup = setup
    places: list[dict[str, int]] = []
    for name, source in (("ours", first), ("theirs", second)):
        where: dict[str, int] = {}
        for i, caption in enumerate(source.pairs.captions):
            if clean(caption):
                where.setdefault(clean(caption), i)
        if not where:
            raise DataError(f"{owner}: {name} must have captions, got none in {source.spec}")
        places.append(where)
    shared = [caption for caption in places[0] if caption in places[1]]
    if not shared:
        raise DataError(
            f"{owner}: ours and theirs must share captions, got none of {len(places[0])} and "
            f"{len(places[1])}"
        )
    if count is not None and count < len(shared):
        shared = [shared[i] for i in evenly_spaced(len(shared), count)]
    pairs = [(places[0][caption], places[1][caption]) for caption in shared]
    good = []
    with progress_shown("pictures") as show:
        for k, (a, b) in enumerate(pairs):
            if _decodes(first, a) and _decodes(second, b):
                good.append(k)
            show(k + 1, len(pairs))
    if not good:
        raise DataError(f"{owner}: a task must have two pictures that can be used, got none")
    captions = [str(first.pairs.captions[pairs[k][0]]).strip() for k in good]
    rng = np.random.default_rng(session.seed)
    swapped = rng.permutation(len(good)) % 2 == 1
    return Tasks(captions, first, second, [pairs[k] for k in good], swapped.tolist())


def _decodes(source: Source, item: int) -> bool:
    try:
        source.pairs.load(item)
    except DataError:
        source.pairs.skipped["could not be used"] += 1
        return False
    return True
