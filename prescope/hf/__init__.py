"""The door to transformers: finding MoE layers, attaching to a model, loading one from a folder or the hub."""

from .arguments import PASSED_ON, Source, take_source
from .attach import Attachment
from .load import LoadedModel, load_model
from .moe_layers import MoELayer, find_moe_layers, top_k_of
from .static_cache import cache_length, cached_tokens, compiled_layers, counts_in_python, static_cache

__all__ = [
    "PASSED_ON",
    "Attachment",
    "LoadedModel",
    "MoELayer",
    "Source",
    "cache_length",
    "cached_tokens",
    "compiled_layers",
    "counts_in_python",
    "find_moe_layers",
    "load_model",
    "static_cache",
    "take_source",
    "top_k_of",
]
