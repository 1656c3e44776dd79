"""Take the experts out of a model into host rows, route its MoE layers to the engine, and undo all of it exactly."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..device import Device
from ..errors import AlreadyAttached, UnsupportedExperts
from ..host_pool import HostLayer, HostPool
from .seam import MoELayer

IMPLEMENTATION = "prescope"
#: Experts that take longer than about two seconds to copy get a progress bar.
PROGRESS_BYTES = 4 << 30

#: (moe_layer, hidden_states (T, D), expert ids (T, K), weights (T, K)) -> (T, D)
ServeFunction = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@torch.compiler.disable
def _experts_forward(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor | None = None,
    top_k_weights: torch.Tensor | None = None,
    *,
    router_indices: torch.Tensor | None = None,
    routing_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    # Some families call the arguments by older names.
    ids = top_k_index if top_k_index is not None else router_indices
    weights = top_k_weights if top_k_weights is not None else routing_weights
    binding = module.__dict__.get("_prescope")
    if binding is None:
        raise UnsupportedExperts(
            "this experts module was set to 'prescope' by hand; use prescope.attach(model)"
        )
    serve, moe_layer = binding
    return serve(moe_layer, hidden_states, ids, weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)


class Attachment:
    """A model whose experts live in host rows. `detach` gives back the model as it was, bit for bit.

    The model's Parameter objects stay the same objects, so references to them (optimizers, hooks, ties) survive;
    while attached they are empty and a placeholder on `meta` stands in their module.
    """

    def __init__(
        self, model: PreTrainedModel, layers: list[MoELayer], device: Device, serve: ServeFunction
    ) -> None:
        if any("_prescope" in layer.module.__dict__ for layer in layers):
            raise AlreadyAttached(
                "this model already runs through an engine; call detach() on that one first"
            )
        self.model = model
        self.layers = layers
        self._device = device
        self._parameters: list[dict[str, nn.Parameter]] = []
        self._experts_devices: list[torch.device] = []
        self._moved: list[tuple[torch.Tensor, torch.device]] = []
        self._implementations: list[tuple[Any, str | None]] = []
        self._guards: list[torch.utils.hooks.RemovableHandle] = []
        self.host = HostPool([])
        try:
            self._take_experts()
            self._move_rest()
            self._route(serve)
        except BaseException:
            self.detach()
            raise

    def _take_experts(self) -> None:
        # Layer by layer, so that the peak is the model plus one layer.
        nbytes = sum(layer.num_experts * layer.layout.row_bytes for layer in self.layers)
        progress = tqdm(
            total=nbytes,
            desc="experts to host memory",
            unit="B",
            unit_scale=True,
            disable=nbytes < PROGRESS_BYTES,
        )
        with progress:
            self._fill_rows(progress)

    def _fill_rows(self, progress: tqdm) -> None:
        for layer in self.layers:
            rows = HostLayer(layer.layout, layer.num_experts, self._device)
            self.host.layers.append(rows)
            rows.fill(layer.tensors())
            originals: dict[str, nn.Parameter] = {}
            self._experts_devices.append(layer.tensors()[layer.weight_names[0]].device)
            self._parameters.append(originals)
            for name in layer.weight_names:
                parameter = layer.module._parameters[name]
                assert parameter is not None
                originals[name] = parameter
                placeholder = nn.Parameter(
                    torch.empty_like(parameter, device="meta"), parameter.requires_grad
                )
                for module in (layer.module, *layer.twins):
                    module._parameters[name] = placeholder
                parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            progress.update(rows.rows.nbytes)

    def _move_rest(self) -> None:
        target = self._device.torch_device
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            if not tensor.is_meta and tensor.device != target:
                self._moved.append((tensor, tensor.device))
                tensor.data = tensor.data.to(target)

    def _route(self, serve: ServeFunction) -> None:
        for layer in self.layers:
            for module in (layer.module, *layer.twins):
                config: Any = module.config
                if all(config is not known for known, _ in self._implementations):
                    self._implementations.append((config, config._experts_implementation_internal))
                    config._experts_implementation_internal = IMPLEMENTATION
                module.__dict__["_prescope"] = (serve, layer.moe_layer)
                self._guards.append(module.register_state_dict_pre_hook(_refuse_state_dict))

    def detach(self) -> None:
        """Undo everything; does nothing the second time."""
        for guard in self._guards:
            guard.remove()
        for config, implementation in self._implementations:
            config._experts_implementation_internal = implementation
        for layer in self.layers:
            for module in (layer.module, *layer.twins):
                module.__dict__.pop("_prescope", None)
        for tensor, device in self._moved:
            tensor.data = tensor.data.to(device)
        for layer, rows, originals, device in zip(
            self.layers, self.host.layers, self._parameters, self._experts_devices, strict=False
        ):
            for name, parameter in originals.items():
                parameter.data = rows.tensor(name).to(device, copy=True).contiguous()
                for module in (layer.module, *layer.twins):
                    module._parameters[name] = parameter
        self.host.close()
        self._guards, self._implementations, self._moved = [], [], []
        self._parameters, self._experts_devices = [], []


def _refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise UnsupportedExperts(
        f"{prefix.rstrip('.') or 'the experts'}: the experts of this model are in prescope's host rows; "
        f"call detach() before saving it or reading its state_dict"
    )
