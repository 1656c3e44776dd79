"""The door to transformers: finding MoE layers, attaching to a model, loading one from a folder or the hub."""

from .arguments import PASSED_ON, Source, take_source
from .attach import PROGRESS_BYTES, Attachment, ServeFunction, owner_of
from .compiled_layers import compiled_layers
from .foreign import model_in, require_whole
from .host_parameter import HostParameter
from .load import load_model
from .loaded import LoadedModel
from .moe_layers import MoELayer, find_moe_layers, top_k_of
from .outline import Outline, outline_of, outline_of_config
from .packed import formats_said
from .static_cache import (
    addresses_of,
    bucket_of,
    cache_bytes,
    cache_length,
    cached_tokens,
    has_hooks,
    longest_prompt,
    slides,
    sliding_window,
    static_cache,
)

__all__ = [
    "PASSED_ON",
    "PROGRESS_BYTES",
    "Attachment",
    "HostParameter",
    "LoadedModel",
    "MoELayer",
    "Outline",
    "ServeFunction",
    "Source",
    "addresses_of",
    "bucket_of",
    "cache_bytes",
    "cache_length",
    "cached_tokens",
    "compiled_layers",
    "find_moe_layers",
    "formats_said",
    "has_hooks",
    "load_model",
    "longest_prompt",
    "model_in",
    "outline_of",
    "outline_of_config",
    "owner_of",
    "require_whole",
    "slides",
    "sliding_window",
    "static_cache",
    "take_source",
    "top_k_of",
]
