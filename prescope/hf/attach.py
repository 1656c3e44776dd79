"""Take the experts out of a model into host rows, route its MoE layers to the engine, and undo all of it exactly."""

import time
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..core.worker import Latch, Worker, despite_interrupts
from ..device import Device
from ..errors import AlreadyAttached, UnsupportedExperts
from ..weights.host_pool import HostLayer, HostPool, is_on_host
from .guards import Guards
from .host_parameter import HostParameter, LostParameter, refuse
from .moe_layers import MoELayer

IMPLEMENTATION = "prescope"
#: Experts that take from half a second (fresh huge pages, many cores) to a few seconds to copy get a progress bar.
PROGRESS_BYTES = 4 << 30
#: Layers whose pages are prepared while the GPU writes into an earlier one's: one is faulted in, another pinned. The
#: host gets no fuller by it than it will be in the end; from CPU memory no layer is opened ahead.
LAYERS_AHEAD = 2
#: For the rows of one layer: 4 GiB of fresh pages take some seconds, a busy machine's some ten.
MOST_PIN_S = 600.0

#: (moe_layer, hidden_states (T, D), expert ids (T, K), weights (T, K)) -> (T, D)
ServeFunction = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _set_data(tensor: torch.Tensor, make: Callable[[], torch.Tensor]) -> None:
    """Give a weight other data, made in the mode in which it was made: torch can use no mixture of the two."""
    with torch.inference_mode(tensor.is_inference()):
        tensor.data = make()


class Binding:
    """What an attached experts module knows of its engine. Cannot be copied: a copy would share the slots.

    Attributes:
        serve: stands in for its forward.
        moe_layer: its rank.
        weight_names: of its stand-ins, which must still be there.
        owner: the engine.
    """

    __slots__ = ("moe_layer", "owner", "serve", "weight_names")

    def __init__(
        self, serve: ServeFunction, moe_layer: int, weight_names: tuple[str, ...], owner: Any
    ) -> None:
        self.serve, self.moe_layer, self.weight_names, self.owner = serve, moe_layer, weight_names, owner

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse("copying or pickling an attached model")


def owner_of(layers: list[MoELayer]) -> Any:
    """The engine that serves these layers now, or None."""
    bindings = [layer.module.__dict__.get("_prescope") for layer in layers]
    return next((binding.owner for binding in bindings if binding is not None), None)


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
    for name in binding.weight_names:
        if type(module._parameters.get(name)) is not HostParameter:
            refuse(f"{name} of MoE layer {binding.moe_layer} was replaced, or is changed by an adapter")
    return binding.serve(binding.moe_layer, hidden_states, ids, weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)


