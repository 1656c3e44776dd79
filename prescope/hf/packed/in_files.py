"""Plain experts that stay in their files until they are packed: host memory never holds all of them unpacked."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ..moe_layers import MoELayer
from .checkpoint import Checkpoint
from .expert_weights import ExpertWeights
from .gathered import Gathered, LeftOut, order_of
from .origin import Origin


class FromFiles(NamedTuple):
    """A parameter of all experts in its files, of which some are read at a time.

    Attributes:
        order: `in_turns` and `is_turned`, see `Gathered`.
        dtype: that of the model.
    """

    checkpoint: Checkpoint
    source: Origin
    order: tuple[bool, bool]
    dtype: torch.dtype

    def of(self, experts: slice) -> torch.Tensor:
        """(n, ...) of those experts."""
        if not self.source.is_stacked:
            whole: torch.Tensor = self.checkpoint.lazy(self.source.parts[0][0])[experts]
            return whole.to(self.dtype)
        parts = [[self.checkpoint.lazy(name) for name in part[experts]] for part in self.source.parts]
        return Gathered(parts, *self.order)[...].to(self.dtype)


class ExpertsInFiles:
    """The experts of a plain checkpoint, left out of the model.

    Args:
        model: on meta. `layers`: its MoE layers.

    Raises:
        UnsupportedExperts: transformers puts them together in a way that has to have all of them.
        BadModelFolder: some are not there, or not as the configuration says.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, layers: Sequence[MoELayer]) -> None:
        weights = ExpertWeights.of(model, layers, checkpoint.entries)
        found, owned = weights.found, weights.owned
        parameters = model.state_dict()
        self._checkpoint: Checkpoint | None = checkpoint
        self._layers: dict[str, dict[str, FromFiles]] = {}
        for layer in layers:
            of_layer = self._layers[layer.name] = {}
            for name, parameter in layer.tensors().items():
                target = f"{layer.name}.{name}"
                weights.require(target)
                source = Origin.of(target, found[target], layer.num_experts)
                order = order_of(layer, name) if source.is_ours else (False, False)
                source.require_shapes(checkpoint, tuple(parameter.shape), target, is_turned=order[1])
                of_layer[name] = FromFiles(checkpoint, source, order, parameter.dtype)
        taken = {name for of_one in found.values() for name in of_one}
        self._rest = [name for name in checkpoint.entries if name not in taken]
        self._left_out = {name: parameters[name] for name in owned}

    def state_dict(self) -> dict[str, Any]:
        """What transformers loads: everything but the experts, nothing of it read yet."""
        assert self._checkpoint is not None
        rest = {name: self._checkpoint.lazy(name) for name in self._rest}
        return rest | {name: LeftOut(parameter) for name, parameter in self._left_out.items()}

    def take(self, layer: MoELayer) -> Mapping[str, FromFiles]:
        """A layer's parameters by name, once; the files are let go with the last."""
        taken = self._layers.pop(layer.name)
        if not self._layers:
            self._checkpoint = None
        return taken
