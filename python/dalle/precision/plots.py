"""The picture of the paper's Figure 12: every block's gradient scale over the training."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalle.errors import DataError, EnvironmentProblem
from dalle.pictures import save_bytes
from dalle.precision.ends import LOWEST

AGAINST = {"one scale": "one scale against own", "own scales": "own scales against a quarter"}
FP16_ZERO, FP16_NORMAL, FP16_TOP = -25, -14, 15  # exponents: flushed below, least normal, largest


def plot_scales(records: list[dict[str, Any]], path: Path) -> None:
    """Draws scales, lost gradients and the gradients' exponents of a run's metrics into a PNG.

    Args:
        records: of `metrics.jsonl`, those of a training with `ResblockScaler`.
        path: where to.

    Raises:
        DataError: no record holds scales.
        EnvironmentProblem: matplotlib is not installed.
    """
    scaled = [r for r in records if _is_complete(r)]
    if scaled:
        blocks = len(scaled[-1]["block_scale"])
        scaled = [r for r in scaled if len(r["block_scale"]) == blocks]
    if not scaled:
        description = "none that is whole" if any("block_scale" in r for r in records) else "none"
        raise DataError(
            f"plot scales: metrics must hold block_scale, got {description} (fp16-scaled only)"
        )
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as missing:
        raise EnvironmentProblem(
            "plot scales: matplotlib must be installed, got none: "
            "pip install -c constraints.txt -e '.[demo]'"
        ) from missing
    figure = scales_figure(scaled)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    save_bytes(path, buffer.getvalue())


def scales_figure(records: Sequence[dict[str, Any]]) -> Any:
    """A figure of matplotlib with what `plot_scales` draws, of records that are whole."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    _scales(axes[0], records)
    _flushed(axes[1], records[-1])
    _exponents(axes[2], records)
    return figure


def _is_complete(record: dict[str, Any]) -> bool:
    """Whether a record has a number for each block, and a row of shares where it has exponents."""
    names = ("block_scale", "block_underflow", "block_subnormal", "block_overflow")
    arrays = [_numbers(record.get(name), 1) for name in names]
    rows = record.get("block_exponents")
    if rows:
        arrays.append(_numbers(rows, 2))
    lengths = {None if numbers is None else len(numbers) for numbers in arrays}
    return len(lengths) == 1 and None not in lengths


def _numbers(value: Any, axes: int) -> np.ndarray | None:
    """`value` as an array of `axes` axes, or None where it is none of finite numbers in reason."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):  # of other values, or ragged
        return None
    fits = array.ndim == axes and array.size and np.isfinite(array).all()
    return array if fits and np.abs(array).max() < 1e6 else None


def _scales(axis: Any, records: Sequence[dict[str, Any]]) -> None:
    import matplotlib

    steps = [r["step"] for r in records]
    scales = np.array([r["block_scale"] for r in records])
    count = scales.shape[1]
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 1, count))
    for block in range(count):
        axis.plot(steps, scales[:, block], color=colours[block], linewidth=1)
    norm = matplotlib.colors.Normalize(0, max(count - 1, 1))
    mappable = matplotlib.cm.ScalarMappable(norm, "viridis")
    axis.figure.colorbar(mappable, ax=axis, label="resblock")
    axis.set(title="gradient scale of each resblock", xlabel="updates", ylabel="log2 scale")


def _flushed(axis: Any, record: dict[str, Any]) -> None:
    blocks = range(len(record["block_scale"]))
    for name, label in (
        ("underflow", "to zero"),
        ("subnormal", "subnormal"),
        ("overflow", "overflow"),
    ):
        axis.plot(blocks, record[f"block_{name}"], label=label, linewidth=1)
    axis.set(title=f"share of gradient elements, update {record['step']}", xlabel="resblock")
    axis.set_yscale("symlog", linthresh=1e-4)
    axis.set_ylim(0, 1)
    axis.legend(fontsize=8)


def _exponents(axis: Any, records: Sequence[dict[str, Any]]) -> None:
    sampled = [r for r in records if r.get("block_exponents")]
    axis.set(title="no exponents sampled yet", xlabel="resblock", ylabel="log2 |gradient|")
    if not sampled:
        return
    record = sampled[-1]
    shares = np.array(record["block_exponents"]).T  # exponents x blocks
    occupied = np.flatnonzero(shares.sum(1))
    if not occupied.size:
        return
    low, high = int(occupied.min()), int(occupied.max()) + 1
    count = shares.shape[1]
    extent = (-0.5, count - 0.5, low + LOWEST, high + LOWEST)
    axis.imshow(shares[low:high], origin="lower", aspect="auto", extent=extent, cmap="magma")
    scale = np.array(record["block_scale"])
    lines = (
        (FP16_ZERO, "to zero", "-"),
        (FP16_NORMAL, "subnormal", ":"),
        (FP16_TOP, "overflow", "--"),
    )
    for exponent, label, style in lines:
        edge = exponent - scale + (exponent == FP16_TOP)
        axis.step(range(count), edge, style, where="mid", color="white", linewidth=1, label=label)
    axis.legend(fontsize=8, labelcolor="white", facecolor="black", loc="lower right")
    axis.set_facecolor("black")
    axis.set(title=f"exponents in fp16's range, update {record['step']}")


def kept_figure(runs: Sequence[dict[str, Any]]) -> Any:
    """A figure of matplotlib: what fp16 keeps, block by block, of `compare.kept_gradients`.

    Args:
        runs: one a seed; the lines of the first are named.
    """
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    axes = grid.flatten()
    for number, run in enumerate(runs):
        _kept_lines(axes, run, first=number == 0)
    axes[0].set(title="log2 |activation gradient|", xlabel="resblock")
    axes[1].set(title="log2 of the largest clean scale", xlabel="resblock")
    axes[2].set(title="share of the elements in fp16", xlabel="resblock", ylim=(-0.02, 1.02))
    axes[3].set(title="relative change of the parameter gradients", xlabel="resblock")
    if any(value > 0 for run in runs for name in AGAINST for value in run[name]["error"]):
        axes[3].set_yscale("log")
    for axis in axes:
        axis.legend(fontsize=7)
    return figure


def _kept_lines(axes: Any, run: dict[str, Any], first: bool) -> None:
    """One seed's lines."""

    def line(axis: Any, values: list[float], label: str, *style: str, **more: Any) -> None:
        axis.plot(range(len(values)), values, *style, label=label if first else None, lw=1, **more)

    for place, (share, values) in enumerate(run["quantiles"].items()):
        line(axes[0], values, f"{share} of the elements", color=f"C{(0, 1, 4)[place]}")
    for name, color in (("one scale", "C3"), ("own scales", "C2")):
        kept = run[name]
        ends = [-24 - scale for scale in kept["block_scale"]]
        line(axes[0], ends, f"zero: {name}", ":", color=color)
        line(axes[1], kept["block_scale"], name, color=color)
        line(axes[2], kept["block_underflow"], f"{name}: to zero", color=color)
        line(axes[2], kept["block_subnormal"], f"{name}: subnormal", ":", color=color)
        line(axes[3], kept["error"], AGAINST[name], color=color)
