"""The model that a configuration describes, without weights."""

from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..errors import BadModelFolder, NotAMoE
from .arguments import Source
from .folder import Contents
from .reading import reading

#: Elements that a model may have beyond those of its files: tied weights counted twice, buffers that are computed.
SPARE_ELEMENTS = 1 << 26


def model_class(config: PreTrainedConfig, source: Source) -> Any:
    """The class that a configuration names in `architectures`; else the family's causal language model."""
    if source.trust_remote_code and hasattr(config, "auto_map"):
        return AutoModelForCausalLM
    for architecture in config.architectures or ():
        found = _class_named(str(architecture), config)
        if found is not None:
            return found
    return AutoModelForCausalLM


def _class_named(architecture: str, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """A model class of transformers for this very configuration, by its name."""
    home = type(config).__module__.replace(".configuration_", ".modeling_")
    if not home.startswith("transformers."):
        return None
    for module in (transformers, import_module(home)):
        found = getattr(module, architecture, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found if getattr(found, "config_class", None) is type(config) else None
    return None


def skeleton(
    name: str | Path, config: PreTrainedConfig, dtype: torch.dtype | str, source: Source
) -> PreTrainedModel:
    """The model on meta: shapes without weights."""
    wanted = getattr(config, "dtype", None) if dtype == "auto" else dtype
    with reading(f"no model can be made of the config.json of {name}"):
        found = model_class(config, source)
        is_known = source.trust_remote_code or type(config) in AutoModelForCausalLM._model_mapping
        if found is AutoModelForCausalLM and not is_known:
            raise NotAMoE(
                f"{name} names no architecture, and {type(config).__name__} has no causal language model; load it with "
                f"its own class and pass it to prescope.attach"
            )
        with torch.device("meta"):
            if found is AutoModelForCausalLM:
                return found.from_config(
                    deepcopy(config), dtype=wanted or torch.float32, **source.attention, **source.code
                )
            return found._from_config(deepcopy(config), dtype=wanted or torch.float32, **source.attention)


def check_size(name: str | Path, skeleton: PreTrainedModel, contents: Contents) -> None:
    """Weights that are not in the files would be drawn at random, and memory taken for them, before they are missed.

    Raises:
        BadModelFolder: the configuration speaks of a model much larger than the files.
    """
    tensors = {id(tensor): tensor for tensor in [*skeleton.parameters(), *skeleton.buffers()]}
    elements = sum(tensor.numel() for tensor in tensors.values())
    if elements > 2 * contents.elements + SPARE_ELEMENTS:
        raise BadModelFolder(
            f"the config.json of {name} speaks of {elements:,} numbers, its files hold {contents.elements:,}; they do "
            f"not belong together, or one is damaged. Fetch the checkpoint again"
        )
