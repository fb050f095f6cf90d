"""What the registry (`dalle.data.sources`) knows of a data source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dalle.data.pairs import Pairs
from dalle.errors import EnvironmentProblem


@dataclass(frozen=True, kw_only=True)
class Source:
    """A kind of data that `--data` takes: a set with a name, or a form of file or folder.

    Args:
        name: of the set; of the form, in messages.
        opens: gives the pairs, and raises where there are none: of (image size, split, seed) for a
            set with a name, which refuses an unknown split; of the path for a form.
        fits: whether a path has this form; None for a set with a name.
        held_out: the split of a set with a name that is held out for scores.
        recipe: the name of its recipe in `dalle.recipes`; "" where sizes follow from the pictures.
        packages: modules that must be installed, with `extra`.
        extra: of dalle-ext that installs them.
        plain: whether it is of plain picture files, which can be read without captions too.
    """

    name: str
    opens: Callable[..., Pairs]
    fits: Callable[[Path], bool] | None = None
    held_out: str = ""
    recipe: str = ""
    packages: tuple[str, ...] = ()
    extra: str = ""
    plain: bool = False

    def __call__(self, *where: Any) -> Pairs:
        """`opens(*where)`.

        Raises:
            EnvironmentProblem: a package is missing.
        """
        require_packages(self.name, self.packages, self.extra)
        return self.opens(*where)


def require_packages(owner: str, packages: tuple[str, ...], extra: str) -> None:
    """Raises EnvironmentProblem, in one line, where a package of an extra is not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(
            f"{owner}: the package {', '.join(missing)} must be installed, got none; "
            f"type: pip install 'dalle-ext[{extra}]'"
        )
