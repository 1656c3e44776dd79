"""Whole numbers of 8 bits with a scale for each output channel."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .base import Format, Part


@dataclass(frozen=True)
class Int8(Format):
    """Weights (N, K) from -127 to 127, times scales (N,)."""

    @property
    def name(self) -> str:
        return "int8"

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        return Part("", shape, torch.int8), Part("_scale", shape[:1], torch.float32)

    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
        return parts[""].float() * parts["_scale"].unsqueeze(-1)

    def pack(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weights.float().abs().amax(-1) / 127
        steps = weights.float() / torch.where(scale > 0, scale, 1.0).unsqueeze(-1)
        return {"": steps.round().clamp(-127, 127).to(torch.int8), "_scale": scale}
