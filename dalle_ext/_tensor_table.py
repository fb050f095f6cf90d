"""The addresses of a multi-tensor op's tensors, as `csrc/common/tensor_table.h` reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import attrgetter

import torch

from dalle_ext._checks import integer

Tensor = torch.Tensor
CHUNK = 32768  # elements; kTableChunk of csrc/common/tensor_table.h
COLUMNS = 5
KINDS = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.int16: 4, torch.int64: 5}


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a `DTensor`, not a copy; any other tensor as it is."""
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def flat(op: str, name: str, tensor: Tensor) -> Tensor:
    """The tensor's memory as (numel,): a view of a dense tensor, in the order of its strides; of a
    `DTensor`, this process's part.

    Raises:
        ValueError: the tensor has gaps, or elements that share memory.
    """
    tensor = local_part(tensor).detach()
    if tensor.is_contiguous():
        return tensor.view(-1)
    strides = tensor.stride()
    axes = sorted(range(tensor.dim()), key=lambda d: (-strides[d], -tensor.shape[d]))
    ordered = tensor.permute(axes)
    if not ordered.is_contiguous():
        got = f"shape {tuple(tensor.shape)}, strides {strides}"
        raise ValueError(f"{op}: {name} must fill their memory without gaps, got {got}")
    return ordered.reshape(-1)


PLAIN = {Tensor, torch.nn.Parameter}


def in_memory(op: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors whose elements lie as `flat` orders them: of any shape where they are contiguous
    already, so that a step of many parameters makes no views; of a `DTensor`, this process's part.
    Raises as `flat`.
    """
    if not PLAIN.issuperset(map(type, tensors)):
        tensors = [local_part(tensor) for tensor in tensors]
    if PLAIN.issuperset(map(type, tensors)):
        contiguous = map(Tensor.is_contiguous, tensors)
        return [t if c else flat(op, "params", t) for t, c in zip(tensors, contiguous, strict=True)]
    return [flat(op, "params", tensor) for tensor in tensors]


class TensorTable:
    """A table of tensors, one row for each, ordered by group.

    Args:
        columns: one to five lists of the same length; `columns[c][i]` is tensor c of row i. All
            contiguous, on one device, those of a row of one size (or one element, where an op says
            so), float32, float16, bfloat16, int16 or int64; the op checks that.
        groups: group of each row, 0 or more; all 0 if left out.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a column or the groups of another length.

    Attributes:
        host, rows: (n, 9) int64 on the CPU, and on the tensors' device.
        columns: the lists in the order of the rows.
        order: row r holds tensor `order[r]` of the lists given.
    """

    def __init__(
        self, columns: Sequence[Sequence[Tensor]], groups: Sequence[int] | None = None
    ) -> None:
        count = len(columns[0])
        groups = [0] * count if groups is None else groups
        for name, listed in [("groups", groups), *(("columns", column) for column in columns)]:
            if len(listed) != count:
                raise ValueError(f"TensorTable: {name} must be of {count} rows, got {len(listed)}")
        if set(map(type, groups)) - {int}:
            groups = [integer("TensorTable", "groups", group) for group in groups]
        for dtype in {t.dtype for column in columns for t in column} - KINDS.keys():
            known = "float32, float16, bfloat16, int16 or int64"
            raise TypeError(f"TensorTable: tensors must be {known}, got {dtype}")
        self.order = sorted(range(count), key=groups.__getitem__)
        self.columns = self.arranged(columns)
        self._addresses = self._key(columns, groups)
        numels = [t.numel() for t in self.columns[0]]
        chunks = [-(-numel // CHUNK) for numel in numels]
        kinds = [0] * count
        for c, column in enumerate(self.columns):
            kinds = [k + (KINDS[t.dtype] << 4 * c) for k, t in zip(kinds, column, strict=True)]
        data = [[t.data_ptr() for t in column] for column in self.columns]
        data += [[0] * count] * (COLUMNS - len(data))
        numbers = [*data, numels, [0, *accumulate(chunks)][:count], kinds]
        numbers.append([groups[i] for i in self.order])
        self.host = torch.tensor(numbers, dtype=torch.int64, device="cpu").t().contiguous()
        device = columns[0][0].device if count else torch.device("cpu")
        if device.type == "cuda":  # from pinned memory, so that the host does not wait
            self.rows = self.host.pin_memory().to(device, non_blocking=True)
        else:
            self.rows = self.host

    def arranged(self, columns: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Lists of tensors that the table fits, in the order of the rows."""
        return [[column[i] for i in self.order] for column in columns]

    @staticmethod
    def _key(columns: Sequence[Sequence[Tensor]], groups: Sequence[int]) -> list[object]:
        def read(what: Callable[[Tensor], object]) -> list[list[object]]:
            return [list(map(what, column)) for column in columns]

        return [list(groups), read(Tensor.data_ptr), read(Tensor.numel), read(attrgetter("dtype"))]

    def fits(
        self, columns: Sequence[Sequence[Tensor]], groups: Sequence[int] | None = None
    ) -> bool:
        """Whether the table still says where these tensors are (same order as when it was made).

        Addresses are compared, not objects: a gradient may be another tensor at the same address.
        """
        return self._addresses == self._key(columns, groups or [0] * len(columns[0]))
