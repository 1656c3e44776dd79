"""What a decode step of fixed shapes needs of a model: a static cache, and that nothing of it was replaced."""

import sys
from itertools import chain

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel, StaticCache
from transformers.cache_utils import CacheLayerMixin, StaticLayer, StaticSlidingWindowLayer

from ..errors import UnsupportedOption

#: Cache lengths are rounded up to powers of two, from LEAST_TOKENS to MOST_TOKENS of all sequences together, and beyond
#: to multiples: so many runs share one captured step. What is not used takes 0.4 GiB at most with the 48 layers of
#: Qwen3-30B-A3B, and attention reads that too, as the keys and values of all heads.
LEAST_TOKENS, MOST_TOKENS = 256, 4096
#: Of one sequence, however many there are.
LEAST_LENGTH = 128
#: Most captures of one step, over all drivers.
CAPTURES = 4


def bucket_of(length: int, batch: int) -> int:
    """Length of the cache for runs of `length` tokens of each of `batch` sequences."""
    tokens = [_power_of_2_below(most // batch) for most in (LEAST_TOKENS, MOST_TOKENS)]
    least, most = (max(LEAST_LENGTH, each) for each in tokens)
    step = min(most, max(least, 1 << (length - 1).bit_length()))
    return -(-length // step) * step


def _power_of_2_below(number: int) -> int:
    return 1 << max(0, number.bit_length() - 1)


class AllTokens(StaticLayer):
    """A layer with a sliding window that keeps all tokens: the mask says which of them it sees. transformers' own moves
    the tokens, by a count that Python keeps, and so cannot be captured.
    """

    is_sliding = True  # which mask it is given


def sliding_window(model: PreTrainedModel) -> int:
    """Tokens that the model's layers with a sliding window see, 0 without such layers, or where they see chunks."""
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "attention_chunk_size", None):
        return 0
    return int(getattr(config, "sliding_window", None) or 0)


def longest_prompt(model: PreTrainedModel) -> int:
    """Tokens that a prompt can be filled up to: some models turn positions otherwise in longer texts."""
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    given = [config, rope, *(rope.values() if isinstance(rope, dict) else ())]
    names = ("max_position_embeddings", "original_max_position_embeddings")
    found = [
        one.get(name) if isinstance(one, dict) else getattr(one, name, None)
        for one in given
        for name in names
    ]
    return min((int(length) for length in found if length), default=sys.maxsize)


def static_cache(model: PreTrainedModel, length: int, batch: int) -> StaticCache:
    """A cache of fixed addresses for at least `length` tokens of each of `batch` sequences, in a bucket's length.

    Raises:
        UnsupportedOption: a layer of the model keeps another state than keys and values of all tokens, whose update
            depends on the length in Python and so cannot be captured.
    """
    if not isinstance(model, GenerationMixin) or not model._supports_default_dynamic_cache():
        raise UnsupportedOption(f"{type(model).__name__} brings a cache of its own")
    # Capturing a step counts a token in Python, in layers that count there, without one being cached.
    rounded = bucket_of(length + CAPTURES, batch)
    try:
        cache = StaticCache(config=model.config, max_cache_len=rounded)
    except KeyError as error:
        raise UnsupportedOption(f"transformers has no static cache for layers of {error}") from error
    window = sliding_window(model)
    sliding = [one for one in cache.layers if type(one) is StaticSlidingWindowLayer]
    # The one mask of these layers is known to slide only where all have the window of the configuration. Chunks come in
    # transformers' sliding layers too; their mask begins anew with each.
    if window and all(layer.max_cache_len == min(window, rounded) for layer in sliding):
        cache.layers = [AllTokens(rounded) if layer in sliding else layer for layer in cache.layers]
    other = {type(layer).__name__ for layer in cache.layers if not _keeps_all_tokens(layer)}
    if other:
        raise UnsupportedOption(
            f"its cache has layers of {', '.join(sorted(other))}; a run of {length} tokens cannot be captured with them"
        )
    return cache


def _keeps_all_tokens(layer: CacheLayerMixin) -> bool:
    return type(layer) in (StaticLayer, AllTokens)


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


def cache_bytes(cache: StaticCache) -> int:
    """Memory of the device that it has taken so far."""
    layers = [layer for layer in cache.layers if layer.is_initialized]
    return sum(int(layer.keys.nbytes) + int(layer.values.nbytes) for layer in layers)


def cached_tokens(cache: StaticCache) -> torch.Tensor:
    """How many tokens it holds, as a tensor that steps on the device keep up to date."""
    return cache.layers[0].cumulative_length


def slides(cache: StaticCache) -> bool:
    """Whether all layers have a sliding window: the one mask of such a model is a sliding one."""
    return all(type(layer) is AllTokens for layer in cache.layers)
