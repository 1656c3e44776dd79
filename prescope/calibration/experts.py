"""Experts to measure with: rows of random weights in host memory, and the ways to compute with them."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from ..cache.residency import LayerNeed
from ..core.types import ExpertSize
from ..device import Device
from ..kernels import ExpertsSpec, TorchKernel, Work, layer_weights
from ..kernels.cpu import CpuExperts, CpuLayer, ExpertBatch
from ..weights.host_pool import HostLayer
from ..weights.layout import RowLayout, pack, row_layout


class ExpertForm(NamedTuple):
    """How experts of one size compute and lie in memory."""

    spec: ExpertsSpec
    layout: RowLayout

    @property
    def layer(self) -> CpuLayer:
        """The sizes as the CPU lane reads them."""
        return CpuLayer(
            torch.empty((0, self.layout.row_bytes), dtype=torch.uint8, device="cpu"), self.layout, self.spec
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.dtype

    @property
    def expert(self) -> ExpertSize:
        """Its bytes and sizes, as a profile stores them."""
        return ExpertSize(self.layout.row_bytes, self.layer.in_dim, self.layer.width)


def silu_form(width: int, expert_width: int, dtype: torch.dtype = torch.bfloat16) -> ExpertForm:
    """The usual expert: down(silu(gate(x)) * up(x)) without biases."""
    up = torch.empty((1, 2 * expert_width, width), dtype=dtype, device="meta")
    down = torch.empty((1, width, expert_width), dtype=dtype, device="meta")
    spec = ExpertsSpec(
        up="gate_up_proj", down="down_proj", up_bias=None, down_bias=None, is_transposed=False, gate=_silu_gate,
        post_norm=None,
    )  # fmt: skip
    return ExpertForm(spec, row_layout({"gate_up_proj": up, "down_proj": down}))


def _silu_gate(h: torch.Tensor) -> torch.Tensor:
    gate, up = h.chunk(2, dim=-1)
    return functional.silu(gate) * up


def random_rows(form: ExpertForm, num_rows: int, device: Device) -> HostLayer:
    """Pinned rows of the same random weights; each is memory of its own."""
    host = HostLayer(form.layout, num_rows, device)
    host.prepare()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in _random_fields(form, generator).items():
        host.tensor(name)[0].copy_(tensor[0])
    host.rows[1:] = host.rows[0]
    return host


def _random_fields(form: ExpertForm, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """One expert's fields (1, ...), packed as the form's layout has them."""
    names = [form.spec.up, form.spec.down, form.spec.up_bias, form.spec.down_bias]
    tensors = {}
    for name in names:
        if name is not None:
            shape = form.layout.shape(name)
            tensors[name] = (
                torch.randn((1, *shape), generator=generator, dtype=torch.float32, device="cpu")
                * shape[-1] ** -0.5
            )
    return tensors if form.layout.packing is None else pack(form.layout.packing, tensors)


class LaneExperts:
    """The engine's own CPU lane.

    As of every lane here, `run` computes `num` distinct experts with `tokens` tokens each and returns when it is done.
    Successive calls take other experts, so that weights come from memory and not from a cache.
    """

    def __init__(self, form: ExpertForm, host: HostLayer, lane: CpuExperts) -> None:
        self._form, self._num_rows, self._lane = form, len(host.rows), lane
        self._next = 0
        self._buffers: dict[tuple[int, int], tuple[ExpertBatch, torch.Tensor, torch.Tensor]] = {}

    def run(self, num: int, tokens: int) -> None:
        expert_batch, x, out = self._buffers.get((num, tokens)) or self._make(num, tokens)
        experts = (self._next + np.arange(num)) % self._num_rows
        self._next = int(experts[-1]) + 1
        self._lane.submit(0, expert_batch._replace(experts=experts), x, out).wait()

    def _make(self, num: int, tokens: int) -> tuple[ExpertBatch, torch.Tensor, torch.Tensor]:
        layer = self._form.layer
        pairs = np.arange(num * tokens)
        expert_batch = ExpertBatch(np.arange(num), np.arange(num + 1) * tokens, pairs % tokens, pairs)
        x = torch.randn((tokens, layer.in_dim), dtype=torch.float32, device="cpu").to(layer.dtype)
        out = torch.empty((num * tokens, layer.out_dim), dtype=layer.dtype, device="cpu")
        self._buffers[num, tokens] = expert_batch, x, out
        return expert_batch, x, out


class TorchExperts:
    """The torch kernel: where there is no GPU, and for experts that only torch can compute on one."""

    def __init__(self, form: ExpertForm, pool: torch.Tensor, device: Device) -> None:
        self._form, self._num_rows, self._next = form, len(pool), 0
        self._device = device
        self._weights = layer_weights(form.layout, form.spec, pool)
        self._kernel = TorchKernel()

    @torch.no_grad()
    def run(self, num: int, tokens: int) -> None:
        layer = self._form.layer
        ids = np.tile(np.arange(num), (tokens, 1))
        experts = np.arange(num)
        slots = (self._next + experts) % self._num_rows
        self._next = int(slots[-1]) + 1
        here = self._device.torch_device
        work = Work(
            x_TD=torch.ones((tokens, layer.in_dim), dtype=layer.dtype, device=here),
            ids_TK=torch.from_numpy(ids).to(here),
            host_ids_TK=ids,
            need=LayerNeed(0, experts, np.full(num, tokens), num, 0),
            num_experts=num,
            out_PD=torch.empty((num * tokens, layer.out_dim), dtype=layer.dtype, device=here),
            num_rounds=1,
            slot_row=slots,
            version=0,
        )
        self._kernel.prepare(work)
        self._kernel.run(work, self._form.spec, self._weights, experts, slots)
        self._device.synchronize()


def host_us(run: Callable[[], object]) -> float:
    """Wall time of a call, microseconds."""
    started = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - started) / 1e3
