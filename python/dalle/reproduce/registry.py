"""Every figure and table of the paper: its title, its section, and the function that makes it.

A new entry is a line here and a maker, `Context -> Figure`; one that takes long has its seconds in
`pace`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dalle.reproduce.context import Context
    from dalle.reproduce.figure import Figure


@dataclass(frozen=True)
class Entry:
    """A figure or table of the paper, or an extra.

    Attributes:
        title: what it shows.
        section: of the paper.
        place: module of `dalle.reproduce` and the name of the maker in it.
    """

    title: str
    section: str
    place: str

    def maker(self) -> Callable[[Context], Figure]:
        """The function that makes it."""
        module, _, name = self.place.partition(":")
        found: Callable[[Context], Figure] = getattr(
            import_module(f"dalle.reproduce.{module}"), name
        )
        return found


FIGURES: dict[str, Entry] = {
    "figure_1": Entry("Originals over reconstructions", "2.1", "pictures:figure_1"),
    "figure_2": Entry("Composition and variable binding", "1", "pictures:figure_2"),
    "figure_3": Entry("Samples for held-out captions", "3.1", "pictures:figure_3"),
    "figure_4": Entry("A gradient scale for each residual block", "2.4", "scales:figure_4"),
    "figure_5": Entry("Exchanges of a training step", "2.5", "exchange:figure_5"),
    "figure_6": Entry("Best of 1, 8, 64, 512", "2.6", "pictures:figure_6"),
    "figure_7": Entry("Votes between two models", "3.1", "scores:figure_7"),
    "figure_8": Entry("Two models, the same captions", "3.1", "pictures:figure_8"),
    "figure_9": Entry("Distance against blur and candidates", "3.1", "scores:figure_9"),
    "figure_10": Entry("The stream of a caption", "B.1", "pictures:figure_10"),
    "figure_11": Entry("Attention masks", "B.1", "pictures:figure_11"),
    "figure_12": Entry("Gradient scales over a training", "D", "scales:figure_12"),
    "figure_13": Entry("Image to image: the rest of a picture", "3.3", "pictures:figure_13"),
    "figure_14": Entry("Image to image: the paper's prompts", "G", "pictures:figure_14"),
    "table_1": Entry("The least rank without a loss gap", "2.5", "factors:table_1"),
    "table_2": Entry("Sizes of shards and factors", "E.1", "factors:table_2"),
    "losses": Entry("Loss curves", "2.1, 2.2", "curves:losses"),
    "overlap": Entry("Overlap with the training pictures", "3.2", "scores:overlap"),
    "quantizers": Entry("Gumbel relaxation and straight-through", "2.1", "quantizers:quantizers"),
}
