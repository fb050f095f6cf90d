"""Nearest neighbours among features: exact, in chunks, so that any number of them fits."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dalle.console import progress_shown
from dalle.errors import DataError, EnvironmentProblem

CHUNK = 4096  # rows whose products are held at once


def nearest(queries: Tensor, base: Tensor, *, faiss: bool = False) -> tuple[Tensor, Tensor]:
    """For each row the row of `base` with the largest product; exact, in chunks, on their device.

    Args:
        queries: (n, d), a tensor or array.
        base: (m, d), m >= 1, on the same device.
        faiss: search by the package faiss (`IndexFlatIP`, exact too).

    Returns:
        The products (n,) float32, and the rows (n,) int64; of equal ones the first.

    Raises:
        EnvironmentProblem: faiss is asked for and not installed.
        DataError: shapes that do not fit, or features that are not finite.
    """
    queries, base = (
        x if isinstance(x, Tensor) else torch.from_numpy(np.asarray(x)) for x in (queries, base)
    )
    if queries.dim() != 2 or base.dim() != 2 or queries.shape[1] != base.shape[1] or not len(base):
        raise DataError(
            "nearest: queries and base must be (n, d) and (m, d) with m >= 1, got "
            f"{tuple(queries.shape)} and {tuple(base.shape)}"
        )
    queries, base = queries.float(), base.float()
    if faiss:
        return by_faiss(queries, base)
    values = queries.new_full((len(queries),), -math.inf)
    rows = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    with progress_shown("nearest neighbours") as show:
        for begin in range(0, len(queries), CHUNK):
            part = slice(begin, begin + CHUNK)
            for first in range(0, len(base), CHUNK):
                found = (queries[part] @ base[first : first + CHUNK].T).max(1)
                if bool(found.values.isnan().any()):
                    raise DataError("nearest: features must be finite, got NaN or infinity")
                closer = found.values > values[part]
                values[part] = torch.where(closer, found.values, values[part])
                rows[part] = torch.where(closer, found.indices + first, rows[part])
            show(min(begin + CHUNK, len(queries)), len(queries))
    return values, rows


def by_faiss(queries: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """`nearest` by the package faiss, exact too.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    try:
        import faiss  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as missing:
        raise EnvironmentProblem(
            "eval overlap: faiss must be installed, got none; type: pip install faiss-cpu, or "
            "leave --faiss out"
        ) from missing
    index = faiss.IndexFlatIP(base.shape[1])
    index.add(np.ascontiguousarray(base.cpu().numpy()))
    values, rows = index.search(np.ascontiguousarray(queries.cpu().numpy()), 1)
    return torch.from_numpy(values[:, 0]), torch.from_numpy(rows[:, 0])
