"""`--again PICTURE.png` of `dalle sample` and `dalle edit`: a candidate drawn once more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from dalle import pictures
from dalle.commands.drawing import Command, DrawingOptions, Run
from dalle.commands.drawn import read_image
from dalle.commands.picture_record import (
    Versions,
    check_image,
    check_model,
    check_options,
    pixels_hash,
    read_record,
)
from dalle.console import say
from dalle.errors import UsageError
from dalle.pipeline import Generation

ALLOWED = ("again", "model", "out", "overwrite", "device", "scale")

Drawn = tuple[torch.Tensor, torch.Tensor, float]  # (3, H, W) picture, (h, w) tokens, score


class Again:
    """A picture that is to be drawn again, and what is needed for it.

    Args:
        owner: "sample" or "edit".
        config: options of the command.
        option: the name of the option for the picture that was drawn from.
        image: that picture, or None.

    Attributes:
        record: what the picture says.
        pipeline: the one that drew it, in the precision in which it did.
        image: (3, H, W) what it was drawn from, or None.

    Raises:
        DalleError: in one line, before anything is drawn or written.
    """

    def __init__(
        self, owner: Command, config: DrawingOptions, option: str, image: Path | None
    ) -> None:
        again = config.again
        assert again is not None
        check_options(owner, config, (*ALLOWED, option))
        self.record = read_record(owner, again)
        options, wanted = self.record.options, self.record.options.image
        if wanted is not None and image is None:
            raise UsageError(
                f"{owner}: {option} must be given, got nothing: {again} was drawn from a picture"
            )
        if wanted is None and image is not None:
            raise UsageError(
                f"{owner}: {option} must be left out, got {image}: {again} was drawn from none"
            )
        inputs = [again, *([image] if image else [])]
        device = options.device if config.device == "auto" else config.device
        self._run = run = Run(owner, config, [self.record.caption], inputs, device)
        self.pipeline, self.image = run.pipeline, None
        pictures.check_sheet(owner, 1, self.pipeline.image_size, config.scale)
        check_model(owner, self.record, run.models, run.model)
        if wanted is not None and image is not None:
            self.image = read_image(image, self.pipeline.image_size)
            check_image(owner, option, wanted, self.image, image)
        names = ("sampling", "num_candidates", "weights")
        how = {name: getattr(options, name) for name in names}
        run.begin({**how, "top": 1, "seed": self.record.seed}, options.precision, again=True)

    def finish(self, draw: Callable[[], Drawn]) -> None:
        """Draws, writes the folder of a run of one picture, and says whether the bits are equal."""
        image, tokens, score = draw()
        record, pixels, run = self.record, pictures.to_uint8(image), self._run
        same = pixels_hash(pixels) == record.pixels
        if same and record.scores.ranker is not None:
            score = record.scores.ranker
        found = record if same else record.of(record.candidate, score, pixels)
        generation = Generation(
            image[None],
            torch.tensor([score], dtype=torch.float32, device="cpu"),
            tokens[None],
            torch.tensor([found.candidate], dtype=torch.int64, device="cpu"),
        )
        (name,) = run.write(found.caption, found.drawn_as, generation, found)
        if not same:
            then, now = asdict(record.versions), asdict(Versions())
            say(
                f"{run.owner}: note: the pixels differ from those of the picture, drawn with "
                f"{_words(then)} on {record.options.device}; here {_words(now)}"
            )
        print(f"{run.owner}: candidate {found.candidate} again: {run.out / name}")


def _words(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version[:40]}" for name, version in versions.items())
