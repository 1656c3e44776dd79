"""Whole numbers of 8 bits with a scale for each output channel, or for each group of weights in it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .base import Format, Part


@dataclass(frozen=True)
class Int8(Format):
    """Weights (N, K) from -128 to 127, times scales (N,), or (N, K / group).

    Attributes:
        group: weights of a row that share a scale; None: all of them.
    """

    group: int | None = None

    @property
    def name(self) -> str:
        return "int8"

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        scales = shape[:1] if self.group is None else (shape[0], shape[1] // self.group)
        return Part("", shape, torch.int8), Part("_scale", scales, torch.float32)

    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
        return (self._grouped(parts[""].float()) * parts["_scale"].unsqueeze(-1)).reshape(parts[""].shape)

    def _pack(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = self._grouped(weights.float())
        scale = groups.abs().amax(-1) / 127
        steps = groups / torch.where(scale > 0, scale, 1.0).unsqueeze(-1)
        return {"": steps.round().clamp(-127, 127).to(torch.int8).reshape(weights.shape), "_scale": scale}

    def _grouped(self, weights: torch.Tensor) -> torch.Tensor:
        """What shares a scale in the last dimension."""
        return weights if self.group is None else weights.unflatten(-1, (-1, self.group))
