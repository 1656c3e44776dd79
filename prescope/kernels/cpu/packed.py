"""How the compiled kernel finds a packed matrix in an expert's row: where its scales are and what they hold for.

Products and sums are those of floats: activations are rounded to their dtype and to nothing coarser, weights are the
exact values of their format. So results differ from those of unpacked weights by the order of sums alone.
"""

import ctypes

import torch

from ...weights.formats import Format, Fp8, Int4, Int8, Mxfp4, Nvfp4
from ...weights.layout import RowLayout
from .build import CannotBuild

#: As in packed_values.h.
_PLAIN, _INT8, _E4M3, _INT4, _E2M1 = range(5)
_SCALES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3, torch.float8_e4m3fn: 4}
#: A group at least as wide as every row: one scale for all of it.
_WHOLE = 1 << 62
#: Weights of 4 bits share a word of 8 with others of one scale, those of 8 bits a block of 128.
_LEAST_GROUP = {_INT4: 8, _E2M1: 8, _INT8: 128, _E4M3: 128}


class Packed(ctypes.Structure):
    """`Packing` of packed_values.h: offsets are bytes from the row's start, -1 for what is not there."""

    _fields_ = (
        ("scale", ctypes.c_int64), ("zero", ctypes.c_int64), ("row_scale", ctypes.c_int64),
        ("group", ctypes.c_int64), ("group_rows", ctypes.c_int64),
        ("kind", ctypes.c_int32), ("scale_kind", ctypes.c_int32),
    )  # fmt: skip


def packed_as(layout: RowLayout, name: str) -> Packed:
    """How a layout's matrix is packed; of kind 0 where it is not.

    Raises:
        CannotBuild: in a way that the kernel does not know.
    """
    matrix = None if layout.packing is None else layout.packing.matrix(name)
    if matrix is None:
        return Packed(-1, -1, -1, _WHOLE, 1, _PLAIN, 0)
    fields = {suffix: layout.field(field) for suffix, field in matrix.field_names.items()}
    kind, group, group_rows = _form(matrix.format, matrix.shape)
    scale, zero = fields["_scale"], fields.get("_zero")
    # Sums of whole rows are multiplied once, where weights have 8 bits; those of 4 are always taken by groups.
    is_by_row = (
        kind in (_INT8, _E4M3) and group == _WHOLE and group_rows == 1 and scale.dtype == torch.float32
    )
    row_scale = scale if is_by_row else fields.get("_global")
    if not is_by_row and (group < _LEAST_GROUP[kind] or group & (group - 1)):
        raise CannotBuild(
            f"the compiled kernel takes no {matrix.format.name} weights in groups of {group}: powers of two from "
            f"{_LEAST_GROUP[kind]} on"
        )
    return Packed(
        -1 if is_by_row else scale.offset,
        -1 if zero is None else zero.offset,
        -1 if row_scale is None else row_scale.offset,
        group, group_rows, kind, _SCALES[scale.dtype],
    )  # fmt: skip


def _form(format: Format, shape: tuple[int, int]) -> tuple[int, int, int]:
    """Kind of weights, and how many of a row and how many rows share a scale."""
    match format:
        case Int8(group):
            return _INT8, _WHOLE if group is None else group, 1
        case Fp8(block_rows, block_columns):
            return _E4M3, _WHOLE if block_columns >= shape[1] else block_columns, block_rows
        case Int4(group):
            return _INT4, group if group < shape[1] else _WHOLE, 1
        case Mxfp4():
            return _E2M1, 32, 1
        case Nvfp4():
            return _E2M1, 16, 1
    raise CannotBuild(f"the compiled kernel takes no {format.name} weights")
