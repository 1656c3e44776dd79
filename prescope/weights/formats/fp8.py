"""Floats of 8 bits (e4m3) with a scale for each block of weights."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd

import torch
from torch.nn import functional

from .base import Format, Part

LARGEST = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class Fp8(Format):
    """Weights (N, K) of float8_e4m3fn, times float32 scales (ceil(N / block_rows), ceil(K / block_columns)).

    128 x 128 is the usual block; 1 x K is a scale for each output channel.
    """

    block_rows: int
    block_columns: int

    @property
    def name(self) -> str:
        return "fp8"

    @property
    def rows_together(self) -> int:
        return self.block_rows

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        rows, columns = -(-shape[0] // self.block_rows), -(-shape[1] // self.block_columns)
        return Part("", shape, torch.float8_e4m3fn), Part("_scale", (rows, columns), torch.float32)

    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
        return parts[""].float() * self._spread(parts["_scale"], shape)

    def _pack(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        shape = weights.shape[-2], weights.shape[-1]
        blocks = self.parts(shape)[1].shape
        padding = blocks[1] * self.block_columns - shape[1], blocks[0] * self.block_rows - shape[0]
        whole = functional.pad(weights.float().abs(), (0, padding[0], 0, padding[1]))
        tiles = whole.unflatten(-1, (blocks[1], self.block_columns)).unflatten(
            -3, (blocks[0], self.block_rows)
        )
        scale = tiles.amax((-1, -3)) / LARGEST
        steps = weights.float() / self._spread(torch.where(scale > 0, scale, 1.0), shape)
        return {"": steps.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), "_scale": scale}

    def aligned(self, rows: int) -> "Fp8":
        """The same with blocks that end where a matrix of `rows` ends, so that another can follow it."""
        return replace(self, block_rows=gcd(rows, self.block_rows))

    def align(self, parts: Mapping[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
        """The parts of a matrix of `rows` in the format that `aligned` gives."""
        block_rows = self.aligned(rows).block_rows
        scale = parts["_scale"].repeat_interleave(self.block_rows // block_rows, dim=-2)
        return {**parts, "_scale": scale[..., : rows // block_rows, :]}

    def _spread(self, scale: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """A scale for each weight."""
        rows = scale if self.block_rows == 1 else scale.repeat_interleave(self.block_rows, dim=-2)
        if scale.shape[-1] == 1:
            return rows[..., : shape[0], :]
        return rows[..., : shape[0], :].repeat_interleave(self.block_columns, dim=-1)[..., : shape[1]]
