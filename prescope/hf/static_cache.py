"""What a decode step of fixed shapes needs of a model: a static cache, and its decoder layers compiled for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationMixin, PreTrainedModel, StaticCache
from transformers.cache_utils import CacheLayerMixin, StaticLayer, StaticSlidingWindowLayer

from ..errors import UnsupportedOption
from ..kernels import layer_options
from .moe_layers import MoELayer

#: Cache lengths are rounded up to this, so that runs of similar length share one captured step.
LENGTH_STEP = 128
#: Most captures of one step, over all drivers.
CAPTURES = 4


def static_cache(model: PreTrainedModel, length: int) -> StaticCache:
    """A cache of fixed addresses for at least `length` tokens.

    Raises:
        UnsupportedOption: a layer of the model keeps another state than keys and values of all tokens, whose update
            depends on the length in Python and so cannot be captured. A sliding window wider than `length` does not
            slide.
    """
    if not isinstance(model, GenerationMixin) or not model._supports_default_dynamic_cache():
        raise UnsupportedOption(f"{type(model).__name__} brings a cache of its own")
    # Capturing a step counts a token in Python, in layers that count there, without one being cached.
    rounded = -(-(length + CAPTURES) // LENGTH_STEP) * LENGTH_STEP
    try:
        cache = StaticCache(config=model.config, max_cache_len=rounded)
    except KeyError as error:
        raise UnsupportedOption(f"transformers has no static cache for layers of {error}") from error
    other = {
        type(layer).__name__ + (f" ({layer.max_cache_len} tokens)" if _slides(layer) else "")
        for layer in cache.layers
        if not _keeps_all_tokens(layer, length + CAPTURES)
    }
    if other:
        raise UnsupportedOption(
            f"its cache has layers of {', '.join(sorted(other))}; a run of {length} tokens cannot be captured with them"
        )
    return cache


def _slides(layer: CacheLayerMixin) -> bool:
    return type(layer) is StaticSlidingWindowLayer


def _keeps_all_tokens(layer: CacheLayerMixin, length: int) -> bool:
    if _slides(layer):
        return layer.max_cache_len >= length
    return type(layer) is StaticLayer


def addresses_of(model: nn.Module) -> int:
    """Another number when a module or weight was replaced (an adapter, `load_state_dict(assign=True)`), which a
    captured step would not notice; the same one when weights were changed in place, which it does.
    """
    modules = map(id, model.modules())
    return hash((*modules, *(tensor.data_ptr() for tensor in chain(model.parameters(), model.buffers()))))


def has_hooks(model: nn.Module) -> bool:
    """Whether somebody has registered hooks on the model or its parts, which a captured step would not call.

    Those of transformers stay for good once outputs were asked for, and do nothing in other runs.
    """
    hooks = (
        hook
        for part in model.modules()
        for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    )
    return any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)


def cache_length(cache: StaticCache) -> int:
    """Tokens it has room for."""
    return min(int(layer.max_cache_len) for layer in cache.layers) - CAPTURES


def cached_tokens(cache: StaticCache) -> torch.Tensor:
    """How many tokens it holds, as a tensor that steps on the device keep up to date."""
    return cache.layers[0].cumulative_length


def counts_in_python(cache: StaticCache) -> bool:
    """Whether models that ask this cache for its length get a number, which a graph would keep for ever."""
    return any(type(layer) is not StaticLayer for layer in cache.layers)


@contextmanager
def compiled_layers(
    model: PreTrainedModel, layers: list[MoELayer], on: bool, progress: bool = False
) -> Iterator[None]:
    """Inside, the decoder layers around the experts run compiled (not the experts themselves).

    progress: show how many layers have run, for the pass that compiles them.
    """
    if not on:
        yield
        return
    blocks = _decoder_layers(model, layers)
    # Every layer has its own index in it, which dynamo takes for a constant: one compilation each.
    limits: dict[str, Any] = {
        "recompile_limit": 2 * len(blocks) + 8,
        "accumulated_recompile_limit": 64 * len(blocks),
    }

    options = layer_options() if model.device.type == "cuda" else None

    def ran(*_: Any) -> None:
        bar.update()

    bar = tqdm(total=len(blocks), desc="compiling layers", unit="layer", disable=not progress)
    with torch._dynamo.config.patch(limits), bar:
        hooks = [block.register_forward_hook(ran) for block in blocks] if progress else []
        for block in blocks:
            block.__dict__["forward"] = torch.compile(block.forward, dynamic=False, options=options)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
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
