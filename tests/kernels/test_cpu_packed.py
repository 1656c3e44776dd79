"""Packed experts in the compiled kernel against their unpacked weights in float64, with vectors of each width."""

from functools import cache

import numpy as np
import pytest
import torch
from torch.nn import functional

from prescope.kernels import ExpertsSpec
from prescope.kernels.cpu import CpuExperts, CpuLayer, ExpertBatch
from prescope.kernels.cpu import lane as lane_module
from prescope.kernels.cpu.build import CannotBuild, find_compiler, load
from prescope.kernels.cpu.native import NativeLane
from prescope.weights.formats import Format, Fp8, Int4, Int8, Mxfp4, Nvfp4
from prescope.weights.layout import PackedMatrix, pack, packed_layout
from tests.support.distances import norm_distance
from tests.support.gates import alternating, silu_gate

EXPERTS = 3
#: Relative error allowed in float16: sums in another order that are rounded to the other side. Activations of 8 bits
#: would give 5e-3.
ALLOWED = 5e-4


@cache
def can_build() -> bool:
    try:
        find_compiler()
        load()
    except CannotBuild:
        return False
    return True


pytestmark = pytest.mark.skipif(not can_build(), reason="no C compiler, or not Linux")

FORMATS = [
    Int8(), Int8(128), Fp8(128, 128), Fp8(64, 128), Fp8(1, 1024), Fp8(128, 1024), Mxfp4(), Nvfp4(),
    Int4(16), Int4(32), Int4(64), Int4(128), Int4(32, torch.float32, True), Int4(128, torch.float16, True),
]  # fmt: skip
#: D, F: whole blocks of vectors; rows that end within one, of the widest and of the others; widths of one group.
SHAPES = [(256, 384), (640, 64), (96, 160), (32, 48)]


def relu2(h):
    return functional.relu(h).square()


def make_layer(format: Format, d, f, dtype=torch.float16, gate=silu_gate, bias=False) -> CpuLayer:
    """A layer with rows of noise where no field is, so that a read past a field shows."""
    rng = torch.Generator().manual_seed(d)
    up_dim = f if gate is relu2 else 2 * f
    biases = {"up_bias": (up_dim,), "down_bias": (d,)} if bias else {}
    matrices = [PackedMatrix("up", format, (up_dim, d)), PackedMatrix("down", format, (d, f))]
    layout = packed_layout(matrices, dtype, biases)
    tensors = {
        "up": torch.randn(EXPERTS, up_dim, d, generator=rng) * d**-0.5,
        "down": torch.randn(EXPERTS, d, f, generator=rng) * f**-0.5,
        **{name: torch.randn(EXPERTS, *shape, generator=rng) for name, shape in biases.items()},
    }
    rows = torch.full((EXPERTS, layout.row_bytes), 0x7F, dtype=torch.uint8)
    assert layout.packing is not None
    for name, field in pack(layout.packing, tensors).items():
        layout.view(rows, name).copy_(field)
    up_bias, down_bias = ("up_bias", "down_bias") if bias else (None, None)
    spec = ExpertsSpec(
        up="up", down="down", up_bias=up_bias, down_bias=down_bias, is_transposed=False, gate=gate, post_norm=None
    )  # fmt: skip
    return CpuLayer(rows, layout, spec)


def all_to_all(tokens) -> ExpertBatch:
    """Every token to every expert; pair e * T + t."""
    pairs = np.arange(EXPERTS * tokens)
    return ExpertBatch(np.arange(EXPERTS), np.arange(EXPERTS + 1) * tokens, pairs % tokens, pairs)


def make_x(layer: CpuLayer, tokens):
    return torch.randn(tokens, layer.in_dim, generator=torch.Generator().manual_seed(tokens)).to(layer.dtype)


def run(layer: CpuLayer, x, threads=2, lanes=16):
    out = torch.full((EXPERTS * len(x), layer.out_dim), 7.0, dtype=layer.dtype)
    lane = NativeLane([layer], threads, spin_us=0, defines=() if lanes == 16 else (f"MOST_LANES={lanes}",))
    try:
        lane.submit(0, all_to_all(len(x)), x, out, None).wait(60)
    finally:
        lane.close()
    return out