class Attachment:
    """A model whose experts live in host rows. `detach` gives back the model as it was, bit for bit; of one that was
    loaded packed it gives back all but the experts, whose weights then cannot be read (`LostParameter`).

    The model's Parameter objects stay the same objects, so references to them (optimizers, hooks, ties) survive;
    while attached they are empty and a stand-in of their shape is in their module. Neither can be read or written.

    Args:
        layers: of the model.
        device: where it will compute.

    Attributes:
        host: the rows.
        fill_seconds: wall time of filling and pinning them; `host.seconds` has its parts, which overlap.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: list[MoELayer],
        device: Device,
    ) -> None:
        self.model = model
        self.layers = layers
        self._device = device
        self._originals: list[_Originals] = []
        self._moved: list[tuple[torch.Tensor, torch.device]] = []
        self._configs: list[tuple[nn.Module, Any]] = []
        self._guards = Guards()
        self.host = HostPool([])
        self.fill_seconds = 0.0

    def attach(self, serve: ServeFunction, owner: Any = None) -> None:
        """Take the experts out and route their layers; whatever goes wrong, the model is as it was.

        Args:
            serve: stands in for the experts' forward. `owner`: the engine, for `owner_of`.

        Raises:
            AlreadyAttached: to another engine.
        """
        if any("_prescope" in layer.module.__dict__ for layer in self.layers):
            raise AlreadyAttached(
                "this model already runs through an engine; call detach() on that one first"
            )
        try:
            self._take_experts()
            self._move_rest()
            self._route(serve, owner)
            self._guards.install(self.model, self._device.torch_device)
        except BaseException:
            despite_interrupts(self.detach)
            raise

    def _take_experts(self) -> None:
        # Layer by layer, so that the peak is the model plus one layer.
        nbytes = sum(layer.nbytes for layer in self.layers)
        started = time.perf_counter()
        progress = tqdm(
            total=nbytes,
            desc="experts to host memory",
            unit="B",
            unit_scale=True,
            disable=nbytes < PROGRESS_BYTES,
        )
        helpers = _Helpers()
        try:
            with progress:
                self._fill_rows(progress, helpers)
        finally:  # their work is over, also after an error: `detach` then unpins what they have pinned
            despite_interrupts(helpers.close)
        self.fill_seconds = time.perf_counter() - started

    def _fill_rows(self, progress: tqdm, helpers: "_Helpers") -> None:
        """Fill all rows; the helpers pin some layers while another is copied."""
        for rank, layer in enumerate(self.layers):
            tensors = layer.tensors()
            if not is_on_host(tensors):
                # The next layers' pages are faulted in and pinned while the GPU writes into this one's.
                while helpers.num_jobs < min(rank + 1 + LAYERS_AHEAD, len(self.layers)):
                    helpers.submit(self._open_rows(helpers.num_jobs).prepare)
            if rank < helpers.num_jobs:
                helpers.wait(rank)
            rows = self._open_rows(rank)
            rows.copy(tensors if layer.read_fields is None else layer.read_fields())
            self._give_up_originals(layer)
            if rank == helpers.num_jobs:
                # After the originals are gone, so that the next layer can be copied meanwhile within the peak.
                helpers.submit(rows.pin)
            progress.update(rows.rows.nbytes)
        for rank in range(helpers.num_jobs):
            helpers.wait(rank)

    def _open_rows(self, rank: int) -> HostLayer:
        """Rows of a layer, opened in the order of the layers; `detach` closes them all."""
        if rank == len(self.host.layers):
            layer = self.layers[rank]
            self.host.layers.append(HostLayer(layer.layout, layer.num_experts, self._device))
        return self.host.layers[rank]

    def _give_up_originals(self, layer: MoELayer) -> None:
        originals = _Originals(layer.tensors()[layer.weight_names[0]].device, {})
        self._originals.append(originals)
        for name in layer.weight_names:
            parameter = layer.module._parameters[name]
            assert parameter is not None
            stand_in = HostParameter.standing_for(parameter, self._device.torch_device)
            originals.parameters[name] = parameter, stand_in
            for module in (layer.module, *layer.twins):
                module._parameters[name] = stand_in
            _set_data(parameter, partial(torch.empty, 0, dtype=parameter.dtype, device=parameter.device))
            parameter.__class__ = HostParameter

    def _move_rest(self) -> None:
        target = self._device.torch_device
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            if tensor.device != target and not isinstance(tensor, HostParameter):
                self._moved.append((tensor, tensor.device))
                _set_data(tensor, partial(tensor.data.to, target))

    def _route(self, serve: ServeFunction, owner: Any) -> None:
        # A copy of the configuration: other models may have been made from the same object.
        copies: dict[int, Any] = {}
        for layer in self.layers:
            for module in (layer.module, *layer.twins):
                config: Any = module.config
                routed = copies.setdefault(id(config), copy(config))
                routed._experts_implementation_internal = IMPLEMENTATION
                self._configs.append((module, config))
                module.config = routed
                module.__dict__["_prescope"] = Binding(serve, layer.moe_layer, layer.weight_names, owner)

    def detach(self) -> None:
        """Undo everything; does nothing the second time. Interrupted anywhere, the next call does what is left."""
        self._guards.remove()
        for module, config in self._configs:
            module.config = config
        for layer in self.layers:
            for module in (layer.module, *layer.twins):
                module.__dict__.pop("_prescope", None)
        for tensor, device in self._moved:
            _set_data(tensor, partial(tensor.data.to, device))
        self._restore_experts()
        self.host.close()
        self._configs, self._moved = [], []

    def _restore_experts(self) -> None:
        # Layer by layer again: each layer's rows are closed before the next one's originals take memory. Whatever is
        # done twice, after an interrupt, gives the same again as long as the rows are there.
        for layer, rows, originals in zip(self.layers, self.host.layers, self._originals, strict=False):
            for name, (parameter, stand_in) in list(originals.parameters.items()):
                if layer.read_fields is not None:  # was read packed: there is nothing to give back
                    parameter.__class__ = stand_in.__class__ = LostParameter
                    del originals.parameters[name]
                    continue
                parameter.__class__ = nn.Parameter
                _set_data(parameter, partial(rows.restore, name, originals.device))
                with torch.inference_mode(parameter.is_inference()):
                    parameter.requires_grad_(stand_in.requires_grad)
                for module in (layer.module, *layer.twins):
                    if module._parameters.get(name) is stand_in:  # else replaced meanwhile, and that stays
                        module._parameters[name] = parameter
                del originals.parameters[name]
            rows.close()


class _Originals(NamedTuple):
    """A layer's own weights, which are still to be given back, with their stand-ins; and the device they were on."""

    device: torch.device
    parameters: dict[str, tuple[nn.Parameter, HostParameter]]


class _Helpers:
    """Threads that pin some layers' rows while another's are copied; the jobs are numbered by layer."""

    def __init__(self) -> None:
        self._workers = [Worker("prescope-pin") for _ in range(LAYERS_AHEAD)]
        self._ended: list[Latch] = []
        self._errors: dict[int, BaseException] = {}

    @property
    def num_jobs(self) -> int:
        return len(self._ended)

    def submit(self, job: Callable[[], None]) -> None:
        rank, ended = len(self._ended), Latch()

        def work() -> None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001 - raised by `wait`
                self._errors[rank] = error
            finally:
                ended.set()

        self._workers[rank % LAYERS_AHEAD].submit(work)
        self._ended.append(ended)

    def wait(self, rank: int) -> None:
        """Raises WaitTimedOut, and whatever the job raised."""
        self._workers[rank % LAYERS_AHEAD].wait(
            self._ended[rank], f"pinned memory for MoE layer {rank}", MOST_PIN_S
        )
        if rank in self._errors:
            raise self._errors[rank]

    def close(self) -> None:
        for worker in self._workers:
            worker.close("the end of pinning host memory", MOST_PIN_S)
