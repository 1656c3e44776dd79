"""Launches of the packed kernels: where a format's fields lie in the slots, and the shape of a tile.

Shapes: S slots, N outputs and K inputs of a matrix, P pairs.
"""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton

from ..weights.formats import PackedMatrices
from . import packed_kernels
from .launch import launch
from .packed_forms import FLOAT_SCALE, form_of
from .tuning import tuned


class PackedConfig(NamedTuple):
    """Tile of weights of one program."""

    block_out: int
    block_in: int
    num_warps: int
    num_stages: int  # 1: the next tile is loaded when this one has been used


PAIR_CANDIDATES = [
    PackedConfig(*c) for c in [
        (16, 512, 4, 1), (16, 1024, 4, 1), (8, 1024, 4, 1), (32, 512, 4, 1), (32, 256, 4, 1), (16, 256, 2, 1),
        (8, 512, 2, 1), (8, 256, 1, 1), (32, 256, 4, 3), (16, 512, 4, 3),
    ]
]  # fmt: skip


def default_pairs(in_dim: int) -> PackedConfig:
    """The widest tile of which at most an eighth is beyond the rows' ends, else the one that wastes least."""

    def waste(width: int) -> float:
        return 1.0 - in_dim / (-(-in_dim // width) * width)

    widths = [width for width in (1024, 512, 256, 128) if width < 2 * in_dim] or [64]
    few = [width for width in widths if waste(width) <= MOST_WASTE]
    return PackedConfig(16, few[0] if few else min(widths, key=waste), 4, 1)


def default_tiles(block_m: int, dtype: torch.dtype) -> PackedConfig:
    """As for plain weights: wide tiles for many pairs."""
    if block_m < 64:
        return PackedConfig(64, 128, 4, 3)
    # Three stages of float32 take 112 KiB of shared memory, GeForce cards have 99 for a program.
    return PackedConfig(128, 64, 8, 2 if dtype == torch.float32 else 3)


#: Rows of 2880 (gpt-oss): tiles of 1024 take 30 us where those of 128, which waste less, take 68 (H200).
MOST_WASTE = 1 / 8


class _Slots(NamedTuple):
    """A matrix in all slots, as the kernels take it."""

    fields: tuple[
        torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
    ]  # words, scales, zeros, scales of rows
    strides: tuple[int, int, int, int]  # of each, from slot to slot, in its own elements
    worth: float
    constants: dict[str, Any]


#: Kept as long as the matrices: views cost the host more than a launch does.
_known: WeakKeyDictionary[PackedMatrices, _Slots] = WeakKeyDictionary()


def _slots_of(w: PackedMatrices) -> _Slots:
    found = _known.get(w)
    if found is None:
        found = _known[w] = _make_slots(w)
    return found


def _make_slots(w: PackedMatrices) -> _Slots:
    form = form_of(w.format, w.shape[2])
    assert form is not None, "make_kernel gives formats without a kernel to torch"
    words = w.parts[""].view(torch.int32)
    scale = w.parts["_scale"] if form.group else words
    if form.group and form.scale_kind != FLOAT_SCALE:
        scale = scale.view(torch.uint8)
    zero = w.parts["_zero"] if form.has_zeros else words
    row_scale = w.parts[form.row_scale] if form.row_group else words
    fields = words, scale, zero, row_scale
    constants = {
        "KIND": form.kind, "SCALE": form.scale_kind, "GROUP": form.group, "GROUP_ROWS": form.group_rows,
        "ROW_GROUP": form.row_group, "PIECE": form.piece, "LANES": form.lanes, "HAS_ZERO": form.has_zeros,
    }  # fmt: skip
    strides = words.stride(0), scale.stride(0), zero.stride(0), row_scale.stride(0)
    return _Slots(fields, strides, form.worth, constants)


class PackedLinear(NamedTuple):
    """One linear over all pairs, out (P, N) = w[slot] @ x[pair // x_div] + bias[slot], with packed weights."""

    x: torch.Tensor  # (T, K) with x_div = top-k, or (P, K) with x_div = 1
    x_div: int
    w: PackedMatrices  # of (S, N, K)
    bias: torch.Tensor | None  # (S, N)
    out: torch.Tensor  # (P, N)

    def pairs(
        self,
        ids: torch.Tensor,
        slot_of: torch.Tensor,
        num_experts: int,
        config: PackedConfig | None = None,
    ) -> None:
        """A matrix-vector product per pair; `slot_of` (E,) int32 on the device."""
        _, out_dim, in_dim = self.w.shape
        slots = _slots_of(self.w)
        config = config or self._pair_config(in_dim)
        launch(
            packed_kernels.packed_pairs, (self.out.shape[0], triton.cdiv(out_dim, config.block_out)),
            self.x, *slots.fields, self._some_bias(), self.out, slot_of, ids, num_experts, out_dim, in_dim,
            *self._strides(slots), **slots.constants, HAS_BIAS=self.bias is not None, BLOCK_OUT=config.block_out,
            BLOCK_IN=config.block_in, STAGES=config.num_stages, num_warps=config.num_warps,
        )  # fmt: skip

    def tiles(
        self,
        order: torch.Tensor,
        blocks: torch.Tensor,
        num_blocks: int,
        block_m: int,
        config: PackedConfig | None = None,
    ) -> None:
        """Tiles of `block_m` pairs of one expert; `order` (P,), `blocks` (num_blocks, 3): slot, first, end place."""
        _, out_dim, in_dim = self.w.shape
        slots = _slots_of(self.w)
        config = config or default_tiles(block_m, self.x.dtype)
        launch(
            packed_kernels.packed_tiles, (triton.cdiv(out_dim, config.block_out), num_blocks),
            self.x, *slots.fields, self._some_bias(), self.out, order, blocks, out_dim, in_dim,
            *self._strides(slots), **slots.constants, HAS_BIAS=self.bias is not None, PRECISION="ieee",
            BLOCK_M=block_m, BLOCK_OUT=config.block_out, BLOCK_IN=config.block_in, num_warps=config.num_warps,
            num_stages=config.num_stages,
        )  # fmt: skip

    @property
    def key(self) -> str:
        """What a tuned configuration depends on."""
        _, out_dim, in_dim = self.w.shape
        form = form_of(self.w.format, in_dim)
        assert form is not None
        dtype = str(self.x.dtype).removeprefix("torch.")
        shares = f"g{form.group}x{form.group_rows}" if form.group else f"r{form.row_group}"
        return f"{self.w.format.name} {shares} {dtype} {out_dim}x{in_dim} {self.out.shape[0]} pairs"

    @property
    def candidates(self) -> list[PackedConfig]:
        """Configurations of `pairs` that may be the fastest."""
        return [config for config in PAIR_CANDIDATES if config.block_in < 2 * self.w.shape[2]]

    @property
    def matrix_bytes(self) -> int:
        """Of one expert, scales included."""
        return self.w.format.nbytes(self.w.shape[1:])

    def _pair_config(self, in_dim: int) -> PackedConfig:
        return tuned(self.x.device, self.key, self.candidates) or default_pairs(in_dim)

    def _strides(self, slots: _Slots) -> tuple[int | float, ...]:
        bias_stride = 0 if self.bias is None else self.bias.stride(0)
        return self.x_div, self.x.stride(0), *slots.strides, bias_stride, self.out.stride(0), slots.worth

    def _some_bias(self) -> torch.Tensor:
        return self.out if self.bias is None else self.bias
