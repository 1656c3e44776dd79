"""Expert linears in Triton that unpack weights in registers: of 8 or 4 bits, read straight from the slots.

`packed_pairs` and `packed_tiles` do what `_pair_linear` and `_grouped_linear` do for plain weights. Words of 32 bits
hold four or eight weights, a whole number of a row's. All kinds of weights become float16 patterns first, two at once,
by shifts and masks: integers as subnormals, floats with their exponent and mantissa moved into place. As float32 that
is exact, and less than the weight by a power of two (`worth`), which one product at the end makes good. No table, no
conversion that only some GPUs have, and the same in the interpreter. (The two patterns of e4m3 that are no number are
read as 480.)

Scales come in once for each PIECE of a row, as many weights as a thread loads at once, not for each weight.
"""

import triton
import triton.language as tl

from .packed_forms import E4M3, E4M3_SCALE, E8M0_SCALE, INT4, INT8

_INT8 = tl.constexpr(INT8)
_E4M3 = tl.constexpr(E4M3)
_INT4 = tl.constexpr(INT4)
_E8M0_SCALE = tl.constexpr(E8M0_SCALE)
_E4M3_SCALE = tl.constexpr(E4M3_SCALE)
#: Highest bits of both halves of a word, and of its four bytes, as int32.
_SIGNS_OF_2 = tl.constexpr(0x80008000 - (1 << 32))
_SIGNS_OF_4 = tl.constexpr(0x80808080 - (1 << 32))
_LEAST_HALF = tl.constexpr(2.0**-24)


