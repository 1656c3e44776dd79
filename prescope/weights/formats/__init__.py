"""Packed forms of a weight matrix: which tensors hold it, and its exact values in float32."""

from ...errors import UnsupportedOption
from .base import Format, PackedMatrices, Part
from .fp4 import Mxfp4, Nvfp4
from .fp8 import Fp8
from .int4 import Int4
from .int8 import Int8

__all__ = [
    "PACKED",
    "Format",
    "Fp8",
    "Int4",
    "Int8",
    "Mxfp4",
    "Nvfp4",
    "PackedMatrices",
    "Part",
    "format_for",
]

#: What weights can be packed to while they are loaded.
PACKED = ("int8", "fp8", "int4", "mxfp4")
#: Widths of a group of int4 weights, the widest that divides a row is taken: fewer scales to move.
GROUPS = (128, 64, 32)


def format_for(name: str, *in_dims: int) -> Format:
    """The format that `name` (one of `PACKED`) means for matrices of these row lengths.

    Raises:
        UnsupportedOption: rows of that length cannot be packed so.
    """
    if name == "int8":
        return Int8()
    if name == "fp8":
        return Fp8(128, 128)
    group = next((group for group in GROUPS if all(dim % group == 0 for dim in in_dims)), None)
    if name == "mxfp4" and group is not None:
        return Mxfp4()
    if name == "int4" and group is not None:
        return Int4(group)
    raise UnsupportedOption(
        f"experts={name!r} packs rows in groups of 32 weights or more, the experts' rows have "
        f"{' and '.join(map(str, in_dims))}; use 'int8' or 'fp8'"
    )
