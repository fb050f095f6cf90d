"""Names, hashes and publishing of checkpoint folders, whatever is in them.

Written as `step-N.tmp-NONCE`: each file is written and fsynced, `manifest.json` (with the SHA-256
and size of every other file) comes last, then the folder is fsynced, read back and verified,
renamed to `step-N`, and the parent fsynced. The latest checkpoint is computed, never pointed to:
the highest number. Old ones are pruned only after the new one is there.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from dalle.errors import CheckpointError
from dalle.files import (
    check_regular,
    json_sha256,
    parse_json,
    read_bytes,
    sha256,
    sync_folder,
    temporary_name,
    to_json,
    write_synced,
)
from dalle.version import __version__

FORMAT = 1
SHARDS = "shards"
MANIFEST = "manifest.json"
ALL = slice(None)
_NAME = re.compile(r"step-(\d{8,})")
_STALE = re.compile(r"step-\d{8,}\.tmp-[0-9a-f]+")


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` updates."""
    return f"step-{step:08d}"


def checkpoints(root: Path) -> list[Path]:
    """Folders in `root` with a checkpoint's name, oldest first; not verified."""
    return sorted((p for p in root.glob("step-*") if _NAME.fullmatch(p.name)), key=step_of)


def step_of(path: Path) -> int:
    """The number of updates in a checkpoint's folder name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"checkpoint: folder must be named step-N, got {path}")
    return int(match[1])


def remove_stale(root: Path) -> list[Path]:
    """Removes what an interrupted save left in `root`, and returns it."""
    stale = [p for p in root.glob("step-*.tmp-*") if _STALE.fullmatch(p.name)]
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
    return stale


def publish(temporary: Path, final: Path, keep: int, part: slice = ALL) -> None:
    """Verifies `part` of a written checkpoint's files, gives it its name, prunes to `keep`."""
    sync_folder(temporary)
    read_manifest(temporary, part)
    os.rename(temporary, final)
    root = final.parent
    sync_folder(root)
    with contextlib.suppress(OSError):  # the new one is safe; the next save prunes again
        for old in checkpoints(root)[:-keep]:
            removed = temporary_name(
                old
            )  # renamed first, so that no half-removed folder has the name
            os.rename(old, removed)
            shutil.rmtree(removed, ignore_errors=True)
    remove_stale(root)


def hashes(folder: Path, paths: Iterable[Path]) -> dict[str, Any]:
    """The manifest's entries for files in `folder`."""
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(paths)
    }


def write_manifest(
    folder: Path, step: int, files: dict[str, Any], name: str, description: dict[str, Any]
) -> None:
    """Completes a checkpoint's folder; `name` and `description` are the task's."""
    manifest = {
        "format": FORMAT,
        "step": step,
        "task": name,
        "description": description,
        "versions": {
            "dalle": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "files": files,
    }
    # Over the manifest's other keys: it guards the files, this guards it.
    guarded = {**manifest, "sha256": json_sha256(manifest)}
    write_synced(folder / MANIFEST, to_json(guarded))


def read_manifest(path: Path, part: slice = ALL) -> dict[str, Any]:
    """The manifest of a checkpoint whose every byte was verified, or that of `part` of its files.

    Raises:
        CheckpointError: in one line naming the file that is missing, truncated or altered.
    """
    where = f"checkpoint {path}"
    try:
        written = read_bytes(path / MANIFEST)
        manifest: dict[str, Any] = parse_json(written)
        digest = manifest.pop("sha256")
        if digest != json_sha256(manifest) or written != to_json({**manifest, "sha256": digest}):
            raise CheckpointError(f"{where}: {MANIFEST} must match its SHA-256, got other bytes")
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{where}: format must be {FORMAT}, got {manifest['format']}")
        for name, expected in list(manifest["files"].items())[part]:
            file = path / name
            check_regular(file)
            if file.stat().st_size != expected["bytes"]:
                raise CheckpointError(
                    f"{where}: {name} must have {expected['bytes']} bytes, "
                    f"got {file.stat().st_size}"
                )
            if sha256(file) != expected["sha256"]:
                raise CheckpointError(f"{where}: {name} must match its SHA-256, got other bytes")
    except OSError as problem:
        name = Path(problem.filename or MANIFEST).name
        raise CheckpointError(f"{where}: {name} must be readable, got: {problem.strerror}") from (
            problem
        )
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise CheckpointError(f"{where}: {MANIFEST} must be one that dalle wrote") from problem
    return manifest