@triton.jit
def _two(words, j: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """The weights at places j and j + half of words, float32."""
    if KIND == _INT8:  # plus 128
        halves = ((words ^ _SIGNS_OF_4) >> (8 * j)) & 0x00FF00FF
    elif KIND == _INT4:
        halves = (words >> (4 * j)) & 0x000F000F
    elif KIND == _E4M3:
        top = words << (8 - 8 * j)
        halves = (top & _SIGNS_OF_2) | ((top >> 1) & 0x3F803F80)
    else:
        top = words << (12 - 4 * j)
        halves = (top & _SIGNS_OF_2) | ((top >> 3) & 0x0E000E00)
    low = halves.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    high = (halves >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _unpack(words, ROWS: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weights (ROWS, COLUMNS) of words, in their order; joins of what one thread holds move nothing."""
    v0, v1 = _two(words, 0, KIND)
    v2, v3 = _two(words, 1, KIND)
    if KIND % 2 == 0:  # of 8 bits: places 0, 2 and 1, 3
        values = tl.join(tl.join(v0, v1), tl.join(v2, v3))
    else:  # places 0, 4; 1, 5; 2, 6; 3, 7
        v4, v5 = _two(words, 2, KIND)
        v6, v7 = _two(words, 3, KIND)
        even = tl.join(tl.join(v0, v1), tl.join(v4, v5))
        odd = tl.join(tl.join(v2, v3), tl.join(v6, v7))
        values = tl.join(even, odd)
    return tl.reshape(values, (ROWS, COLUMNS))


@triton.jit
def _places(  # type: ignore[no-untyped-def]
    group_rows, row_mask, first, IN_DIM: tl.constexpr, GROUP: tl.constexpr, PIECE: tl.constexpr, BLOCK_IN: tl.constexpr
):  # fmt: skip
    """Where the scales of a tile's pieces lie (BLOCK_OUT, BLOCK_IN / PIECE), and which there are."""
    piece = first + tl.arange(0, BLOCK_IN // PIECE) * PIECE
    group: tl.constexpr = GROUP if GROUP > 0 else 1
    return group_rows + (piece // group)[None, :], row_mask[:, None] & (piece < IN_DIM)[None, :]


@triton.jit
def _scales(scale, places, mask, GROUP: tl.constexpr, SCALE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of pieces; 1 where rows have no groups."""
    if GROUP == 0:
        values = tl.full((1, 1), 1.0, tl.float32)
    elif SCALE == _E8M0_SCALE:
        # The exponent's place in a float32; its least, 2 ** -127, is a subnormal.
        bits = tl.load(scale + places, mask=mask, other=0).to(tl.int32) << 23
        values = tl.maximum(bits, 1 << 22).to(tl.float32, bitcast=True)
    elif SCALE == _E4M3_SCALE:
        byte = tl.load(scale + places, mask=mask, other=0).to(tl.int32)
        half = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
        values = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        values = tl.load(scale + places, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def _zeros(zero, places, mask, KIND: tl.constexpr, HAS_ZERO: tl.constexpr):  # type: ignore[no-untyped-def]
    """What stands for zero, as weights are read; floats have none."""
    if HAS_ZERO:
        values = tl.load(zero + places, mask=mask, other=0).to(tl.float32) * _LEAST_HALF
    elif KIND == _INT8:
        values = tl.full((1, 1), 128.0 * _LEAST_HALF, tl.float32)
    else:
        values = tl.full((1, 1), 8.0 * _LEAST_HALF, tl.float32)
    return values


@triton.jit
def packed_pairs(  # type: ignore[no-untyped-def]
    x, words, scale, zero, row_scale, bias, out, slot_of, ids,
    num_experts, out_dim, IN_DIM: tl.constexpr,
    x_div, x_stride, word_slot_stride, scale_slot_stride, zero_slot_stride, row_scale_slot_stride, b_slot_stride,
    out_stride, worth,
    KIND: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr,
    ROW_GROUP: tl.constexpr, PIECE: tl.constexpr, LANES: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A matrix-vector product per (token, expert) pair. GROUP: weights of a row with one scale, 0 for none; GROUP_ROWS:
    rows that share it. ROW_GROUP: rows with one `row_scale`, 0 for none.
    """
    pair = tl.program_id(0)
    expert = tl.load(ids + pair)
    if (expert < 0) | (expert >= num_experts):
        return
    slot = tl.load(slot_of + expert).to(tl.int64)
    if slot < 0:
        return
    rows = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row_mask = rows < out_dim
    matrix = words + slot * word_slot_stride + rows[:, None] * (IN_DIM // LANES)
    vector = x + (pair // x_div).to(tl.int64) * x_stride
    groups: tl.constexpr = (IN_DIM + GROUP - 1) // GROUP if GROUP > 0 else 1
    group_rows = (rows // GROUP_ROWS)[:, None] * groups
    acc = tl.zeros((BLOCK_OUT, BLOCK_IN // PIECE), dtype=tl.float32)
    for first in tl.range(0, IN_DIM, BLOCK_IN, num_stages=STAGES):
        w = first // LANES + tl.arange(0, BLOCK_IN // LANES)
        columns = first + tl.arange(0, BLOCK_IN)
        if IN_DIM % BLOCK_IN == 0:
            tile = tl.load(matrix + w[None, :], mask=row_mask[:, None], other=0)
            values = tl.load(vector + columns).to(tl.float32)
        else:
            tile = tl.load(
                matrix + w[None, :], mask=row_mask[:, None] & (w < IN_DIM // LANES)[None, :], other=0
            )
            values = tl.load(vector + columns, mask=columns < IN_DIM, other=0.0).to(tl.float32)
        places, mask = _places(group_rows, row_mask, first, IN_DIM, GROUP, PIECE, BLOCK_IN)
        scales = _scales(scale + slot * scale_slot_stride, places, mask, GROUP, SCALE)
        offsets = _zeros(zero + slot * zero_slot_stride, places, mask, KIND, HAS_ZERO)
        # Products before pieces: x takes over the layout of the weights, which so stay where they were loaded.
        products = _unpack(tile, BLOCK_OUT, BLOCK_IN, KIND) * values[None, :]
        sums = tl.sum(tl.reshape(products, (BLOCK_OUT, BLOCK_IN // PIECE, PIECE)), axis=2)
        if KIND <= _INT4:
            sums -= tl.sum(tl.reshape(values, (BLOCK_IN // PIECE, PIECE)), axis=1)[None, :] * offsets
        if GROUP > 0:
            sums *= scales
        acc += sums
    total = tl.sum(acc, axis=1) * worth
    if ROW_GROUP > 0:
        total *= tl.load(
            row_scale + slot * row_scale_slot_stride + rows // ROW_GROUP, mask=row_mask, other=0.0
        )
    result = total.to(out.dtype.element_ty)
    if HAS_BIAS:
        result += tl.load(bias + slot * b_slot_stride + rows, mask=row_mask, other=0.0)
    tl.store(out + pair.to(tl.int64) * out_stride + rows, result, mask=row_mask)


@triton.jit
def packed_tiles(  # type: ignore[no-untyped-def]
    x, words, scale, zero, row_scale, bias, out, order, blocks,
    out_dim, IN_DIM: tl.constexpr,
    x_div, x_stride, word_slot_stride, scale_slot_stride, zero_slot_stride, row_scale_slot_stride, b_slot_stride,
    out_stride, worth,
    KIND: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr,
    ROW_GROUP: tl.constexpr, PIECE: tl.constexpr, LANES: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """A tiled product over pairs of one expert. Weights times scales of groups are rounded to x's dtype, as the
    reference rounds them; scales of whole rows come in behind the product, in float32.
    """
    block = tl.program_id(1)
    slot = tl.load(blocks + block * 3).to(tl.int64)
    start = tl.load(blocks + block * 3 + 1)
    end = tl.load(blocks + block * 3 + 2)
    if start >= end:  # a captured step launches as many tiles as it could ever need
        return
    places_M = start + tl.arange(0, BLOCK_M)
    place_mask = places_M < end
    pairs = tl.load(order + places_M, mask=place_mask, other=0)
    rows = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row_mask = rows < out_dim
    inputs = x + (pairs // x_div).to(tl.int64)[:, None] * x_stride
    matrix = words + slot * word_slot_stride + rows[:, None] * (IN_DIM // LANES)
    groups: tl.constexpr = (IN_DIM + GROUP - 1) // GROUP if GROUP > 0 else 1
    group_rows = (rows // GROUP_ROWS)[:, None] * groups
    acc = tl.zeros((BLOCK_M, BLOCK_OUT), dtype=tl.float32)
    # Too narrow to be loaded ahead by the compiler: what scales the next tile is loaded while this one is used.
    places, mask = _places(group_rows, row_mask, 0, IN_DIM, GROUP, PIECE, BLOCK_IN)
    scales = _scales(scale + slot * scale_slot_stride, places, mask, GROUP, SCALE)
    offsets = _zeros(zero + slot * zero_slot_stride, places, mask, KIND, HAS_ZERO)
    for first in range(0, IN_DIM, BLOCK_IN):
        columns = first + tl.arange(0, BLOCK_IN)
        w = first // LANES + tl.arange(0, BLOCK_IN // LANES)
        a = tl.load(
            inputs + columns[None, :], mask=place_mask[:, None] & (columns < IN_DIM)[None, :], other=0.0
        )
        tile = tl.load(matrix + w[None, :], mask=row_mask[:, None] & (w < IN_DIM // LANES)[None, :], other=0)
        places, mask = _places(group_rows, row_mask, first + BLOCK_IN, IN_DIM, GROUP, PIECE, BLOCK_IN)
        following = _scales(scale + slot * scale_slot_stride, places, mask, GROUP, SCALE)
        following_offsets = _zeros(zero + slot * zero_slot_stride, places, mask, KIND, HAS_ZERO)
        values = tl.reshape(_unpack(tile, BLOCK_OUT, BLOCK_IN, KIND), (BLOCK_OUT, BLOCK_IN // PIECE, PIECE))
        if KIND <= _INT4:
            values -= offsets[:, :, None]
        if GROUP > 0:
            values *= scales[:, :, None]
        scales, offsets = following, following_offsets
        if x.dtype.element_ty == tl.float16:  # too narrow for patterns that are so much less than the weights
            values *= worth
        b = tl.reshape(values.to(x.dtype.element_ty), (BLOCK_OUT, BLOCK_IN))
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    if x.dtype.element_ty != tl.float16:
        acc *= worth
    if ROW_GROUP > 0:
        of_rows = row_scale + slot * row_scale_slot_stride + rows // ROW_GROUP
        acc *= tl.load(of_rows, mask=row_mask, other=0.0)[None, :]
    result = acc.to(out.dtype.element_ty)
    if HAS_BIAS:
        result += tl.load(bias + slot * b_slot_stride + rows, mask=row_mask, other=0.0)[None, :]
    target = out + pairs.to(tl.int64)[:, None] * out_stride + rows[None, :]
    tl.store(target, result, mask=place_mask[:, None] & row_mask[None, :])
