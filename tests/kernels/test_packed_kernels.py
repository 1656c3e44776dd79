"""Kernels that unpack in registers against the numbers of each format, in float64; in Triton's interpreter where there
is no GPU.
"""

import numpy as np
import pytest
import torch

from prescope.cache.residency import LayerNeed, distinct
from prescope.kernels import ExpertsSpec, Work, combine, layer_weights, make_kernel
from prescope.weights.formats import Fp8, Int4, Int8, Mxfp4, Nvfp4, PackedMatrices
from prescope.weights.layout import PackedMatrix, packed_layout
from tests.support.gates import silu_gate

triton_experts = pytest.importorskip("prescope.kernels.triton_experts", reason="Triton exists for Linux only")
packed_linear = pytest.importorskip("prescope.kernels.packed_linear")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [
    Int8(), Int8(48), Fp8(128, 128), Fp8(32, 128), Fp8(16, 48), Fp8(1, 32), Fp8(1, 192), Fp8(160, 192), Int4(16),
    Int4(32), Int4(64, torch.float16), Int4(96, torch.float32, True), Int4(32, torch.float16, True), Mxfp4(), Nvfp4(),
]  # fmt: skip
#: Of the largest: float32 sums of 192 terms. A wrong scale, order or nibble gives 1e-1.
TOLERANCE = 2e-5
E, TOP_K, D, F = 6, 2, 192, 80


def random_parts(format, num: int, shape: tuple[int, int], rng: torch.Generator) -> dict[str, torch.Tensor]:
    """Any bytes a file may hold, with scales that keep sums in range."""
    parts = {}
    for part in format.parts(shape):
        where = (num, *part.shape)
        if part.dtype == torch.float8_e4m3fn and part.suffix == "":
            codes = torch.randint(0, 256, where, generator=rng).to(torch.uint8)
            codes[codes & 0x7F == 0x7F] = 0x7E  # which are no numbers
            parts[part.suffix] = codes.view(torch.float8_e4m3fn)
        elif part.dtype in (torch.uint8, torch.int8):
            low, high = {"_zero": (0, 16), "_scale": (118, 130)}.get(part.suffix, (0, 256))
            parts[part.suffix] = (
                torch.randint(low, high, where, generator=rng).to(torch.uint8).view(part.dtype)
            )
        else:
            parts[part.suffix] = ((torch.rand(where, generator=rng) + 0.1) / 50).to(part.dtype)
    return parts


def matrices(format, num: int, shape: tuple[int, int], rng, dtype=torch.float32) -> PackedMatrices:
    parts = {suffix: part.to(DEVICE) for suffix, part in random_parts(format, num, shape, rng).items()}
    return PackedMatrices(format, parts, shape, dtype)


def exact(w: PackedMatrices) -> torch.Tensor:
    """(S, N, K) in float64."""
    return w.format.unpack(w.parts, w.shape[1:]).double()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("block_in", [64, 256])
