"""What may not be done to an attached model as a whole: load, save, cast or move its experts.

A write to one weight is refused by the weight itself (`host_parameter`). These calls would come to the experts only
after they have changed other weights, so they are refused before the first one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from .host_parameter import HostParameter, refuse


class Guards:
    """Refuses such calls on a model, and on any part of it that has experts, from `install` until `remove`.

    Hooks look whether they are wanted: one whose handle an interrupt has lost stays in its module, and does nothing.
    """

    def __init__(self) -> None:
        self.is_on = False
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._modules: list[nn.Module] = []

    def install(self, model: nn.Module, device: torch.device) -> None:
        """Guard a model whose expert weights are stand-ins already; `device`: where it computes."""
        self.is_on = True
        dtypes = {p.dtype for p in model.parameters() if isinstance(p, HostParameter)}
        probes = [torch.empty(0, dtype=dtype, device=device) for dtype in dtypes]
        for module in model.modules():
            named = module.named_parameters(remove_duplicate=False)
            names = [name for name, parameter in named if isinstance(parameter, HostParameter)]
            if names:
                self._guard(module, names, probes)

    def _guard(self, module: nn.Module, names: list[str], probes: list[torch.Tensor]) -> None:
        hooks = (
            (module.register_load_state_dict_pre_hook, partial(_refuse_load, self, names)),
            (module.register_state_dict_pre_hook, partial(_refuse_state_dict, self)),
        )
        for register, hook in hooks:
            self._handles.append(register(hook))
        # All of to(), half(), cuda() and their like go through it, from the outermost module to the innermost.
        self._modules.append(module)
        module.__dict__["_apply"] = partial(_apply, module, probes)

    def remove(self) -> None:
        """Allow everything again; interrupted, the next call does what is left."""
        self.is_on = False
        for handle in self._handles:
            handle.remove()
        for module in self._modules:
            module.__dict__.pop("_apply", None)
        self._handles, self._modules = [], []


def _refuse_load(
    guards: Guards, names: list[str], module: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any
) -> None:
    # A state of other weights alone (an adapter's, say) may be loaded.
    if not guards.is_on:
        return
    if found := next((prefix + name for name in names if prefix + name in state_dict), None):
        refuse(f"load_state_dict() with {found}")


def _refuse_state_dict(guards: Guards, module: nn.Module, prefix: str, keep_vars: bool) -> None:
    # A wrapper may want its own weights alone, as who saves an adapter does: it gets stand-ins for the experts', which
    # say the same as soon as they are read.
    if guards.is_on and not prefix:
        refuse(f"saving {type(module).__name__} or reading its state_dict")


def _apply(
    module: nn.Module,
    probes: list[torch.Tensor],
    fn: Callable[[torch.Tensor], torch.Tensor],
    recurse: bool = True,
) -> nn.Module:
    """What torch does in its stead, for the other weights, if it leaves tensors like the experts' as they are."""
    if any(fn(probe) is not probe for probe in probes):
        refuse("casting or moving an attached model")
    whole = module._parameters
    module._parameters = {n: p for n, p in whole.items() if not isinstance(p, HostParameter)}
    try:
        return type(module)._apply(module, fn, recurse)
    finally:
        module._parameters = {name: module._parameters.get(name, whole[name]) for name in whole}
