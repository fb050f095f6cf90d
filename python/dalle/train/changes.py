"""What a training differs in from the checkpoint it would go on from, in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dalle.configs import differences

MAX_CHANGES = 4  # options named beside the first that differs
MAX_NAMED = 3  # parts of a data set named for each kind of change


def short(value: Any) -> str:
    """A JSON value in at most 80 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def changes_of(mine: dict[str, Any], theirs: dict[str, Any]) -> tuple[list[Any], str]:
    """The differences of two descriptions (`Task.describe`).

    Returns:
        (key, mine, theirs) of each, without the parts of the data, such as its shards; and which of
        these were added, removed or changed since the checkpoint, in words, or "".
    """
    parts = [_flat(description.get("data")) for description in (mine, theirs)]
    found = [
        change for change in differences(mine, theirs) if not change[0].startswith("data.parts")
    ]
    kinds = {
        "added": [name for name in parts[0] if name not in parts[1]],
        "removed": [name for name in parts[1] if name not in parts[0]],
        "changed": [n for n, value in parts[0].items() if n in parts[1] and parts[1][n] != value],
    }
    words = [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names]
    return found, f"data since the checkpoint: {', '.join(words)}" if words else ""


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Part -> its description; parts of a part are named PART/NAME."""
    parts = data.get("parts") if isinstance(data, Mapping) else None
    flat: dict[str, Any] = {}
    for name, value in parts.items() if isinstance(parts, Mapping) else ():
        inner = _flat(value, f"{prefix}{name}/")
        flat |= inner or {prefix + name: value}
    return flat


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(sorted(names)[:MAX_NAMED]) + more
