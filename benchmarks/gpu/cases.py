"""What is measured, most wanted first: where time runs out, the end of the list is left out."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("row", "column", "conv", "causal")
PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Case:
    """One set of inputs; forward and backward are measured on it.

    Attributes:
        op: "sparse_attention", "gumbel_softmax" or "card" (copy bandwidth and GEMM rates).
        kind: the attention pattern; "" for other ops.
        dtype: as torch names it.
        size: (batch, heads, head_size, text_len, rows, columns); (rows, codes); (copied bytes, n)
            of the card's copy and of its n x n x n products.
        seconds: a first guess of what it takes, compilation of rivals included.
    """

    op: str
    kind: str
    dtype: str
    size: tuple[int, ...]
    seconds: float

    @property
    def name(self) -> str:
        """As tables and result files show it."""
        if self.op == "card":
            return "card"
        if self.op == "gumbel_softmax":
            return f"gumbel_softmax {self.size[0]} x {self.size[1]} {self.dtype}"
        batch, heads, head_size, text_len, rows, columns = self.size
        length = text_len + rows * columns
        return f"{self.op} {self.kind} B{batch} H{heads} T{length} D{head_size} {self.dtype}"

    @property
    def passes(self) -> tuple[str, ...]:
        """The rows that it gives."""
        return ("copy", "float16 GEMM", "bfloat16 GEMM") if self.op == "card" else PASSES


def all_cases(*, dry_run: bool) -> list[Case]:
    """The cases in order; of a dry run the same list with tiny sizes."""
    full, small = (8, 62, 64, 256, 32, 32), (8, 16, 64, 256, 32, 32)
    codes, card = (8192, 8192), (2**30, 8192)
    if dry_run:
        full, small, codes, card = (1, 2, 16, 5, 4, 4), (1, 1, 16, 5, 4, 4), (8, 32), (2**10, 16)

    def attention(dtype: str, size: tuple[int, ...]) -> list[Case]:
        return [Case("sparse_attention", kind, dtype, size, 20.0) for kind in KINDS]

    dtypes = ("float32", "float16", "bfloat16")
    gumbel = [Case("gumbel_softmax", "", dtype, codes, 15.0) for dtype in dtypes]
    first, last = attention("float16", full), attention("bfloat16", full)
    few = attention("bfloat16", small) + attention("float16", small)
    return [Case("card", "", "", card, 10.0), *first, *gumbel, *last, *few]
