"""A model's decoder layers compiled for a while; layers that are alike share one compilation.

torch takes the index that each layer keeps for a constant, and compiles each anew: 48 layers took a minute (H200).
Where a layer does nothing with its index but name its part of the cache, it is given its part alone, and the index is
left out of what compiled code is guarded by.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, StaticCache

from ..core.worker import despite_interrupts
from ..kernels import layer_options
from .moe_layers import MoELayer

BACKEND = "inductor"
#: What transformers calls a layer's index, and the cache in calls.
INDEX, CACHE = "layer_idx", "past_key_values"
#: Ways of attention that are known to look at no index.
PLAIN_ATTENTION = {"sdpa", "eager"}


class CachePart:
    """One layer's part of a static cache, under the name that the whole has in a layer's forward."""

    def __init__(self, whole: StaticCache, index: int) -> None:
        self.layer = whole.layers[index]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the cache's own."""
        keys, values = self.layer.update(key_states, value_states, *args, **kwargs)
        return keys, values


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
    options = layer_options() if model.device.type == "cuda" else {}
    is_plain = model.config._attn_implementation in PLAIN_ATTENTION
    limits: dict[str, Any] = {
        "recompile_limit": 2 * len(blocks) + 8,
        "accumulated_recompile_limit": 64 * len(blocks),
    }

    def ran(*_: Any) -> None:
        bar.update()

    bar = tqdm(total=len(blocks), desc="compiling layers", unit="layer", disable=not progress)
    with torch._dynamo.config.patch(limits), bar:
        hooks = [block.register_forward_hook(ran) for block in blocks] if progress else []
        try:
            for block in blocks:
                block.__dict__["forward"] = _compiled(block, is_plain, options)
            yield
        finally:
            despite_interrupts(lambda: _restore(blocks, hooks))


def _restore(blocks: Sequence[nn.Module], hooks: Sequence[torch.utils.hooks.RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
    for block in blocks:
        block.__dict__.pop("forward", None)


def _compiled(block: nn.Module, may_share: bool, options: Mapping[str, Any]) -> Callable[..., Any]:
    """A decoder layer's forward, compiled; with all others that are alike, if it may."""
    index = _index_of(block) if may_share else None
    if index is None or not _only_names_the_cache(block):
        compiled: Callable[..., Any] = torch.compile(
            block.forward, dynamic=False, backend=BACKEND, options=dict(options)
        )
        return compiled
    shared = torch.compile(
        block.forward,
        dynamic=False,
        backend=BACKEND,
        options={**options, "guard_filter_fn": _without_index},
    )

    def forward(*args: Any, **kwargs: Any) -> Any:
        whole = kwargs.get(CACHE)
        if isinstance(whole, StaticCache):
            part = CachePart(whole, index)
            _unmark(part)
            kwargs[CACHE] = part
        return shared(*args, **kwargs)

    return forward


def _unmark(part: CachePart) -> None:
    """Let compiled code take the cache's tensors as inputs: transformers marks them as the same for ever, for CUDA
    graphs that torch would record itself.
    """
    for tensor in vars(part.layer).values():
        if isinstance(tensor, torch.Tensor):
            tensor.__dict__.pop("_dynamo_static_input_type", None)


def _without_index(guards: Sequence[Any]) -> list[bool]:
    return [not guard.name.endswith(f".{INDEX}") for guard in guards]


def _index_of(block: nn.Module) -> int | None:
    """The index that all parts of a layer have which have one."""
    found = {part.__dict__[INDEX] for part in block.modules() if isinstance(part.__dict__.get(INDEX), int)}
    return found.pop() if len(found) == 1 else None


def _only_names_the_cache(block: nn.Module) -> bool:
    """Whether no part of a layer does more with its index, and with the cache, than to update its part of it."""
    kinds: set[Any] = {type(part) for part in block.modules()}
    return all(_is_plain(kind) for kind in kinds)


@cache
def _is_plain(kind: Any) -> bool:
    """Whether a module's class uses index and cache in `past_key_values.update(..., self.layer_idx)` alone, besides
    handing the cache on and asking whether there is one. No module of torch knows either.
    """
    if kind.__module__.startswith("torch."):
        return True
    try:
        trees = [
            ast.parse(textwrap.dedent(inspect.getsource(function)))
            for owner in kind.__mro__
            if not owner.__module__.startswith(("torch.", "builtins"))
            for name, function in vars(owner).items()
            if inspect.isfunction(function) and name != "__init__"
        ]
    except (OSError, SyntaxError):  # made at run time: it cannot be read
        return False
    return all(_is_plain_code(tree) for tree in trees)


def _is_plain_code(tree: ast.AST) -> bool:
    allowed: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            updated = node.func
            if isinstance(updated, ast.Attribute) and updated.attr == "update" and _is_cache(updated.value):
                allowed |= {id(updated.value), *(id(argument) for argument in node.args)}
            allowed |= {id(keyword.value) for keyword in node.keywords if keyword.arg == CACHE}
        elif isinstance(node, ast.Compare) and all(isinstance(test, ast.Is | ast.IsNot) for test in node.ops):
            allowed.add(id(node.left))
    return not any(
        id(node) not in allowed
        and (_is_cache(node) or (isinstance(node, ast.Attribute) and node.attr == INDEX))
        for node in ast.walk(tree)
    )


def _is_cache(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == CACHE


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
