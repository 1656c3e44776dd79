"""Which weights of a checkpoint the experts of a model are made of."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedModel

from ...errors import BadModelFolder
from ..moe_layers import MoELayer
from .origin import Origin
from .places import Places, WeightPlace


class ExpertWeights(NamedTuple):
    """Weights by what becomes of them.

    Attributes:
        found: by the experts' parameters (layer and name), the weights that belong to each, with their places.
        owned: names of the model that are such a parameter -> which.
        spare: weights for which the model has no place, such as those of layers that predict further tokens.
    """

    found: Mapping[str, Mapping[str, WeightPlace]]
    owned: Mapping[str, str]
    spare: frozenset[str]

    @classmethod
    def of(
        cls, model: PreTrainedModel, layers: Sequence[MoELayer], weights: Iterable[str]
    ) -> "ExpertWeights":
        """Of the weights that a checkpoint has, for a model on meta and its layers."""
        places = Places(model)
        owners = {
            id(tensor): f"{layer.name}.{name}" for layer in layers for name, tensor in layer.tensors().items()
        }
        # An encoder tied to a decoder: the files have one of the names.
        owned = {
            name: owners[id(tensor)]
            for name, tensor in model.named_parameters(remove_duplicate=False)
            if id(tensor) in owners
        }
        found: dict[str, dict[str, WeightPlace]] = {target: {} for target in owned.values()}
        known = model.state_dict().keys()
        spare: set[str] = set()
        for weight in weights:
            place = places.of(weight)
            if place.target in owned:
                found[owned[place.target]][weight] = place
            elif place.target not in known:
                spare.add(weight)
        return cls(found, owned, frozenset(spare))

    def require(self, target: str) -> None:
        """Raise BadModelFolder if a parameter has no weights, UnsupportedExperts if that is due to how it is made."""
        if self.found[target]:
            return
        for places in self.found.values():
            Origin.require_stacked(target, places.values())
        raise BadModelFolder(f"the files have no weights for {target}; fetch the checkpoint again")
