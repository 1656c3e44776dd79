"""How experts lie in memory: all tensors of an expert in one contiguous row of bytes, so that one copy moves it.

Standard library and torch dtypes only; the same layout serves host rows and slots.
"""

from math import prod
from typing import NamedTuple

import torch

#: Alignment of each tensor within a row and of rows in the pool, bytes: enough for any vector load and for DMA.
ALIGN_BYTES = 256


class Field(NamedTuple):
    """One tensor of an expert within its row."""

    name: str
    shape: tuple[int, ...]  # of one expert
    dtype: torch.dtype
    offset: int  # bytes from the row's start
    nbytes: int


class RowLayout(NamedTuple):
    """The fields of one MoE layer's experts and the bytes a row takes."""

    fields: tuple[Field, ...]
    row_bytes: int

    def field(self, name: str) -> Field:
        """The field of that name."""
        return next(field for field in self.fields if field.name == name)

    def view(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        """One field of all rows, (N, *shape), as a view of (N, >= row_bytes) uint8 memory."""
        field = self.field(name)
        data = rows[:, field.offset : field.offset + field.nbytes].view(field.dtype)
        return data.unflatten(1, field.shape)


class Run(NamedTuple):
    """Experts that one copy moves: rows `expert`, `expert + 1`, ... into slots `slot`, `slot + 1`, ..."""

    expert: int
    slot: int
    num: int


def adjacent_runs(experts: list[int], slots: list[int], most: int) -> list[Run]:
    """Cut pairs of expert and slot into runs of at most `most` in which both follow one another.

    Which slot an expert gets is the residency table's choice: slots taken from an empty pool follow one another,
    evicted ones only by chance. With most = 1 the order is kept, else it is that of the experts.
    """
    if most <= 1 or len(experts) <= 1:
        return [Run(expert, slot, 1) for expert, slot in zip(experts, slots, strict=True)]
    runs: list[Run] = []
    for expert, slot in sorted(zip(experts, slots, strict=True)):
        last = runs[-1] if runs else Run(-2, -2, most)
        if last.num < most and (expert, slot) == (last.expert + last.num, last.slot + last.num):
            runs[-1] = last._replace(num=last.num + 1)
        else:
            runs.append(Run(expert, slot, 1))
    return runs


def row_layout(tensors: dict[str, torch.Tensor]) -> RowLayout:
    """Layout for stacked expert tensors (E, ...), in the order given."""
    fields, offset = [], 0
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape[1:])
        nbytes = prod(shape) * tensor.element_size()
        fields.append(Field(name, shape, tensor.dtype, offset, nbytes))
        offset += -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES
    return RowLayout(tuple(fields), offset)