def expected(layer: CpuLayer, x):
    """In float64, rounded to the dtype after each linear, each bias and the gate."""

    def linear(a, name, bias, expert):
        matrix = layer.layout.packing.matrix(name)
        parts = {
            suffix: layer.layout.view(layer.rows, field)[expert]
            for suffix, field in matrix.field_names.items()
        }
        y = (a.double() @ matrix.format.unpack(parts, matrix.shape).double().T).to(layer.dtype)
        return y if bias is None else y + layer.layout.view(layer.rows, bias)[expert]

    spec = layer.spec
    acts = [spec.gate(linear(x, "up", spec.up_bias, expert)) for expert in range(EXPERTS)]
    return torch.cat([linear(act, "down", spec.down_bias, expert) for expert, act in enumerate(acts)])


@pytest.mark.parametrize("lanes", [16, 8, 4])
@pytest.mark.parametrize("format", FORMATS, ids=repr)
def test_packed_experts_equal_their_unpacked_weights(format, lanes):
    """Weights and inputs are not rounded on the way: only the order of sums is another."""
    for d, f in SHAPES:
        group = format.group or 1 if isinstance(format, Int4 | Int8) else 1
        if d % group or f % group:
            continue
        layer = make_layer(format, d, f)
        for tokens in (1, 2, 3, 9):
            x = make_x(layer, tokens)
            assert norm_distance(run(layer, x, lanes=lanes), expected(layer, x)) < ALLOWED, (d, f, tokens)


@pytest.mark.parametrize("format", [Int8(), Fp8(1, 1024)], ids=repr)
@pytest.mark.parametrize("lanes", [16, 8, 4])
def test_weights_of_a_byte_may_have_odd_shapes(format, lanes):
    layer = make_layer(format, 53, 37)
    x = make_x(layer, 5)
    assert norm_distance(run(layer, x, lanes=lanes), expected(layer, x)) < ALLOWED


@pytest.mark.parametrize("lanes", [16, 8, 4])
@pytest.mark.parametrize("scale", [torch.float32, torch.float16])
@pytest.mark.parametrize("has_zeros", [True, False])
def test_rows_of_one_group_may_have_zeros_and_scales_of_any_width(scale, has_zeros, lanes):
    """Channels of AWQ, GPTQ and compressed-tensors (group_size -1): a row's one scale stands beside its one zero."""
    layer = make_layer(Int4(96, scale, has_zeros), 96, 96)
    x = make_x(layer, 3)
    assert norm_distance(run(layer, x, lanes=lanes), expected(layer, x)) < ALLOWED


@pytest.mark.parametrize("format", [Int8(), Fp8(32, 128), Mxfp4(), Int4(32)], ids=repr)
@pytest.mark.parametrize("gate", [alternating, relu2], ids=lambda gate: gate.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_gates_and_biases_are_those_of_plain_experts(format, gate, dtype):
    layer = make_layer(format, 64, 96, dtype, gate, bias=True)
    x = make_x(layer, 5)
    assert norm_distance(run(layer, x), expected(layer, x)) < (ALLOWED if dtype == torch.float16 else 4e-3)


@pytest.mark.parametrize("format", FORMATS, ids=repr)
def test_results_depend_on_neither_threads_nor_company(format):
    """To the bit: greedy tokens stay what they were in a batch."""
    layer = make_layer(format, 256, 384, torch.bfloat16)
    x = make_x(layer, 9)
    together = run(layer, x, threads=1)
    assert torch.equal(run(layer, x, threads=3), together)
    for token in (0, 4, 8):
        assert torch.equal(run(layer, x[token : token + 1]), together[token::9])


@pytest.mark.parametrize("lanes", [16, 8, 4])
def test_what_is_no_number_in_fp8_spoils_its_row_alone(lanes):
    layer = make_layer(Fp8(128, 128), 128, 128)
    layer.layout.view(layer.rows, "down").view(torch.uint8)[1, 5, 77] = 0xFF
    got = run(layer, make_x(layer, 2), lanes=lanes).view(EXPERTS, 2, -1)
    assert got[1, :, 5].isnan().all()
    assert got.isnan().sum() == 2


def test_groups_that_the_kernel_cannot_take_go_to_torch_aloud(monkeypatch):
    monkeypatch.setattr(lane_module, "_given", set())
    layer = make_layer(Fp8(16, 48), 96, 96, torch.bfloat16)
    with pytest.warns(UserWarning, match="groups of 48"), CpuExperts([layer], threads=1) as lane:
        assert lane.implementation == "torch"
        x, out = make_x(layer, 2), torch.zeros(2 * EXPERTS, 96).bfloat16()
        lane.submit(0, all_to_all(2), x, out).wait(60)
    assert norm_distance(out, expected(layer, x)) < 8e-3
