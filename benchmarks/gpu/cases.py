"""What is measured, most wanted first: where time runs out, the end of the list is left out."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("row", "column", "conv", "causal")
PASSES = ("forward", "backward")
POWERSGD = ("compress", "project", "decompress", "round")
SIXTEEN = {  # op of the 16-bit rooms -> its passes
    "formats": ("pack", "unpack"),
    "grad_scale": ("enter", "leave", "unscale"),
    "adam16": ("step",),
}


@dataclass(frozen=True)
class Case:
    """One set of inputs; forward and backward are measured on it.

    Attributes:
        op: a room, or "card" (copy bandwidth and GEMM rates).
        kind: the attention pattern, the 16-bit format; "" for other ops.
        dtype: as torch names it.
        size: (batch, heads, head_size, text_len, rows, columns); (rows, codes); (elements,);
            for "block" the same with PowerSGD's rank;
            (m, n, rank, matrices) of PowerSGD's products, (n, rank, matrices) of `orthogonalize`;
            (copied bytes, n) of the card's copy and of its n x n x n products.
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
        if self.op in SIXTEEN:
            return " ".join(filter(None, (self.op, self.kind, str(self.size[0]), self.dtype)))
        if self.op == "powersgd":
            *shape, rank, count = self.size
            of = " x ".join(map(str, shape))
            return " ".join(filter(None, (self.op, self.kind, f"{count} of {of}, rank {rank}")))
        batch, heads, head_size, text_len, rows, columns = self.size[:6]
        length = text_len + rows * columns
        return f"{self.op} {self.kind} B{batch} H{heads} T{length} D{head_size} {self.dtype}"

    @property
    def passes(self) -> tuple[str, ...]:
        """The rows that it gives."""
        if self.op == "card":
            return ("copy", "float16 GEMM", "bfloat16 GEMM")
        if self.op == "block":
            return ("step",)
        if self.op == "powersgd":
            return ("orthogonalize",) if self.kind else POWERSGD
        return SIXTEEN.get(self.op, PASSES)


def powersgd(d: int) -> list[Case]:
    """The paper's shards of a model of width d = 3968 on 8 GPUs, at the ranks 112 and 896."""
    small, large = (d * 112) // 3968 or 1, (d * 896) // 3968
    shapes = [(d, n, small, 1) for n in (d // 8, d // 2, d, 4 * d)] + [(d, d // 2, small, 4)]
    shapes += [(d, n, large, 1) for n in (d // 2, d, 4 * d)]
    tall = [(d, small, 1), (d, small, 16), (d, large, 1)]
    found = [Case("powersgd", "", "float32", shape, 6.0) for shape in shapes]
    return found + [Case("powersgd", "orthogonalize", "float32", shape, 6.0) for shape in tall]


def all_cases(*, dry_run: bool) -> list[Case]:
    """The cases in order; of a dry run the same list with tiny sizes."""
    full, small = (8, 62, 64, 256, 32, 32), (8, 16, 64, 256, 32, 32)
    codes, card, many = (8192, 8192), (2**30, 8192), (2**28,)
    if dry_run:
        many = (20_000,)
        full, small, codes, card = (1, 2, 16, 5, 4, 4), (1, 1, 16, 5, 4, 4), (8, 32), (2**10, 16)

    def attention(dtype: str, size: tuple[int, ...]) -> list[Case]:
        return [Case("sparse_attention", kind, dtype, size, 20.0) for kind in KINDS]

    dtypes = ("float32", "float16", "bfloat16")
    gumbel = [Case("gumbel_softmax", "", dtype, codes, 15.0) for dtype in dtypes]
    formats = [Case("formats", kind, "float32", many, 5.0) for kind in ("1-6-9", "0-6-10")]
    others = [Case(op, "", d, many, 8.0) for op in ("grad_scale", "adam16") for d in dtypes[:2]]
    block = Case("block", "row", "float16", (*((1, 2, 16) if dry_run else (2, 62, 64)), *full[3:],
                                             2 if dry_run else 112), 20.0)  # fmt: skip
    others += [block, *powersgd(16 if dry_run else 3968)]
    first, last = attention("float16", full), attention("bfloat16", full)
    few = attention("bfloat16", small) + attention("float16", small)
    return [Case("card", "", "", card, 10.0), *first, *gumbel, *formats, *others, *last, *few]
