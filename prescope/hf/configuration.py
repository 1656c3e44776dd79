"""A model's configuration: read without anybody's code, and the part that says how its weights are packed."""

import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .arguments import Source
from .folder import check_counts
from .reading import reading

#: Ways to compute that are part of torch and transformers. Others may come from a hub, so a config.json cannot ask for
#: them, only a caller: "kernels-community/..." is downloaded and run, and "flash_attention_2" is where it is missing.
OWN_ATTENTION = {None, "eager", "sdpa", "flex_attention"}
OWN_EXPERTS = {None, "eager", "batched_mm", "grouped_mm"}


def read_config(name: str | Path, source: Source) -> PreTrainedConfig:
    """The configuration of a folder or hub id.

    Raises:
        BadModelFolder: it cannot be used.
    """
    with reading(
        f"the configuration of {name} cannot be used (if its family is new, update transformers; code that comes "
        f"with a checkpoint runs with trust_remote_code=True only)"
    ):
        config = AutoConfig.from_pretrained(name, **source.hub, **source.code)
        check_counts(config.to_dict(), f"the config.json of {name}")
    if "attn_implementation" not in source.weights:
        _drop_foreign_kernels(name, config)
    return config


def config_of(name: str | Path, facts: Mapping[str, Any]) -> PreTrainedConfig | None:
    """The configuration that a dict describes, in plain form; None of a family that transformers does not know.

    Raises:
        BadModelFolder: it cannot be used.
    """
    family = facts.get("model_type")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        return None
    with reading(f"the configuration of {name} cannot be used"):
        config = CONFIG_MAPPING[family].from_dict(_with_floats(dict(facts)))
        check_counts(config.to_dict(), f"the config.json of {name}")
    _drop_foreign_kernels(name, config)
    return without_packing(config)


def _with_floats(value: Any) -> Any:
    """A copy with the floats for which JSON has no words: `save_pretrained` writes {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _with_floats(inner) for key, inner in value.items()}
    return [_with_floats(inner) for inner in value] if isinstance(value, list) else deepcopy(value)


def _drop_foreign_kernels(name: str | Path, config: PreTrainedConfig) -> None:
    """Take out of a configuration what would be fetched from a hub and run."""
    for part in [config, *_parts_of(config)]:
        for attribute, own in (
            ("_attn_implementation", OWN_ATTENTION),
            ("_experts_implementation", OWN_EXPERTS),
        ):
            asked = getattr(part, attribute, None)
            if not isinstance(asked, str | None) or asked not in own:
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


def packing_of(config: PreTrainedConfig) -> Mapping[str, Any] | None:
    """The `quantization_config` of a configuration or of its text part."""
    for part in (config, config.get_text_config(decoder=True)):
        packing = getattr(part, "quantization_config", None)
        if packing is not None:
            return packing if isinstance(packing, Mapping) else dict(packing.to_dict())
    return None


def without_packing(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the same model in plain form."""
    plain = deepcopy(config)
    for part in (plain, plain.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return plain
