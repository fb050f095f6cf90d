"""One figure or table of the paper: ours, the paper's, and what differs, all JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dalle.configs import from_dict
from dalle.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What a maker gives back. `dalle.reproduce.run` fills in key, title, section and seconds.

    Attributes:
        key: "figure_1" to "figure_14", "table_1", "table_2", or of an extra, "losses".
        title: what it shows.
        section: of the paper.
        text: a sentence or two on what is seen.
        ours: our numbers, or rows.
        paper: the paper's numbers under the same names, or what its figure shows.
        tables: of `dalle.evaluate.results.table`, ours beside the paper's. Without one, the page
            shows the numbers of `ours` and `paper`.
        pictures: names of files beside index.html; those that are no sheet are diagrams.
        sheets: rows of pictures with captions, of `Context.sheet`; their files are in `pictures`.
        command: the command line that made it.
        differs: what differs from the paper, in plain words.
        missing: what could not be made, and what stands in for it; "" for nothing.
        seconds: how long it took.
    """

    key: str = ""
    title: str = ""
    section: str = ""
    text: str = ""
    ours: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, Any] = field(default_factory=dict)
    tables: Sequence[Mapping[str, Any]] = ()
    pictures: Sequence[str] = ()
    sheets: Sequence[Mapping[str, Any]] = ()
    command: str = ""
    differs: str = ""
    missing: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON values; a number that JSON lacks (NaN, infinity) is null."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Any, where: str) -> Figure:
        """What `to_dict` gave.

        Raises:
            CheckpointError: it is something else.
        """
        return from_dict(cls, values, where=where, error=CheckpointError)


def _plain(value: Any) -> Any:
    """Tuples as lists, nonfinite numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
