"""GPU experts as a captured decode step computes them: from a graph, so that launches cost what they cost there."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..cache.policies import LRU, make_policy
from ..cache.residency import ResidencyTable
from ..core.types import MoEShape
from ..device import Device
from ..kernels import layer_weights, make_device_table
from ..weights.host_pool import HostLayer
from .experts import ExpertForm

#: Layers in one graph at most, each with experts of its own: their weights come from memory, not from the L2.
LAYERS = 4
REPLAYS = 5


class _Graph(NamedTuple):
    """A captured round of layers. A graph knows addresses alone: what lies there lives as long as `layers`."""

    replay: Callable[[], None]
    num_layers: int
    layers: Callable[[], torch.Tensor]


class GraphLane:
    """Layers whose experts are all resident, captured once for each number of experts and tokens."""

    def __init__(self, form: ExpertForm, host: HostLayer, pool: torch.Tensor, device: Device) -> None:
        self._form, self._host, self._pool, self._device = form, host, pool, device
        self._graphs: dict[tuple[int, int], _Graph] = {}

    def us(self, num: int, tokens: int) -> float:
        """One layer in which each of `tokens` tokens uses the same `num` experts, microseconds."""
        graph = self._graphs.get((num, tokens)) or self._capture(num, tokens)
        start = self._device.mark(True)
        for _ in range(REPLAYS):
            graph.replay()
        end = self._device.mark(True)
        self._device.synchronize()
        return self._device.elapsed_us(start, end) / REPLAYS / graph.num_layers

    @torch.no_grad()
    def _capture(self, num: int, tokens: int) -> _Graph:
        num_layers = max(1, min(LAYERS, len(self._pool) // num))
        shape = MoEShape(num_layers, num, num, self._form.layout.row_bytes)
        residency = ResidencyTable(shape, num_layers * num, make_policy("lru", shape))
        for layer in range(num_layers):
            residency.landed(residency.take(layer, torch.arange(num, device="cpu").numpy()))
        table = make_device_table(shape, residency.num_slots, self._device.torch_device)
        table.take(residency)
        step = table.new_step(tokens, num, policy=LRU.kind, orders=False, timed=False)
        spec = self._form.spec
        weights = layer_weights(self._form.layout, spec, self._pool)
        dtype, device = self._form.dtype, self._device.torch_device
        x = torch.randn((tokens, self._form.layer.in_dim), dtype=dtype, device=device)
        ids = torch.arange(num, device=device).expand(tokens, num).contiguous()
        router_weights = torch.full((tokens, num), 1.0 / num, dtype=dtype, device=device)

        def layers() -> torch.Tensor:
            for layer in range(num_layers):
                out = step.layer(
                    layer, num, x, ids, router_weights, spec, weights, self._pool, self._host.rows
                )
            return out

        layers()  # compiles the kernels, which cannot be done while a graph is captured
        replay, _ = self._device.capture(layers)
        replay()
        self._device.synchronize()
        graph = self._graphs[num, tokens] = _Graph(replay, num_layers, layers)
        return graph
