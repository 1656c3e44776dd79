"""How one expert lies in memory: all its tensors in one contiguous row of bytes, so that one copy moves it.

Standard library and torch dtypes only; the same layout serves host rows and slots.
"""

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


def row_layout(tensors: dict[str, torch.Tensor]) -> RowLayout:
    """Layout for stacked expert tensors (E, ...), in the order given."""
    fields, offset = [], 0
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape[1:])
        nbytes = tensor[0].numel() * tensor.element_size()
        fields.append(Field(name, shape, tensor.dtype, offset, nbytes))
        offset += -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES
    return RowLayout(tuple(fields), offset)
