"""How large a model is and where its experts lie, counted on the model itself: no weights are read for it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from .arguments import Source
from .configuration import config_of
from .moe_layers import MoELayer, find_moe_layers, top_k_of
from .skeleton import skeleton


class Outline(NamedTuple):
    """Sizes of a model, in weights."""

    layers: Sequence[MoELayer]
    top_k: int
    dense: int  # everything that is no routed expert
    dense_of_layer: int  # of that, what a decoder layer with experts reads: the mean
    config: PreTrainedConfig


def outline_of_config(name: str | Path, facts: Mapping[str, Any], dtype: torch.dtype) -> Outline | None:
    """Of the model that a config describes; None of a family that transformers does not know.

    Args:
        dtype: of the experts' rows.

    Raises:
        BadModelFolder, NotAMoE, UnsupportedExperts: as `load` would.
    """
    config = config_of(name, facts)
    if config is None:
        return None
    with no_init_weights():  # values for tensors without memory: 3 s at 94 layers
        model = skeleton(name, config, dtype, Source())
    model.tie_weights()  # left out with the values
    return outline_of(model, find_moe_layers(model))


def outline_of(model: PreTrainedModel, layers: Sequence[MoELayer]) -> Outline:
    """Of a model with these MoE layers; its experts may have been moved away."""
    experts = {id(tensor) for layer in layers for tensor in layer.module.parameters()}
    homes = [home for layer in layers if (home := _decoder_layer(model, layer.name)) is not None]
    return Outline(
        layers,
        top_k_of(model),
        _count(model, experts),
        sum(_count(home, experts) for home in homes) // max(1, len(homes)),
        model.config,
    )


def _count(module: nn.Module, without: set[int]) -> int:
    return sum(tensor.numel() for tensor in module.parameters() if id(tensor) not in without)


def _decoder_layer(model: nn.Module, name: str) -> nn.Module | None:
    """The module of a list of layers in which a module lies: `model.layers.3` of `model.layers.3.mlp.experts`."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdecimal()), default=None)
    return None if last is None else model.get_submodule(".".join(parts[: last + 1]))
