"""Expert linears in Triton that read weights straight from the slots.

Two kernels: `_pair_linear`, a matrix-vector product per (token, expert) pair, for few tokens; `_grouped_linear`, a
tiled product over the pairs of one expert, for many. Both round where transformers' `batched_mm`/`grouped_mm` do: fp32
accumulation, one rounding to the weights' dtype after each linear. The gate between them is the family's own code.

A pair's result depends on neither the slots nor the rounds: the tile shapes are a function of the problem's sizes.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from ..cache.residency import IntArray
from ..weights.formats import PackedMatrices
from .base import ExpertsSpec, LayerWeights, Work
from .gate_kernel import Gates
from .launch import launch
from .packed_linear import PackedLinear
from .tile_plan import pairs_per_expert, rows_of_tile, tiles_of
from .tuning import tune, tuned

#: Up to this many pairs per distinct expert on average, reading an expert once per pair (mostly from the L2) is
#: cheaper than the tiles of 16 rows, of which most would be empty.
PAIRS_PER_EXPERT_FOR_TILES = 2.0


@triton.jit
def _pair_linear(  # type: ignore[no-untyped-def]
    x, w, bias, out, slot_of, ids,
    num_experts, out_dim, IN_DIM: tl.constexpr,
    x_div, x_stride, w_slot_stride, w_out_stride, w_in_stride, b_slot_stride, out_stride,
    HAS_BIAS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    expert = tl.load(ids + pair)
    if (expert < 0) | (expert >= num_experts):
        return
    slot = tl.load(slot_of + expert).to(tl.int64)
    if slot < 0:
        return
    rows = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row_mask = rows < out_dim
    columns = tl.arange(0, BLOCK_IN)
    weight = w + slot * w_slot_stride + rows[:, None].to(tl.int64) * w_out_stride
    vector = x + (pair // x_div).to(tl.int64) * x_stride
    # Summed up across threads once, behind the loop: 42 instead of 46 us for 64 pairs of 2048 x 768 (H200).
    sums = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    for first in range(0, IN_DIM, BLOCK_IN):
        c = first + columns
        mask = c < IN_DIM
        values = tl.load(vector + c, mask=mask, other=0.0).to(tl.float32)
        tile = tl.load(weight + c[None, :] * w_in_stride, mask=row_mask[:, None] & mask[None, :], other=0.0)
        sums += tile.to(tl.float32) * values[None, :]
    result = tl.sum(sums, axis=1).to(out.dtype.element_ty)
    if HAS_BIAS:
        result += tl.load(bias + slot * b_slot_stride + rows, mask=row_mask, other=0.0)
    tl.store(out + pair.to(tl.int64) * out_stride + rows, result, mask=row_mask)


@triton.jit
def _grouped_linear(  # type: ignore[no-untyped-def]
    x, w, bias, out, order, blocks,
    out_dim, IN_DIM: tl.constexpr,
    x_div, x_stride, w_slot_stride, w_out_stride, w_in_stride, b_slot_stride, out_stride,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    slot = tl.load(blocks + block * 3).to(tl.int64)
    start = tl.load(blocks + block * 3 + 1)
    end = tl.load(blocks + block * 3 + 2)
    if start >= end:  # a captured step launches as many tiles as it could ever need
        return
    places = start + tl.arange(0, BLOCK_M)
    place_mask = places < end
    pairs = tl.load(order + places, mask=place_mask, other=0)
    rows = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row_mask = rows < out_dim
    columns = tl.arange(0, BLOCK_IN)
    inputs = x + (pairs // x_div).to(tl.int64)[:, None] * x_stride
    weight = w + slot * w_slot_stride + rows[None, :].to(tl.int64) * w_out_stride
    acc = tl.zeros((BLOCK_M, BLOCK_OUT), dtype=tl.float32)
    for first in range(0, IN_DIM, BLOCK_IN):
        c = first + columns
        mask = c < IN_DIM
        a = tl.load(inputs + c[None, :], mask=place_mask[:, None] & mask[None, :], other=0.0)
        b = tl.load(weight + c[:, None] * w_in_stride, mask=mask[:, None] & row_mask[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    result = acc.to(out.dtype.element_ty)
    if HAS_BIAS:
        result += tl.load(bias + slot * b_slot_stride + rows, mask=row_mask, other=0.0)[None, :]
    target = out + pairs.to(tl.int64)[:, None] * out_stride + rows[None, :]
    tl.store(target, result, mask=place_mask[:, None] & row_mask[None, :])


class TritonKernel:
    """Fused slot lookup and linear; one launch per linear and round."""

    name = "triton"
    serves_unread = True

    def __init__(self) -> None:
        self._tiles = False
        self._block_m = 16
        self._order = torch.empty(0, dtype=torch.int64, device="cpu")
        self._counts = np.zeros(0, dtype=np.int64)
        self._first = np.zeros(0, dtype=np.int64)
        self._gates = Gates()
        self._rows: dict[int, tuple[int, torch.Tensor]] = {}  # by MoE layer: version and row on the device

    def prepare(self, work: Work) -> None:
        num_pairs = work.host_ids_TK.size
        self._tiles = is_tiled(num_pairs, work.num_experts)
        if self._tiles:
            counts = np.zeros(work.num_experts, dtype=np.int64)
            counts[work.need.experts] = work.need.tokens
            self._block_m = rows_of_tile(num_pairs, work.num_experts)
            self._counts = counts
            # Ids below 0 would sort first: the host's offsets count from the first expert's first pair.
            ids = work.ids_TK.reshape(-1)
            self._order = torch.where(ids < 0, work.num_experts, ids).argsort(stable=True)
            self._first = np.cumsum(counts) - counts

    def run(
        self,
        work: Work,
        spec: ExpertsSpec,
        weights: LayerWeights,
        experts: IntArray,
        slots: IntArray,
    ) -> None:
        if self._tiles:
            where = _upload(self._blocks(experts, slots), work.x_TD.device)
        elif work.num_rounds == 1:
            where = self.slots_on_device(work.need.moe_layer, work.slot_row, work.version, work.x_TD.device)
        else:  # experts of later rounds have slots already, but not yet their bytes
            where = _upload(_slot_table(work.num_experts, experts, slots), work.x_TD.device)
        top_k = work.ids_TK.shape[1]
        _, up_dim, _ = weights.widths(spec.is_transposed)
        h = work.x_TD.new_empty((work.out_PD.shape[0], up_dim))
        self._linear(work, where, work.x_TD, top_k, weights.up, weights.up_bias, h, spec.is_transposed)
        act = self._gate(spec, h, weights, self._tiles)
        y = work.out_PD if spec.post_norm is None else torch.empty_like(work.out_PD)
        self._linear(work, where, act, 1, weights.down, weights.down_bias, y, spec.is_transposed)
        if spec.post_norm is not None:
            self._keep_round(work, experts, spec.post_norm(y))

    def run_unread(
        self,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        spec: ExpertsSpec,
        weights: LayerWeights,
        slots_E: torch.Tensor,
    ) -> torch.Tensor:
        ids_P, num_experts = ids_TK.reshape(-1), len(slots_E)
        tiled = is_tiled(len(ids_P), num_experts)
        tiles = tiles_of(ids_P, slots_E, num_experts) if tiled else None

        def linear(x: torch.Tensor, x_div: int, is_up: bool, out: torch.Tensor) -> torch.Tensor:
            w, bias = (weights.up, weights.up_bias) if is_up else (weights.down, weights.down_bias)
            one = linear_of(x, x_div, w, bias, out, spec.is_transposed)
            if tiles is not None:
                one.tiles(*tiles)
            else:
                one.pairs(ids_P, slots_E, num_experts)
            return out

        _, up_dim, width = weights.widths(spec.is_transposed)
        h = linear(x_TD, ids_TK.shape[1], True, x_TD.new_empty((len(ids_P), up_dim)))
        act = self._gate(spec, h, weights, tiled)
        y_PD = linear(act, 1, False, x_TD.new_zeros((len(ids_P), width)))
        return y_PD if spec.post_norm is None else spec.post_norm(y_PD)

    def _gate(self, spec: ExpertsSpec, h: torch.Tensor, weights: LayerWeights, tiled: bool) -> torch.Tensor:
        if tiled:
            return spec.gate(h).contiguous()
        return self._gates.apply(spec, h, weights.inner_width(spec.is_transposed))

    def slots_on_device(
        self, moe_layer: int, slot_row: IntArray, version: int, device: torch.device
    ) -> torch.Tensor:
        """The layer's row of the residency table on the device, uploaded only when it has changed."""
        known, row = self._rows.get(moe_layer, (-1, torch.empty(0, dtype=torch.float32, device="cpu")))
        if known != version or version < 0:
            row = _upload(slot_row, device)
            self._rows[moe_layer] = version, row
        return row

    def _keep_round(self, work: Work, experts: IntArray, y_PD: torch.Tensor) -> None:
        """Take over the normed rows of this round's pairs only: the others hold nothing yet, or a former round's."""
        member = torch.zeros(work.num_experts + 1, dtype=torch.bool, device="cpu")
        member[torch.from_numpy(experts)] = True
        ids = work.ids_TK.reshape(-1)
        known = torch.where((ids < 0) | (ids >= work.num_experts), work.num_experts, ids)
        mine = member.to(ids.device)[known]
        work.out_PD.copy_(torch.where(mine[:, None], y_PD, work.out_PD))

    def _blocks(self, experts: IntArray, slots: IntArray) -> IntArray:
        """Rows (slot, first place, end place) of each tile of this round, largest experts first."""
        rows: list[tuple[int, int, int]] = []
        for expert, slot in zip(experts.tolist(), slots.tolist(), strict=True):
            first, end = int(self._first[expert]), int(self._first[expert] + self._counts[expert])
            rows.extend((slot, place, end) for place in range(first, end, self._block_m))
        return np.asarray(rows, dtype=np.int64)

    def _linear(
        self,
        work: Work,
        where: torch.Tensor,
        x: torch.Tensor,
        x_div: int,
        w: torch.Tensor | PackedMatrices,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        is_transposed: bool,
    ) -> None:
        linear = linear_of(x, x_div, w, bias, out, is_transposed)
        if self._tiles:
            linear.tiles(self._order, where, where.numel() // 3, self._block_m)
        else:
            linear.pairs(work.ids_TK, where, work.num_experts)


def is_tiled(num_pairs: int, num_experts: int) -> bool:
    """Whether a layer's pairs are computed in tiles."""
    return pairs_per_expert(num_pairs, num_experts) > PAIRS_PER_EXPERT_FOR_TILES


class PairConfig(NamedTuple):
    """Tile of weights of one program of `_pair_linear`."""

    block_out: int
    block_in: int
    num_warps: int


#: A tile of 16 x 256 weights per program: 8 KiB in flight each, enough programs to fill an H200.
DEFAULT_PAIRS = PairConfig(16, 256, 4)
DEFAULT_PAIRS_TRANSPOSED = PairConfig(64, 32, 4)
PAIR_CANDIDATES = [
    *(PairConfig(*c) for c in [(16, 256, 4), (8, 512, 4), (4, 1024, 4), (8, 256, 4), (4, 512, 4), (16, 512, 8)]),
    *(PairConfig(*c) for c in [(32, 256, 8), (2, 1024, 4), (8, 1024, 8), (4, 2048, 8)]),
]  # fmt: skip
TRANSPOSED_CANDIDATES = [
    PairConfig(*c) for c in [(64, 32, 4), (128, 16, 4), (64, 64, 4), (128, 32, 8), (32, 64, 4), (256, 16, 8)]
]


#: Weights that a linear must read to be worth tuning: 4 MiB take 1 us on an H200, less than a launch.
LEAST_TUNED_BYTES = 4 << 20


class Linear(NamedTuple):
    """One linear over all pairs, out (P, O) = w[slot] @ x[pair // x_div] + bias[slot], ready to be launched."""

    x: torch.Tensor  # (T, I) with x_div = K, or (P, I) with x_div = 1
    x_div: int
    w: torch.Tensor  # (S, O, I), or (S, I, O) when transposed
    bias: torch.Tensor | None  # (S, O)
    out: torch.Tensor  # (P, O)
    is_transposed: bool

    def pairs(
        self, ids: torch.Tensor, slot_of: torch.Tensor, num_experts: int, config: PairConfig | None = None
    ) -> None:
        """A matrix-vector product per pair; `slot_of` (E,) int32 on the device."""
        out_dim, in_dim = self._dims()
        config = config or pair_config(self)
        grid = (self.out.shape[0], triton.cdiv(out_dim, config.block_out))
        launch(
            _pair_linear, grid,
            self.x, self.w, self._some_bias(), self.out, slot_of, ids, num_experts, out_dim, in_dim, *self._strides(),
            HAS_BIAS=self.bias is not None, BLOCK_OUT=config.block_out, BLOCK_IN=config.block_in,
            num_warps=config.num_warps,
        )  # fmt: skip

    def tiles(self, order: torch.Tensor, blocks: torch.Tensor, num_blocks: int, block_m: int) -> None:
        """Tiles of `block_m` pairs of one expert; `order` (P,), `blocks` (num_blocks, 3): slot, first, end place."""
        out_dim, in_dim = self._dims()
        wide = block_m >= 64
        block_out = 128 if wide else 64
        launch(
            _grouped_linear, (triton.cdiv(out_dim, block_out), num_blocks),
            self.x, self.w, self._some_bias(), self.out, order, blocks, out_dim, in_dim, *self._strides(),
            HAS_BIAS=self.bias is not None, PRECISION="ieee", BLOCK_M=block_m, BLOCK_OUT=block_out,
            BLOCK_IN=32 if self.w.dtype == torch.float32 else 64, num_warps=8 if wide else 4, num_stages=3,
        )  # fmt: skip

    def _dims(self) -> tuple[int, int]:
        out_axis, in_axis = (2, 1) if self.is_transposed else (1, 2)
        return self.w.shape[out_axis], self.w.shape[in_axis]

    def _strides(self) -> tuple[int, ...]:
        out_axis, in_axis = (2, 1) if self.is_transposed else (1, 2)
        return (
            self.x_div, self.x.stride(0), self.w.stride(0), self.w.stride(out_axis), self.w.stride(in_axis),
            self.bias.stride(0) if self.bias is not None else 0, self.out.stride(0),
        )  # fmt: skip

    def _some_bias(self) -> torch.Tensor:
        return self.bias if self.bias is not None else self.w

    @property
    def candidates(self) -> list[PairConfig]:
        """Configurations of `pairs` that may be the fastest."""
        return TRANSPOSED_CANDIDATES if self.is_transposed else PAIR_CANDIDATES

    @property
    def matrix_bytes(self) -> int:
        """Of one expert."""
        return self.w[0].nbytes

    @property
    def key(self) -> str:
        """What a tuned configuration depends on."""
        out_dim, in_dim = self._dims()
        form = "T" if self.is_transposed else "N"
        return (
            f"{str(self.w.dtype).removeprefix('torch.')} {out_dim}x{in_dim}{form} {self.out.shape[0]} pairs"
        )


def linear_of(
    x: torch.Tensor,
    x_div: int,
    w: torch.Tensor | PackedMatrices,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    is_transposed: bool,
) -> Linear | PackedLinear:
    """A linear over weights as they lie in the slots, plain or packed."""
    if isinstance(w, PackedMatrices):
        return PackedLinear(x, x_div, w, bias, out)
    return Linear(x, x_div, w, bias, out, is_transposed)


def pair_config(linear: Linear) -> PairConfig:
    """The configuration tuned for this GPU, or the default where none was tuned."""
    found = tuned(linear.w.device, linear.key, linear.candidates)
    if found is not None:
        return found
    return DEFAULT_PAIRS_TRANSPOSED if linear.is_transposed else DEFAULT_PAIRS


def tune_pairs(
    linear: Linear | PackedLinear, ids: torch.Tensor, slot_of: torch.Tensor, num_experts: int
) -> None:
    """Time all candidates once per GPU and shape and keep the fastest; does nothing the second time.

    Linears that take a few microseconds at most are left alone: there is nothing to win.
    """
    if linear.matrix_bytes * len(ids) < LEAST_TUNED_BYTES:
        return
    run: Callable[..., None] = partial(linear.pairs, ids, slot_of, num_experts)
    tune(linear.x.device, linear.key, linear.candidates, run)


def _slot_table(num_experts: int, experts: IntArray, slots: IntArray) -> IntArray:
    table = np.full(num_experts, -1, dtype=np.int64)
    table[experts] = slots
    return table


def _upload(table: IntArray, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":  # Triton's interpreter, in tests
        return torch.from_numpy(table.astype(np.int32).ravel())
    # Staging from torch's caching host allocator, which keeps the block until the copy has run.
    staging = torch.empty(table.size, dtype=torch.int32, pin_memory=True, device="cpu")
    staging.numpy()[:] = table.ravel()
    return staging.to(device, non_blocking=True)
