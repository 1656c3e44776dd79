"""Packed forms: what they take, what they hold exactly, and how near they come to what they do not."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from prescope.errors import UnsupportedOption
from prescope.weights.formats import PACKED, Fp8, Int4, Int8, Mxfp4, Nvfp4, PackedMatrices, format_for
from prescope.weights.formats.fp4 import E2M1, e8m0
from prescope.weights.layout import PackedMatrix, pack, packed_layout

FORMATS = [
    Int8(), Int8(64), Fp8(128, 128), Fp8(32, 128), Fp8(1, 32), Fp8(1, 192), Int4(32),
    Int4(64, torch.float16), Int4(64, torch.float32, True), Mxfp4(), Nvfp4(),
]  # fmt: skip
SHAPE = (160, 192)
#: Largest error as a share of the largest weight of a scale: half a step of each format.
STEPS = {"int8": 0.5 / 127, "fp8": 1 / 16, "int4": 0.5 / 7, "mxfp4": 1 / 4, "nvfp4": 1 / 5}


def weights(seed: int = 0) -> torch.Tensor:
    return torch.randn((3, *SHAPE), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_packing_gives_the_parts_that_are_promised(format):
    parts = format.pack(weights())
    promised = {part.suffix: part for part in format.parts(SHAPE)}
    assert parts.keys() == promised.keys()
    for suffix, part in parts.items():
        assert (tuple(part.shape), part.dtype) == ((3, *promised[suffix].shape), promised[suffix].dtype)
    one = {suffix: part[0] for suffix, part in parts.items()}
    assert format.nbytes(SHAPE) == sum(part.nbytes for part in one.values())
    assert torch.equal(format.unpack(one, SHAPE), format.unpack(parts, SHAPE)[0])


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_what_a_format_holds_is_packed_without_loss(format):
    held = format.unpack(format.pack(weights()), SHAPE)
    again = format.unpack(format.pack(held), SHAPE)
    if isinstance(format, Int4 | Nvfp4):  # a group whose largest was rounded down gets another scale
        assert (again == held).float().mean() > 0.5
    else:
        torch.testing.assert_close(again, held, rtol=1e-6, atol=0)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_errors_are_those_of_rounding(format):
    original = weights()
    error = (format.unpack(format.pack(original), SHAPE) - original).abs().max()
    assert 0 < error <= 1.1 * STEPS[format.name] * original.abs().max()


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("piece", [1, 3 * 192 * 50])
def test_pieces_of_a_matrix_are_packed_as_the_whole(format, piece, monkeypatch):
    """Blocks of scales are not cut, whatever fits into a piece."""
    whole = format.pack(weights())
    monkeypatch.setattr("prescope.weights.formats.base.PIECE", piece)
    pieces = format.pack(weights())
    for suffix, part in whole.items():
        assert torch.equal(pieces[suffix].view(torch.uint8), part.view(torch.uint8))


def test_weights_of_mxfp4_are_the_nearest_that_either_scale_has():
    """By looking at every pattern, in float64; halves and quarters of powers of two are often between two of them."""
    rng = torch.Generator().manual_seed(0)
    between = torch.randint(-28, 29, (2000, 32), generator=rng) / 4.0
    original = torch.cat([between, torch.randn((2000, 32), generator=rng)])
    original *= 2.0 ** torch.randint(-40, 40, (len(original), 1), generator=rng)
    scale = torch.exp2(torch.floor(torch.log2(original.abs().amax(-1, keepdim=True))) - 2).double()
    table = torch.tensor(E2M1, dtype=torch.float64)
    lost = torch.stack([
        (original.double().unsqueeze(-1) / wide / scale.unsqueeze(-1) - table).abs().amin(-1).square().sum(-1) * wide**2
        for wide in (1.0, 2.0)
    ])  # fmt: skip
    found = Mxfp4().unpack(Mxfp4().pack(original), (4000, 32)).double()
    torch.testing.assert_close(((found - original) / scale).square().sum(-1), lost.amin(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_zeros_stay_zeros(format):
    parts = format.pack(torch.zeros((1, *SHAPE)))
    assert not format.unpack(parts, SHAPE).any()


def test_nibbles_lie_with_the_first_in_the_low_half():
    parts = {
        "": torch.tensor([[0x21, 0x43]], dtype=torch.uint8),
        "_scale": torch.tensor([[127]], dtype=torch.uint8),
    }
    assert Mxfp4().unpack(parts, (1, 4)).tolist() == [[E2M1[1], E2M1[2], E2M1[3], E2M1[4]]]
    q = {
        "": parts[""],
        "_scale": torch.tensor([[2.0, 4.0]]),
        "_zero": torch.tensor([[1, 0]], dtype=torch.uint8),
    }
    assert Int4(2, torch.float32, True).unpack(q, (1, 4)).tolist() == [[0.0, 2.0, 12.0, 16.0]]
    symmetric = {"": parts[""], "_scale": torch.tensor([[1.0, 1.0]])}
    assert Int4(2, torch.float32).unpack(symmetric, (1, 4)).tolist() == [[-7.0, -6.0, -5.0, -4.0]]


def test_scales_of_mxfp4_are_all_powers_of_two():
    exponents = torch.arange(255, dtype=torch.uint8)
    assert np.array_equal(e8m0(exponents).numpy(), np.exp2(np.arange(255) - 127.0).astype(np.float32))


def test_fp8_blocks_end_where_a_matrix_ends():
    """Two matrices of 160 rows one behind the other: blocks of 128 rows would straddle them."""
    format = Fp8(128, 128)
    first, second = (format.pack(weights(seed)[0]) for seed in (0, 1))
    aligned = format.aligned(160)
    assert aligned == Fp8(32, 128)
    both = [format.align(parts, 160) for parts in (first, second)]
    joined = {suffix: torch.cat([one[suffix] for one in both]) for suffix in ("", "_scale")}
    wanted = torch.cat([format.unpack(parts, SHAPE) for parts in (first, second)])
    assert torch.equal(aligned.unpack(joined, (320, 192)), wanted)


@pytest.mark.parametrize("name", PACKED)
def test_rows_hold_what_was_packed(name):
    format = format_for(name, 192, 160)
    matrices = [PackedMatrix("up", format, SHAPE), PackedMatrix("down", format, (192, 160))]
    layout = packed_layout(matrices, torch.bfloat16, {"up_bias": (160,)})
    tensors = {"up": weights(), "down": weights().mT, "up_bias": torch.randn(3, 160)}
    rows = torch.zeros((3, layout.row_bytes), dtype=torch.uint8)
    assert layout.packing is not None
    fields = pack(layout.packing, tensors)
    for field, tensor in fields.items():
        layout.view(rows, field).copy_(tensor)
    held = layout.matrices(rows, "down")
    assert isinstance(held, PackedMatrices) and tuple(held.shape) == (3, 192, 160)
    wanted = format.unpack(format.pack(tensors["down"][1]), (192, 160)).bfloat16()
    assert torch.equal(held[1], wanted) and held[1].dtype == torch.bfloat16
    assert torch.equal(layout.view(rows, "up_bias"), tensors["up_bias"].bfloat16())
    assert layout.row_bytes < (2 * 160 * 192 + 160) * 2


def test_the_last_block_of_a_row_may_be_shorter():
    """tiny-moe's rows of 80: blocks of 32, 32 and 16."""
    format, original = Mxfp4(), weights()[..., :80]
    parts = format.pack(original)
    assert parts[""].shape == (3, 160, 40) and parts["_scale"].shape == (3, 160, 3)
    whole = Mxfp4().pack(functional.pad(original, (0, 16)))
    assert torch.equal(format.unpack(parts, (160, 80)), Mxfp4().unpack(whole, (160, 96))[..., :80])


def test_rows_that_no_group_divides_are_refused():
    for name, dim in (("int4", 100), ("mxfp4", 101)):
        with pytest.raises(UnsupportedOption, match=str(dim)):
            format_for(name, 64, dim)
    assert format_for("int4", 256, 80) == Int4(16)
    assert format_for("int4", 2048, 768) == Int4(128)
    assert format_for("int4", 2048, 96) == Int4(32)
