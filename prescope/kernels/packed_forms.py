"""What the packed kernels must know of a format: kinds of weights and scales, and which weights share a scale.

Knows nothing of Triton, so that it can be asked where there is none.
"""

from functools import cache
from math import gcd
from typing import NamedTuple

from ..weights.formats import Format, Fp8, Int4, Int8, Mxfp4, Nvfp4
from ..weights.layout import RowLayout

#: Kinds of weights: integers come first, and those of 8 bits have the even numbers.
INT8, INT4, E4M3, E2M1 = range(4)
#: Kinds of scales: floats, exponents of powers of two, e4m3.
FLOAT_SCALE, E8M0_SCALE, E4M3_SCALE = range(3)
#: By kind, what weights are worth as the kernels read them: float16 patterns, integers as subnormals.
_WORTH = (2.0**24, 2.0**24, 2.0**8, 2.0**14)
#: Bytes that a thread loads at once.
_PIECE_BYTES = 16
_WORD_BYTES = 4


class Form(NamedTuple):
    """A format of matrices with rows of one length.

    Attributes:
        kind, scale_kind: of the above.
        group: weights of a row with one scale, 0 for no scales but those of whole rows.
        group_rows: rows that share it.
        row_group: rows with one scale of their own, a float32, 0 for none; `row_scale`: its suffix.
        has_zeros: whether integers have zeros of their own, by group.
    """

    kind: int
    scale_kind: int
    group: int
    group_rows: int
    row_group: int
    row_scale: str
    has_zeros: bool

    @property
    def lanes(self) -> int:
        """Weights in a word of 32 bits."""
        return 8 if self.kind in (INT4, E2M1) else 4

    @property
    def piece(self) -> int:
        """Weights in a row that share all scales, and which one thread loads: a power of two."""
        most = _PIECE_BYTES // _WORD_BYTES * self.lanes
        return most if self.group == 0 else gcd(most, self.group)

    @property
    def worth(self) -> float:
        """What a weight is worth, as the kernels read it."""
        return _WORTH[self.kind]


@cache
def form_of(format: Format, columns: int) -> Form | None:
    """The form of a format whose rows have that many weights; None for a format that the kernels do not know."""
    match format:
        case Int8(None):
            return Form(INT8, FLOAT_SCALE, 0, 1, 1, "_scale", False)
        case Int8(int(group)):
            return Form(INT8, FLOAT_SCALE, group, 1, 0, "", False)
        case Fp8(block_rows, block_columns) if block_columns >= columns:
            return Form(E4M3, FLOAT_SCALE, 0, 1, block_rows, "_scale", False)
        case Fp8(block_rows, block_columns):
            return Form(E4M3, FLOAT_SCALE, block_columns, block_rows, 0, "", False)
        case Int4(group, _, has_zeros):
            return Form(INT4, FLOAT_SCALE, group, 1, 0, "", has_zeros)
        case Mxfp4():
            return Form(E2M1, E8M0_SCALE, 32, 1, 0, "", False)
        case Nvfp4():
            return Form(E2M1, E4M3_SCALE, 16, 1, 1, "_global", False)
    return None


def packed_problem(layout: RowLayout) -> str:
    """Why the packed kernels cannot read a layer's slots, "" if they can."""
    if layout.packing is None:
        return ""
    for matrix in layout.packing.matrices:
        columns = matrix.shape[1]
        form = form_of(matrix.format, columns)
        if form is None:
            return f"there is no kernel for {matrix.format.name}"
        if columns % form.lanes:
            return f"{matrix.format.name} kernels read words of {form.lanes} weights, rows have {columns}"
    return ""
