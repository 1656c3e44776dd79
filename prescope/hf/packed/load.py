"""Load a packed checkpoint: the model by transformers, its experts left in their files until rows are filled."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import get_checkpoint_shard_files

from ...errors import BadModelFolder, UnsupportedExperts, UnsupportedOption
from ..arguments import Source
from ..configuration import without_packing
from ..loaded import Check, LoadedModel
from ..moe_layers import MoELayer, find_moe_layers, top_k_of
from ..reading import file_of, naming, read_model, reading
from ..skeleton import skeleton
from ..tokenizer import read_tokenizer
from .checkpoint import Checkpoint
from .in_files import ExpertsInFiles
from .methods import ANY_GROUPS, groups_of
from .plan import PackedPlan
from .published import FLOATS, matrices_in


def load_packed(
    name: str | Path,
    config: PreTrainedConfig,
    packing: Mapping[str, Any],
    dtype: torch.dtype | str,
    check: Check,
    source: Source,
    experts: str,
) -> LoadedModel:
    """Load a checkpoint whose `quantization_config` is `packing`; the rest as of `load_model`."""
    method = packing.get("quant_method", "unknown")
    said = f"{name} is quantised ({method})"
    with naming(said):
        groups = groups_of(packing)
    if experts not in ("auto", "plain"):
        raise UnsupportedOption(
            f"{said} already, so its experts are not packed to {experts}; leave experts= out, "
            f"or load the same model in bfloat16"
        )
    files = _weight_files(name, config, source)
    if not files:
        raise BadModelFolder(f"{name} has no model.safetensors, and packed weights are read from those only")
    config = without_packing(config)
    wanted = _dtype_of_packed(config, dtype)
    bare = skeleton(name, config, wanted, source)
    plain = find_moe_layers(bare)
    with naming(said):
        plan = PackedPlan.of(Checkpoint(files), groups, bare, plain, wanted, keep=experts == "auto")
    layers = plan.layers(plain)
    text = plan.describe(layers)
    check(layers, top_k_of(bare), text)
    with naming(said):  # what only values say, such as an order of columns, is looked at when they are read
        model = read_around(name, bare, config, wanted, plan.state_dict(), source)
    layers = [_naming_layer(said, layer) for layer in plan.layers(find_moe_layers(model))]
    return LoadedModel(model, read_tokenizer(name, source), layers, text)


def _naming_layer(said: str, layer: MoELayer) -> MoELayer:
    """The layer with `naming` around its rows' values, which are read later."""
    read = layer.read_fields
    return layer if read is None else replace(layer, read_fields=naming(said)(read))


def read_around(
    name: str | Path,
    bare: PreTrainedModel,
    config: PreTrainedConfig,
    dtype: torch.dtype | str,
    state: Mapping[str, Any],
    source: Source,
) -> PreTrainedModel:
    """The model, of the class of `bare`, of a state without the experts, as of a checkpoint."""
    model = read_model(name, type(bare), config, dtype, state_dict=state, **source.attention)
    model.config.name_or_path = str(name)
    _read_generation_config(name, model, source)
    return model


def experts_in_files(
    name: str | Path,
    config: PreTrainedConfig,
    bare: PreTrainedModel,
    layers: Sequence[MoELayer],
    dtype: torch.dtype | str,
    source: Source,
) -> ExpertsInFiles | None:
    """The experts of a plain checkpoint where they lie, to be packed layer by layer.

    None where the model has to be read whole: by foreign code, from other files than safetensors, where only the files
    say its dtype, or where transformers makes the experts of all weights at once.

    Raises:
        BadModelFolder: they are not there, or not as the configuration says.
    """
    is_said = dtype != "auto" or getattr(config, "dtype", None) is not None
    files = _weight_files(name, config, source) if is_said and not source.trust_remote_code else []
    if not files:
        return None
    try:
        return ExpertsInFiles(Checkpoint(files), bare, layers)
    except UnsupportedExperts:
        return None


def _dtype_of_packed(config: PreTrainedConfig, dtype: torch.dtype | str) -> torch.dtype:
    """What packed weights are computed in: as asked for, else as the configuration says, else bfloat16."""
    if isinstance(dtype, torch.dtype):
        return dtype
    said = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
    return said if isinstance(said, torch.dtype) and said.itemsize >= 2 else torch.bfloat16


def require_plain(name: str | Path, config: PreTrainedConfig, source: Source) -> None:
    """Look for packed weights in a checkpoint whose configuration does not say that there are any.

    Transformers would take the numbers of 8 bits as they are, without their scales, and say that those are unexpected.

    Raises:
        BadModelFolder: there are some.
    """
    checkpoint = Checkpoint(_weight_files(name, config, source))
    packed = [
        matrix
        for matrix in matrices_in(ANY_GROUPS, checkpoint.entries)
        if checkpoint.entries[matrix.names["weight"]].dtype not in FLOATS
    ]
    if packed:
        tensor = packed[0].names["weight"]
        raise BadModelFolder(
            f"{name} has {len(packed)} packed matrices ({tensor} is {checkpoint.entries[tensor].dtype} with scales, "
            f"...), and its config.json has no quantization_config that says how they are packed; take the config.json "
            f"that was published with them, or load the same model in bfloat16"
        )


def _weight_files(name: str | Path, config: PreTrainedConfig, source: Source) -> list[Path]:
    """The safetensors files of a folder, or of a hub id, which are fetched; none where there are others only.

    Of several those that transformers would read: the file that the configuration names, else one that has all, else
    those of the index.

    Raises:
        BadModelFolder: they cannot be fetched, or the configuration names a file outside.
    """
    variant = source.weights.get("variant")
    middle = f".{variant}" if variant else ""
    named = getattr(config, "transformers_weights", None)
    if named is not None and (Path(str(named)).is_absolute() or ".." in Path(str(named)).parts):
        raise BadModelFolder(f"the config.json of {name} names weights outside of it: {named}")
    usual = (f"model{middle}.safetensors", f"model.safetensors.index{middle}.json")
    with reading(f"the weights of {name} cannot be fetched"):
        for file in usual if named is None else (str(named),):
            found = file_of(name, file, source)
            if found is not None and file.endswith(".safetensors"):
                return [Path(found)]
            if found is not None and ".safetensors.index." in file:
                files, _ = get_checkpoint_shard_files(str(name), found, **source.hub)
                return [Path(file) for file in files]
    return []


def _read_generation_config(name: str | Path, model: PreTrainedModel, source: Source) -> None:
    with reading(f"the generation_config.json of {name} cannot be used"):
        if file_of(name, "generation_config.json", source) is not None and model.can_generate():
            model.generation_config = GenerationConfig.from_pretrained(name, **source.hub)
