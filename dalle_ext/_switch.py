"""The switch between the native ops and the plain PyTorch definitions of `dalle_ext.reference`."""

from __future__ import annotations

_use_reference = False


def reference_in_use() -> bool:
    """Whether public functions call `dalle_ext.reference` instead of the native ops."""
    return _use_reference


class use_reference:  # noqa: N801 (reads as a verb at every call)
    """Makes the public functions call the definitions in `dalle_ext.reference`.

    `use_reference()` switches at once and for the whole process, `use_reference(False)` back; as a
    context manager it restores on exit what was there before. Needs no native library.
    """

    def __init__(self, enabled: bool = True) -> None:
        global _use_reference
        self._before = _use_reference
        _use_reference = enabled

    def __enter__(self) -> use_reference:
        return self

    def __exit__(self, *_: object) -> None:
        global _use_reference
        _use_reference = self._before
