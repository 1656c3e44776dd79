"""What users wrap around a model, and who else has taken its weights: unwrapped, or refused before anything moves."""

import re
from itertools import chain
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedExperts, UnsupportedOption
from .moe_layers import MoELayer


def model_in(given: Any) -> PreTrainedModel:
    """The transformers model itself, out of `torch.compile(model)`, a PeftModel or another wrapper.

    Raises:
        UnsupportedOption: there is none in it, or the wrapper has weights of its own, which the model does without.
    """
    if isinstance(given, PreTrainedModel):
        return given
    if not isinstance(given, nn.Module):
        raise UnsupportedOption(
            f"attach takes a model that is in memory, this is a {type(given).__name__}; for a folder or a hub id use "
            f"prescope.load"
        )
    inner = next((module for module in given.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        raise UnsupportedOption(f"{type(given).__name__} is no transformers model, and has none in it")
    if own := _weights_beside(given, inner):
        raise UnsupportedOption(
            f"{type(given).__name__} has weights of its own ({own}) around {type(inner).__name__}, which would be left "
            f"out; attach the model in it and call that"
        )
    return inner


def require_whole(model: PreTrainedModel, layers: list[MoELayer]) -> None:
    """Raise UnsupportedExperts if some weights are not in memory or on one device, or adapters change the experts'."""
    named = chain(model.named_parameters(), model.named_buffers())
    if missing := [name for name, tensor in named if tensor.is_meta]:
        raise UnsupportedExperts(
            f"{len(missing)} weights of this model are not in memory ({missing[0]}, ...): accelerate has offloaded "
            f"them (device_map=...) or they were never loaded; load the model without device_map, or with prescope.load"
        )
    devices = sorted({str(device) for device in getattr(model, "hf_device_map", {}).values()})
    if len(devices) > 1:
        raise UnsupportedExperts(
            f"accelerate has spread this model over {', '.join(devices)} (device_map=...), and moves its activations "
            f"between them; load it without device_map, or with prescope.load"
        )
    for layer in layers:
        _require_unadapted(model, layer)


def _require_unadapted(model: nn.Module, layer: MoELayer) -> None:
    # An adapter takes the experts' place and name, and has them as a child (experts.base_layer).
    inside = re.match(r"(.*?\bexperts)\.", layer.name)
    if inside is None:
        return
    wrapper = model.get_submodule(inside[1])
    if own := _weights_beside(wrapper, layer.module):
        raise UnsupportedExperts(
            f"{inside[1]} is a {type(wrapper).__name__} with weights of its own ({own}): an adapter on the experts "
            f"would have to change them in every forward; merge it into them first (merge_and_unload()), or adapt "
            f"attention and routers instead"
        )


def _weights_beside(outer: nn.Module, inner: nn.Module) -> str:
    """The name of a parameter or buffer of `outer` that is not in `inner`; "" if there is none."""
    known = {id(tensor) for tensor in chain(inner.parameters(), inner.buffers())}
    named = chain(outer.named_parameters(), outer.named_buffers())
    return next((name for name, tensor in named if id(tensor) not in known), "")
