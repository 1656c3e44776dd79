"""How experts lie in memory: all tensors of an expert in one contiguous row of bytes, so that one copy moves it.

The same layout serves host rows and slots. A matrix is one field, or packed in several (`formats`).
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch

from .formats import Format, PackedMatrices

#: Alignment of each tensor within a row and of rows in the pool, bytes: enough for any vector load and for DMA.
ALIGN_BYTES = 256


class Field(NamedTuple):
    """One tensor of an expert within its row."""

    name: str
    shape: tuple[int, ...]  # of one expert
    dtype: torch.dtype
    offset: int  # bytes from the row's start
    nbytes: int


class PackedMatrix(NamedTuple):
    """A matrix (N, K) that is held in several fields, called `name` and the suffixes of the format's parts."""

    name: str
    format: Format
    shape: tuple[int, int]

    @property
    def field_names(self) -> dict[str, str]:
        """By suffix."""
        return {part.suffix: self.name + part.suffix for part in self.format.parts(self.shape)}


class Packing(NamedTuple):
    """What packed fields stand for, and the dtype of what computes with them."""

    matrices: tuple[PackedMatrix, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Of the format: all matrices of a layer have one, with the same or other groups."""
        return self.matrices[0].format.name

    def matrix(self, name: str) -> PackedMatrix | None:
        """The matrix of that name; None for a tensor that is a field as it is."""
        return next((matrix for matrix in self.matrices if matrix.name == name), None)


class RowLayout(NamedTuple):
    """The fields of one MoE layer's experts and the bytes a row takes."""

    fields: tuple[Field, ...]
    row_bytes: int
    packing: Packing | None = None

    def __repr__(self) -> str:
        # Part of a model's fingerprint: that of a layout without packing is the one recordings were made with.
        packing = "" if self.packing is None else f", packing={self.packing!r}"
        return f"RowLayout(fields={self.fields!r}, row_bytes={self.row_bytes!r}{packing})"

    def field(self, name: str) -> Field:
        """The field of that name."""
        return next(field for field in self.fields if field.name == name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one expert's tensor, packed or not."""
        packed = None if self.packing is None else self.packing.matrix(name)
        return self.field(name).shape if packed is None else packed.shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of what computes with a tensor."""
        return self.field(name).dtype if self.packing is None else self.packing.dtype

    def matrices(self, rows: torch.Tensor, name: str) -> torch.Tensor | PackedMatrices:
        """One tensor of all rows, to be indexed by row: views, or unpacked one by one."""
        packed = None if self.packing is None else self.packing.matrix(name)
        if self.packing is None or packed is None:
            return self.view(rows, name)
        parts = {suffix: self.view(rows, field) for suffix, field in packed.field_names.items()}
        return PackedMatrices(packed.format, parts, packed.shape, self.packing.dtype)

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


def packed_layout(
    matrices: Sequence[PackedMatrix], dtype: torch.dtype, others: Mapping[str, tuple[int, ...]]
) -> RowLayout:
    """Layout of experts whose matrices are packed.

    Args:
        dtype: of what computes with them, and of `others`.
        others: shapes of tensors that stay as they are: biases.
    """
    parts = {
        matrix.name + part.suffix: torch.empty((1, *part.shape), dtype=part.dtype, device="meta")
        for matrix in matrices
        for part in matrix.format.parts(matrix.shape)
    }
    plain = {name: torch.empty((1, *shape), dtype=dtype, device="meta") for name, shape in others.items()}
    return row_layout(parts | plain)._replace(packing=Packing(tuple(matrices), dtype))


def pack(packing: Packing, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The fields (E, ...) of plain tensors (E, ...): matrices (E, N, K) rounded to what their format has."""
    fields: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        matrix = packing.matrix(name)
        if matrix is None:
            fields[name] = tensor.to(packing.dtype)
            continue
        parts = matrix.format.pack(tensor)
        fields |= {field: parts[suffix] for suffix, field in matrix.field_names.items()}
    return fields
