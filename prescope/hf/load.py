"""Load a model folder or hub id, and say clearly what is wrong with one that cannot be loaded."""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers import AutoHfQuantizer
from transformers.utils.hub import cached_file

from ..errors import BadModelFolder, NotAMoE, PrescopeError, UnsupportedExperts
from .arguments import Source, dtype_of
from .folder import Contents, check_counts, check_folder
from .moe_layers import MoELayer, find_moe_layers, top_k_of

#: Ways to compute that are part of torch and transformers. Others may come from a hub, so a config.json cannot ask for
#: them, only a caller: "kernels-community/..." is downloaded and run, and "flash_attention_2" is where it is missing.
OWN_ATTENTION = {None, "eager", "sdpa", "flex_attention"}
OWN_EXPERTS = {None, "eager", "batched_mm", "grouped_mm"}
#: A folder or repository with one of these has a tokenizer.
TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "tiktoken.model",
)  # fmt: skip
#: Elements that a model may have beyond those of its files: tied weights counted twice, buffers that are computed.
SPARE_ELEMENTS = 1 << 26
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SAID = 400  # characters of somebody else's error that are quoted


class LoadedModel(NamedTuple):
    """A model on the CPU and its tokenizer, if it has one."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None


def load_model(
    name: str | Path,
    dtype: torch.dtype | str,
    check: Callable[[list[MoELayer], int], None],
    source: Source | None = None,
) -> LoadedModel:
    """Load an MoE model onto the CPU, as the class that its configuration names.

    Args:
        name: folder or hub id.
        dtype: of the weights, or its name; "auto" keeps the checkpoint's.
        check: called with the MoE layers (on meta) and top-k before any weight is read, to fail early.
        source: what is passed on to `from_pretrained`; by default no foreign code and no pickle.

    Raises:
        BadModelFolder: not there, incomplete, truncated, corrupt, or of a family transformers does not know.
        NotAMoE, UnsupportedExperts: it has no experts, or packed ones.
        UnsupportedOption: of the dtype.
    """
    source, dtype = source or Source(), dtype_of(dtype)
    contents = _check_name(name, source)
    config = _read_config(name, source)
    is_packed = _check_packing(name, config, source)
    skeleton = _skeleton(name, config, dtype, source)
    check(find_moe_layers(skeleton), top_k_of(skeleton))
    if contents is not None and not is_packed:
        _check_size(name, skeleton, contents)
    del skeleton
    with _reading(f"{name} cannot be loaded"):
        model, info = _model_class(name, config, source).from_pretrained(
            name,
            dtype=dtype,
            config=config,
            output_loading_info=True,
            use_safetensors=source.use_safetensors,
            **source.hub,
            **source.weights,
            **source.code,
        )
    if info["missing_keys"] or info["mismatched_keys"]:
        bad = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise BadModelFolder(
            f"{name} lacks {len(bad)} weights or has them in another shape ({', '.join(bad[:3])}, ...); they would be "
            f"random. Fetch the checkpoint again"
        )
    return LoadedModel(model.eval(), _read_tokenizer(name, source))


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Whatever transformers raises while it reads somebody's files is the files' fault, and is said so."""
    try:
        yield
    except PrescopeError:
        raise
    # tokenizers raises plain Exception, and fuzzed files many other kinds (docs/robustness.md): no list of them would
    # be whole. Only calls into transformers stand inside.
    except Exception as error:
        text = " ".join(str(error).split())
        said = text if len(text) <= _SAID else f"{text[:_SAID]} ..."
        raise BadModelFolder(f"{what}: {type(error).__name__}: {said}") from error


def _check_name(name: str | Path, source: Source) -> Contents | None:
    """A folder's contents, looked at before anything is read; None for a hub id, which is said if it may be a slip."""
    folder = Path(name)
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, ValueError) as error:
        raise BadModelFolder(f"{name} is no name of a folder: {error}") from error
    if is_folder:
        return check_folder(
            folder / source.subfolder,
            use_safetensors=source.use_safetensors,
            variant=source.weights.get("variant"),
        )
    if exists or not _HUB_ID.fullmatch(str(name)) or str(name).startswith("."):
        raise BadModelFolder(f"{name} is neither a folder nor a hub id of the form 'owner/name'")
    if folder.parent.is_dir():
        # More likely a slip of the hand; without a network the hub is asked for half a minute.
        near = get_close_matches(
            folder.name, [path.name for path in folder.parent.iterdir() if path.is_dir()], 1
        )
        meant = f"; did you mean {folder.parent / near[0]}?" if near else ""
        warnings.warn(
            f"there is no folder {name}, so the Hugging Face hub is asked for it{meant}", stacklevel=4
        )
    return None


# -- the configuration ---------------------------------------------------------------------------------------


def _read_config(name: str | Path, source: Source) -> PreTrainedConfig:
    with _reading(
        f"the configuration of {name} cannot be used (if its family is new, update transformers; code that comes "
        f"with a checkpoint runs with trust_remote_code=True only)"
    ):
        config = AutoConfig.from_pretrained(name, **source.hub, **source.code)
        check_counts(config.to_dict(), f"the config.json of {name}")
    if "attn_implementation" not in source.weights:
        _drop_foreign_kernels(name, config)
    return config