def test_a_linear_of_pairs_and_of_tiles_is_that_of_the_numbers(format, block_in):
    """A row ends within a block, or has several; an expert without a slot and ids of no expert are left alone."""
    rng = torch.Generator().manual_seed(0)
    w = matrices(format, 3, (48, 192), rng)
    x, bias = torch.randn(3, 192, generator=rng).to(DEVICE), torch.randn(3, 48, generator=rng).to(DEVICE)
    ids = torch.tensor([[0, 3], [7, 0], [-1, 2]], dtype=torch.int32, device=DEVICE)
    slot_of = torch.tensor([2, 0, -1, 1], dtype=torch.int32, device=DEVICE)
    expected = torch.full((6, 48), 7.0, dtype=torch.float64, device=DEVICE)
    for pair, slot in ((0, 2), (1, 1), (3, 2)):
        expected[pair] = exact(w)[slot] @ x[pair // 2].double() + bias[slot].double()
    out = torch.full((6, 48), 7.0, device=DEVICE)
    linear = packed_linear.PackedLinear(x, 2, w, bias, out)
    linear.pairs(ids, slot_of, 4, packed_linear.PackedConfig(32, block_in, 4, 1))
    assert distance(out, expected) < TOLERANCE
    order = torch.tensor([0, 3, 1], dtype=torch.int32, device=DEVICE)
    blocks = torch.tensor([[2, 0, 2], [1, 2, 3], [0, 0, 0]], dtype=torch.int32, device=DEVICE)
    out.fill_(7.0)
    linear.tiles(order, blocks, 3, 16, packed_linear.PackedConfig(32, block_in, 4, 3))
    assert distance(out, expected) < TOLERANCE


@pytest.mark.parametrize("format", [Int8(), Fp8(16, 48), Int4(32), Mxfp4(), Nvfp4()], ids=str)
def test_every_pattern_is_read_as_the_format_reads_it(format):
    """All values of a byte, each times 1: what comes out is the weight itself; scales of scales may round once."""
    w = matrices(format, 1, (48, 192), torch.Generator().manual_seed(1))
    codes = torch.arange(w.parts[""].numel(), device=DEVICE).to(torch.uint8)
    if w.parts[""].dtype == torch.float8_e4m3fn:
        codes[codes & 0x7F == 0x7F] = 0x7E  # the two that are no numbers
    w.parts[""].copy_(codes.view(w.parts[""].dtype).view_as(w.parts[""]))
    x = torch.eye(192, device=DEVICE)[:40].contiguous()
    out, ids = torch.empty(40, 48, device=DEVICE), torch.zeros(40, 1, dtype=torch.int32, device=DEVICE)
    linear = packed_linear.PackedLinear(x, 1, w, None, out)
    linear.pairs(ids, ids[0], 1, packed_linear.PackedConfig(64, 256, 4, 1))
    torch.testing.assert_close(out.double(), exact(w)[0].T[:40], rtol=1e-6, atol=0)
    order = torch.arange(40, dtype=torch.int32, device=DEVICE)
    blocks = torch.tensor([[0, 0, 40]], dtype=torch.int32, device=DEVICE)
    linear.tiles(order, blocks, 1, 64, packed_linear.PackedConfig(64, 256, 4, 1))
    torch.testing.assert_close(out.double(), exact(w)[0].T[:40], rtol=1e-6, atol=0)


ALL = [Int8(), Fp8(16, 16), Int4(16), Int4(16, has_zeros=True), Mxfp4(), Nvfp4()]


@pytest.mark.parametrize(
    ("format", "tokens", "rounds"),
    [
        # Rounds are the same in every format.
        pytest.param(format, *sizes, marks=pytest.mark.slow if sizes == (3, 2) and i != 3 else [])
        for sizes in ((1, 1), (3, 2), (20, 2))
        for i, format in enumerate(ALL)
    ],
    ids=str,
)
def test_a_layer_from_slots_is_that_of_the_numbers(format, tokens, rounds):
    """One token, a few, and as many as are computed in tiles; from fewer slots than experts, round by round."""
    rng = torch.Generator().manual_seed(tokens)
    shapes = {"up": (2 * F, D), "down": (D, F)}
    layout = packed_layout(
        [PackedMatrix(name, format, shape) for name, shape in shapes.items()], torch.float32, {"b": (2 * F,)}
    )
    rows = torch.zeros((E, layout.row_bytes), dtype=torch.uint8)
    for name, shape in shapes.items():
        for suffix, part in random_parts(format, E, shape, rng).items():
            layout.view(rows, name + suffix).copy_(part)
    layout.view(rows, "b").copy_(torch.randn(E, 2 * F, generator=rng))
    spec = ExpertsSpec(
        up="up", down="down", up_bias="b", down_bias=None, is_transposed=False, gate=silu_gate, post_norm=None
    )
    x, router = torch.randn(tokens, D, generator=rng), torch.rand(tokens, TOP_K, generator=rng)
    ids = torch.stack([torch.randperm(E, generator=rng)[:TOP_K] for _ in range(tokens)])
    kernel, pool = triton_experts.TritonKernel(), torch.zeros_like(rows).to(DEVICE)
    needed, counts = distinct(ids.numpy(), E)
    work = Work(
        x_TD=x.to(DEVICE), ids_TK=ids.to(DEVICE), host_ids_TK=ids.numpy(),
        need=LayerNeed(0, needed, counts, 0, 0), num_experts=E,
        out_PD=torch.zeros(ids.numel(), D, device=DEVICE), num_rounds=rounds, slot_row=np.full(E, -1), version=0,
    )  # fmt: skip
    kernel.prepare(work)
    weights = layer_weights(layout, spec, pool)
    for chunk in np.array_split(needed, rounds):
        slots = np.arange(len(chunk))[::-1] + 1
        pool[slots.copy()] = rows[chunk].to(DEVICE)
        work.slot_row[chunk] = slots
        kernel.run(work, spec, weights, chunk, slots)
    expected = combine(reference(layout, spec, rows, x, ids), router.double(), torch.float64)
    assert distance(combine(work.out_PD.cpu(), router, torch.float32), expected) < TOLERANCE


def reference(layout, spec, rows, x, ids) -> torch.Tensor:
    """(P, D) in float64."""
    weights = layer_weights(layout, spec, rows)
    up, down, bias = exact(weights.up), exact(weights.down), weights.up_bias.double()
    return torch.stack(
        [
            down[e] @ silu_gate(up[e] @ x[pair // TOP_K].double() + bias[e])
            for pair, e in enumerate(ids.ravel().tolist())
        ]
    )


def test_rows_that_are_no_whole_number_of_words_go_to_torch_and_it_is_said():
    layout = packed_layout([PackedMatrix("up", Mxfp4(), (8, 36))], torch.float32, {})
    kernel, reason = make_kernel("auto", "cuda", torch.float32, [layout])
    assert kernel.name == "torch" and "words of 8" in reason


@pytest.mark.parametrize(
    ("columns", "width"), [(2048, 1024), (2880, 1024), (1408, 512), (768, 256), (80, 128), (64, 64)]
)
def test_a_tile_is_wide_where_little_of_it_is_beyond_the_row(columns, width):
    assert packed_linear.default_pairs(columns).block_in == width
