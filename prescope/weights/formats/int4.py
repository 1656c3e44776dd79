"""Whole numbers of 4 bits with a scale for each group of a row. AWQ, GPTQ and compressed-tensors become this."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .base import Format, Part
from .nibbles import join, split

#: What stands for zero where a format has no zeros of its own.
MIDDLE = 8


@dataclass(frozen=True)
class Int4(Format):
    """Weights (N, K / 2) of two numbers q each, worth (q - zero) * scale; scales and zeros are (N, K / group).

    Attributes:
        group: weights of a row that share a scale.
        scale_dtype: as the checkpoint has it.
        has_zeros: else all zeros are 8 (symmetric).
    """

    group: int
    scale_dtype: torch.dtype = torch.bfloat16
    has_zeros: bool = False

    @property
    def name(self) -> str:
        return "int4"

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        rows, columns = shape
        groups = rows, columns // self.group
        weights, scales = (
            Part("", (rows, columns // 2), torch.uint8),
            Part("_scale", groups, self.scale_dtype),
        )
        return (weights, scales, Part("_zero", groups, torch.uint8)) if self.has_zeros else (weights, scales)

    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
        q = split(parts[""]).float().unflatten(-1, (-1, self.group))
        zero = parts["_zero"].float().unsqueeze(-1) if self.has_zeros else MIDDLE
        return ((q - zero) * parts["_scale"].float().unsqueeze(-1)).flatten(-2)

    def _pack(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = weights.float().unflatten(-1, (-1, self.group))
        if self.has_zeros:
            low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
            scale = ((high - low) / 15).to(self.scale_dtype)
            zero = (-low / _no_zeros(scale)).round().clamp(0, 15)
        else:
            # To 7 and not to 8: a group reaches as far in both directions.
            scale = (groups.abs().amax(-1) / 7).to(self.scale_dtype)
            zero = torch.full_like(scale, MIDDLE, dtype=torch.float32)
        q = (groups / _no_zeros(scale).unsqueeze(-1)).round() + zero.unsqueeze(-1)
        parts = {"": join(q.clamp(0, 15).flatten(-2)), "_scale": scale}
        return parts | {"_zero": zero.to(torch.uint8)} if self.has_zeros else parts


def _no_zeros(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale > 0, scale.float(), 1.0)