def _drop_foreign_kernels(name: str | Path, config: PreTrainedConfig) -> None:
    """Take out of a configuration what would be fetched from a hub and run."""
    for part in [config, *_parts_of(config)]:
        for attribute, own in (
            ("_attn_implementation", OWN_ATTENTION),
            ("_experts_implementation", OWN_EXPERTS),
        ):
            asked = getattr(part, attribute, None)
            if asked not in own:
                setattr(part, attribute, None)
                warnings.warn(
                    f"the config.json of {name} asks for {asked!r}, which may be code from a hub; it is not used "
                    f"unless you pass attn_implementation={asked!r} yourself",
                    stacklevel=5,
                )


def _parts_of(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """All configurations inside a configuration."""
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if isinstance(part, PreTrainedConfig):
            yield part
            yield from _parts_of(part)


def _check_packing(name: str | Path, config: PreTrainedConfig, source: Source) -> bool:
    """Whether the checkpoint is quantised and will be unpacked while it is read.

    Raises:
        UnsupportedExperts: it would stay packed, or what unpacks it is not installed.
    """
    asked = source.weights.get("quantization_config")
    packing = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(decoder=True), "quantization_config", None
    )
    if packing is None and asked is None:
        return False
    with _reading(f"the quantization_config of {name} cannot be used"):
        if packing is not None:
            # Both are changed in place by transformers, and this only asks.
            packing = AutoHfQuantizer.merge_quantization_configs(deepcopy(packing), deepcopy(asked))
        quantizer = AutoHfQuantizer.from_config(packing or deepcopy(asked), pre_quantized=packing is not None)
        method = str(getattr(quantizer.quantization_config.quant_method, "value", "quantised"))
    try:
        quantizer.validate_environment(device_map=None, weights_only=True)
    except (ImportError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:_SAID]
        raise UnsupportedExperts(
            f"{name} is quantised ({method}), which cannot be read here: {reason}"
        ) from error
    if not getattr(quantizer.quantization_config, "dequantize", False):
        way = type(quantizer.quantization_config).__name__
        unpack = (
            f"pass quantization_config=transformers.{way}(dequantize=True) to have it unpacked, or "
            if hasattr(quantizer.quantization_config, "dequantize")
            else ""
        )
        raise UnsupportedExperts(
            f"{name} is quantised ({method}), and packed experts are not moved yet; {unpack}load the same model in "
            f"bfloat16"
        )
    return True


# -- the model -----------------------------------------------------------------------------------------------


def _model_class(name: str | Path, config: PreTrainedConfig, source: Source) -> Any:
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


def _skeleton(
    name: str | Path, config: PreTrainedConfig, dtype: torch.dtype | str, source: Source
) -> PreTrainedModel:
    """The model on meta: shapes without weights."""
    wanted = getattr(config, "dtype", None) if dtype == "auto" else dtype
    attention = {key: value for key, value in source.weights.items() if key == "attn_implementation"}
    with _reading(f"no model can be made of the config.json of {name}"):
        found = _model_class(name, config, source)
        is_known = source.trust_remote_code or type(config) in AutoModelForCausalLM._model_mapping
        if found is AutoModelForCausalLM and not is_known:
            raise NotAMoE(
                f"{name} names no architecture, and {type(config).__name__} has no causal language model; load it with "
                f"its own class and pass it to prescope.attach"
            )
        with torch.device("meta"):
            if found is AutoModelForCausalLM:
                return found.from_config(
                    deepcopy(config), dtype=wanted or torch.float32, **attention, **source.code
                )
            return found._from_config(deepcopy(config), dtype=wanted or torch.float32, **attention)


def _check_size(name: str | Path, skeleton: PreTrainedModel, contents: Contents) -> None:
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


# -- the tokenizer -------------------------------------------------------------------------------------------


def _read_tokenizer(name: str | Path, source: Source) -> PreTrainedTokenizerBase | None:
    """The tokenizer; None where there is none: then prompts are token ids, and `generate` says so when it gets text."""
    if not _has_tokenizer(name, source):
        return None
    with _reading(
        f"the tokenizer of {name} cannot be used (fetch it again; without one, load the model with from_pretrained, "
        f"pass it to prescope.attach and give token ids)"
    ):
        tokenizer = AutoTokenizer.from_pretrained(name, **source.hub, **source.code)
        if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):
            # transformers makes one without a vocabulary where tokenizer_config.json is all there is.
            raise BadModelFolder(f"the tokenizer of {name} has no vocabulary; fetch the folder again")
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _has_tokenizer(name: str | Path, source: Source) -> bool:
    if Path(name).is_dir():
        return any((Path(name) / source.subfolder / file).exists() for file in TOKENIZER_FILES)
    with _reading(f"the tokenizer of {name} cannot be fetched"):
        return any(
            cached_file(name, file, _raise_exceptions_for_missing_entries=False, **source.hub) is not None
            for file in TOKENIZER_FILES
        )
