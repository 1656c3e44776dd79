"""What a decode step of fixed shapes needs of a model: a static cache, and its decoder layers compiled for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from ..errors import UnsupportedOption
from .seam import MoELayer

#: Cache lengths are rounded up to this, so that runs of similar length share one captured step.
LENGTH_STEP = 128


def static_cache(model: PreTrainedModel, length: int) -> StaticCache:
    """A cache of fixed addresses for at least `length` tokens.

    Raises:
        UnsupportedOption: a layer of the model keeps another state than keys and values of all tokens, whose update
            depends on the length in Python and so cannot be captured.
    """
    if not model._supports_default_dynamic_cache():
        raise UnsupportedOption(f"{type(model).__name__} brings a cache of its own")
    cache = StaticCache(config=model.config, max_cache_len=-(-length // LENGTH_STEP) * LENGTH_STEP)
    kinds = {type(layer) for layer in cache.layers}
    if kinds != {StaticLayer}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds - {StaticLayer}))
        raise UnsupportedOption(f"its cache has layers of {names}, which cannot be captured")
    return cache


def cache_length(cache: StaticCache) -> int:
    """Tokens it has room for."""
    return int(cache.layers[0].max_cache_len)


@contextmanager
def compiled_layers(model: PreTrainedModel, layers: list[MoELayer], on: bool) -> Iterator[None]:
    """Inside, the decoder layers around the experts run compiled (not the experts themselves)."""
    if not on:
        yield
        return
    blocks = _decoder_layers(model, layers)
    # Every layer has its own index in it, which dynamo takes for a constant: one compilation each.
    limits: dict[str, Any] = {
        "recompile_limit": 2 * len(blocks) + 8,
        "accumulated_recompile_limit": 64 * len(blocks),
    }
    with torch._dynamo.config.patch(limits):
        for block in blocks:
            block.__dict__["forward"] = torch.compile(block.forward, dynamic=False)
        try:
            yield
        finally:
            for block in blocks:
                del block.__dict__["forward"]


def _decoder_layers(model: PreTrainedModel, layers: list[MoELayer]) -> list[nn.Module]:
    """The members of the lists (`model.layers`) that hold the MoE layers, without those whose forward is patched."""
    names = {
        name
        for layer in layers
        if (name := layer.name.partition(f".{layer.decoder_layer}.")[0]) != layer.name
    }
    return [
        block
        for name in sorted(names)
        for block in model.get_submodule(name).children()
        if "forward" not in block.__dict__
    ]
