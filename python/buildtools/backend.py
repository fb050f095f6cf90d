"""setuptools' build backend; it adds torch to the build requirements only where there is none.

A torch in `[build-system] requires` would be downloaded a second time, and a newer one than the
environment holds. So the hook looks for the environment's own torch first.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (hooks that pip calls by name)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

sys.path.insert(0, str(Path(__file__).parent))
import torch_dir  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def _with_torch(requirements: list[str]) -> list[str]:
    torch_dir.check_variables()
    folder = torch_dir.find_torch()
    if folder is None:
        return [*requirements, torch_dir.pinned_torch(ROOT)]
    torch_dir.torch_version(folder)
    return requirements


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Build requirements of a wheel: setuptools' own, and torch where the environment has none."""
    return _with_torch(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Build requirements of an editable install; see `get_requires_for_build_wheel`."""
    return _with_torch(build_meta.get_requires_for_build_editable(config_settings))
