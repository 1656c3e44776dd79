"""Load a model folder or hub id, and say clearly what is wrong with one that cannot be loaded."""

from copy import deepcopy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.quantizers import AutoHfQuantizer

from ..errors import UnsupportedExperts
from ..weights.formats import PACKED
from .arguments import Source, dtype_of
from .configuration import packing_of, read_config
from .loaded import Check, LoadedModel
from .moe_layers import MoELayer, find_moe_layers, top_k_of
from .packed import (
    ExpertsInFiles,
    experts_in_files,
    load_packed,
    packed_on_load,
    read_around,
    require_plain,
)
from .place import check_place
from .reading import SAID, read_model, reading
from .skeleton import check_size, model_class, skeleton
from .tokenizer import read_tokenizer


def load_model(
    name: str | Path,
    dtype: torch.dtype | str,
    check: Check,
    source: Source,
    experts: str,
) -> LoadedModel:
    """Load an MoE model onto the CPU, as the class that its configuration names; packed experts stay in their files.

    Args:
        name: folder or hub id.
        dtype: of the weights, or its name; "auto" keeps the checkpoint's.
        check: see `Check`.
        source: what is passed on to `from_pretrained`.
        experts: "auto" as the checkpoint has them, "plain" unpacked, or a format of `formats.PACKED` for plain ones.

    Raises:
        BadModelFolder: not there, incomplete, truncated, corrupt, or of a family transformers does not know.
        NotAMoE, UnsupportedExperts: it has no experts, or some that cannot be served.
        UnsupportedOption: of the dtype, or of `experts` for this model.
    """
    dtype = dtype_of(dtype)
    contents, source = check_place(name, source)
    config = read_config(name, source)
    packing = packing_of(config)
    if packing is not None and source.weights.get("quantization_config") is None:
        return load_packed(name, config, packing, dtype, check, source, experts)
    is_unpacked = _check_packing(name, config, source)
    bare = skeleton(name, config, dtype, source)
    layers = find_moe_layers(bare)
    files = None
    if experts in PACKED and not is_unpacked and source.use_safetensors:
        files = experts_in_files(name, config, bare, layers, dtype, source)
    layers, text = _as_asked(layers, experts, files)
    check(layers, top_k_of(bare), text)
    if contents is not None and not is_unpacked:
        check_size(name, bare, contents)
    if source.use_safetensors and not is_unpacked:
        require_plain(name, config, source)
    if files is not None:
        model = read_around(name, bare, config, dtype, files.state_dict(), source)
    else:
        del bare, layers
        found = model_class(config, source)
        # The others take no revision of code: theirs is in transformers.
        code = (
            source.code if found is AutoModelForCausalLM else {"trust_remote_code": source.trust_remote_code}
        )
        model = read_model(
            name, found, config, dtype,
            use_safetensors=source.use_safetensors, **source.hub, **source.weights, **code,
        )  # fmt: skip
    layers, text = _as_asked(find_moe_layers(model), experts, files)
    return LoadedModel(model, read_tokenizer(name, source), layers, text)


def _as_asked(
    layers: list[MoELayer], experts: str, files: ExpertsInFiles | None
) -> tuple[list[MoELayer], str]:
    """Layers of plain weights with the rows that are asked for, and that in one line."""
    if experts in ("auto", "plain"):
        return layers, ""
    return packed_on_load(layers, experts, files), (
        f"experts are packed to {experts} while they are loaded, which is lossy"
    )


def _check_packing(name: str | Path, config: PreTrainedConfig, source: Source) -> bool:
    """Whether a `quantization_config` is given by which transformers unpacks the checkpoint while it reads it.

    Raises:
        UnsupportedExperts: it would stay packed, or what unpacks it is not installed.
    """
    asked = source.weights.get("quantization_config")
    if asked is None:
        return False
    packing = packing_of(config)
    with reading(f"the quantization_config of {name} cannot be used"):
        if packing is not None:
            # Both are changed in place by transformers, and this only asks.
            packing = AutoHfQuantizer.merge_quantization_configs(deepcopy(packing), deepcopy(asked))
        quantizer = AutoHfQuantizer.from_config(packing or deepcopy(asked), pre_quantized=packing is not None)
        method = str(getattr(quantizer.quantization_config.quant_method, "value", "quantised"))
    try:
        quantizer.validate_environment(device_map=None, weights_only=True)
    except (ImportError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:SAID]
        raise UnsupportedExperts(
            f"{name} is quantised ({method}), which cannot be read here: {reason}"
        ) from error
    if not getattr(quantizer.quantization_config, "dequantize", False):
        raise UnsupportedExperts(
            f"quantization_config is {method}, by which transformers would keep packed weights of its own; leave it "
            f"out: a packed checkpoint is served packed as it is, and experts='int8', 'fp8', 'int4' or 'mxfp4' packs a "
            f"plain one"
        )
    return True
