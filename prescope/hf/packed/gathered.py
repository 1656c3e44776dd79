"""Experts' parameters, put together of what a checkpoint has when they are sliced."""

from collections.abc import Sequence
from typing import Any

import torch

from ..moe_layers import MoELayer
from .gate_order import is_interleaved


class Gathered:
    """A parameter of all experts as the plain weights of single ones, for which transformers has no rule.

    Args:
        parts: what is put one behind the other, each of all experts.
        in_turns: the two parts are gate and up, and the family has them in turns.
        is_turned: it has the inputs first.
    """

    def __init__(self, parts: Sequence[Sequence[Any]], in_turns: bool, is_turned: bool) -> None:
        self._parts, self._in_turns, self._is_turned = parts, in_turns, is_turned

    def __getitem__(self, index: Any) -> torch.Tensor:
        parts = [torch.stack([weight[...] for weight in part]) for part in self._parts]
        whole = torch.stack(parts, dim=2).flatten(1, 2) if self._in_turns else torch.cat(parts, dim=1)
        return (whole.mT if self._is_turned else whole)[index]


class LeftOut:
    """An experts' parameter of which the model gets the shape only: one number, seen everywhere."""

    def __init__(self, parameter: torch.Tensor) -> None:
        self._shape, self._dtype = parameter.shape, parameter.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        return torch.zeros((), dtype=self._dtype, device="cpu").expand(self._shape)[index]


def order_of(layer: MoELayer, name: str) -> tuple[bool, bool]:
    """`in_turns` and `is_turned` of a parameter of the layer, as `Gathered` takes them."""
    spec, up = layer.spec, layer.matrix_shapes[layer.spec.up]
    is_pair = bool(layer.module.has_gate) and name in (spec.up, spec.up_bias)
    is_turned = spec.is_transposed and name in (spec.up, spec.down)
    return is_pair and is_interleaved(spec.gate, up[0]), is_turned
