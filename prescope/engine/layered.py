"""Serve MoE layers from slots: read the routing, copy what is missing, compute, release.

Per MoE layer: the host reads the chosen experts (one small copy), the residency table says where they are, misses
are copied into slots on the H2D lane, and the compute lane waits for exactly those copies. If a layer needs more
experts than there are slots, it is served in rounds; a token's output is summed at the end, in one order. While a
decode step is captured, the layer's launches go into the graph instead (`kernels.graph_buffers`).
"""

import threading
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch._C import _are_functorch_transforms_active as is_transformed
from transformers.utils import ModelOutput

from ..cache.policies import CachePolicy
from ..cache.prefetch import LEAST_BYTES_ON_WIRE, most_on_wire
from ..cache.residency import NOTHING, LayerNeed, ResidencyTable, distinct
from ..cache.rounds import Act, What, next_is_sure, walk
from ..core.types import FloatArray, IntArray, MoEShape, NeedOutcome, Reason
from ..device import Device
from ..hf import MoELayer
from ..kernels import (
    CannotLaunch,
    ExpertsSpec,
    LayerWeights,
    TorchKernel,
    Work,
    combine,
    layer_weights,
    make_kernel,
)
from ..scheduler.layer import Decision
from ..weights.host_pool import HostPool
from ..weights.loader import Loader, Transfer
from .forced_routing import ForcedRouting
from .frozen_experts import FrozenExperts
from .positions import Forward
from .recorder import Recorder
from .schedule import Predicted, ScheduleRunner
from .turn import Turn


class Unread(NamedTuple):
    """A layer that was computed before the host knew its routing."""

    moe_layer: int
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor


class CapturedLayers(Protocol):
    """Where layers' launches go while something is captured: a step (`graph_buffers.GraphBuffers`) or a prompt
    (`graph.prompt.PromptBuffers`).
    """

    def layer(
        self,
        moe_layer: int,
        num_experts: int,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        spec: ExpertsSpec,
        slots: LayerWeights,
        pool: torch.Tensor,
        host_rows: torch.Tensor,
    ) -> torch.Tensor:
        """All launches of one MoE layer; `host_rows` (E, row_bytes) pinned, `pool` (S, bytes). Returns (T, D)."""
        ...


class PromptSource(Protocol):
    """Where a prompt's forward pass may come from (`graph.prompt.PromptGraphs`)."""

    def takes(self, forward: Forward, given: Mapping[str, Any]) -> bool:
        """Whether it may come from there."""
        ...

    def run(self, forward: Forward, given: Mapping[str, Any]) -> ModelOutput:
        """The forward pass; `LayeredRunner.read_routing` follows, then `tell`."""
        ...

    def tell(self, recorder: Recorder | None) -> None:
        """Let recorder and predictor know of its layers."""
        ...


class LayeredRunner:
    """The experts' side of an engine.

    Args:
        device: lanes and memory.
        layers: of the model, in order.
        shape: sizes of its MoE part.
        kernels: resolved name.
        dtype: of the experts.

    Attributes:
        host: rows of all experts; set by whoever fills them, before the first `open_slots`.
        recorder: takes down what happens, if there is one.
        turn: whose it is to run.
        captured: where launches go while a decode step is captured, by `capturing_thread` (its ident).
        is_in_graph: while decode steps run from a graph, whose table of slots is then the true one.
        schedule_runner: decides in decode steps; without, everything that is missing is copied on demand.
        forced: routing from a trace, in decode steps.
        is_prefill: whether the forward pass under way reads a prompt.
        kernel: computes experts on the device.
        prompts: graphs that the prompt under way may come from, if there are any.
        needs: hits, late ones and misses so far, by `NeedOutcome`.
        kernel_problem: why plain torch computes instead of the kernel that was chosen; "" if it does not.
    """

    host: HostPool
    residency: ResidencyTable
    loader: Loader

    def __init__(
        self, device: Device, layers: list[MoELayer], shape: MoEShape, kernels: str, dtype: torch.dtype
    ) -> None:
        self.device, self.layers, self.shape = device, layers, shape
        self.kernels, self._dtype, self._device_type = kernels, dtype, device.torch_device.type
        self.weights: list[LayerWeights] = []
        self.recorder: Recorder | None = None
        self.turn = Turn(around=device.as_current)
        self.captured: CapturedLayers | None = None
        self.prompts: PromptSource | None = None
        self.capturing_thread = 0
        self.is_in_graph = False
        self.schedule_runner: ScheduleRunner | None = None
        self.forced: ForcedRouting | None = None
        self.is_prefill = True
        self.needs = dict.fromkeys(NeedOutcome, 0)
        self.kernel_problem = ""
        self._unread: list[Unread] = []
        self._is_at_work = False

    def open_slots(self, num_slots: int, policy: CachePolicy) -> None:
        """Take memory for slots; all of them are free."""
        self._use(num_slots, policy, None)

    def renew_slots(self, policy: CachePolicy) -> None:
        """Free all slots and use them by another policy. Their memory stays, and graphs that hold its addresses; both
        lanes must be idle.
        """
        self._use(self.residency.num_slots, policy, self.loader.pool)

    def _use(self, num_slots: int, policy: CachePolicy, pool: torch.Tensor | None) -> None:
        # Kernels keep copies of the residency table's rows, so a new table comes with a new kernel.
        kernel, _ = make_kernel(
            "torch" if self.kernel_problem else self.kernels,
            self.device.kind,
            self._dtype,
            [layer.layout for layer in self.layers],
        )
        row_bytes = self.shape.row_bytes
        residency = ResidencyTable(self.shape, num_slots, policy)
        loader = Loader(self.device, self.host, residency, row_bytes, pool)
        least_bytes = LEAST_BYTES_ON_WIRE if self.device.small_copies_are_slow else 0
        loader.most_on_wire = most_on_wire(row_bytes, num_slots, least_bytes)
        weights = [layer_weights(layer.layout, layer.spec, loader.pool) for layer in self.layers]
        # Together, without a call between them in which an interrupt could strike: they are of one another.
        self.kernel, self.residency, self.loader, self.weights = kernel, residency, loader, weights

    def close_slots(self) -> None:
        """Give the slots' memory back; both lanes must be idle."""
        self.weights = []
        self.loader.close()

    def clear(self) -> None:
        """Empty all slots and forget what cache policy and schedule learned of a text; both lanes must be idle."""
        self.residency.clear()
        self.residency.policy.reset()
        self.loader.clear()
        if self.schedule_runner is not None:
            self.schedule_runner.planner.restart()

    def put_back(self) -> None:
        """Copy the experts that belong into slots from the start (`ResidencyTable.placed`) and have none."""
        table, recorder = self.residency, self.recorder
        if not len(table.placed):
            return
        self._begin_work()
        self.loader.wait(np.flatnonzero(table.in_flight))
        timed = recorder is not None and recorder.timed
        for moe_layer, experts, slots in table.put_back():
            self.recorded(self.loader.load(moe_layer, experts, slots, Reason.STREAM, timed))
        self.loader.wait(np.flatnonzero(table.in_flight))
        self._is_at_work = False

    def _begin_work(self) -> None:
        """Of what an interrupt or an error may end half-way; where it has, the next one puts that right first."""
        if self._is_at_work:
            self.recover()
        self._is_at_work = True

    @property
    def is_interrupted(self) -> bool:
        """Whether something was ended half-way; the next layer that is served puts that right first."""
        return self._is_at_work

    def recover(self) -> None:
        """Make the lanes usable after an interrupt or a failed copy; the slots are cold afterwards.

        Interrupted itself, it is done again before the next layer is served.
        """
        self._is_at_work = True
        self.device.recover()
        self.clear()
        self.captured = None
        if self.schedule_runner is not None:
            self.schedule_runner.recover()
        self._is_at_work = False

    @property
    def is_capturing(self) -> bool:
        """Whether the calling thread captures a decode step."""
        return self.captured is not None and self.capturing_thread == threading.get_ident()

    # -- one MoE layer -----------------------------------------------------------------------------------------

    def serve(
        self, moe_layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """What stands in for the experts' forward of every MoE layer: x (..., D), ids and weights (T, K)."""
        # A module that was called alone, or computed again for a backward pass, has no forward of the model around it.
        if self.turn.owner != threading.get_ident() and not self.is_capturing:
            return self.turn.run("a MoE layer", self._serve_alone, (moe_layer, x, ids, weights))
        if x.numel() == 0:  # image tokens only, in a family with experts of its own for them
            return torch.zeros_like(x)
        x_TD = x.reshape(-1, x.shape[-1])
        ids_TK = ids.reshape(x_TD.shape[0], -1)
        weights_TK = weights.reshape(x_TD.shape[0], -1)
        if (
            x.dtype is not self._dtype
        ):  # under autocast, say: experts compute in their own, as in transformers
            x_TD = x_TD.to(self._dtype)
        if torch.is_grad_enabled() or is_transformed():
            layer = self.layers[moe_layer]
            trained = [p for p in layer.module.parameters() if p.requires_grad]
            out = FrozenExperts.apply(x_TD, weights_TK, ids_TK, self.serve_values, layer, self.host, *trained)
        else:
            out = self.serve_values(moe_layer, x_TD, ids_TK, weights_TK)
        return out.view(x.shape) if out.dtype is x.dtype else out.view(x.shape).to(x.dtype)

    def serve_values(
        self, moe_layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """A layer's output (T, D) without a graph for gradients, whatever modes of torch the caller is in."""
        if torch.is_inference_mode_enabled():
            # What is made here may live longer than the caller's mode, and must be writable outside it.
            with torch.inference_mode(False), torch.no_grad():
                return self.serve_values(moe_layer, x_TD, ids_TK, weights_TK)
        if torch.is_autocast_enabled(self._device_type):
            with torch.autocast(self._device_type, enabled=False):
                return self.serve_values(moe_layer, x_TD, ids_TK, weights_TK)
        if self.forced is not None and (self.captured is not None or not self.is_prefill):
            ids_TK = self.forced.ids_LTK[moe_layer]
            weights_TK = weights_TK.reshape(ids_TK.shape)
        if self.captured is not None:
            return self._serve_captured(moe_layer, x_TD, ids_TK, weights_TK)
        self._begin_work()
        ids_TK = ids_TK.to(torch.int64)
        out = self._serve_now(moe_layer, x_TD, ids_TK, weights_TK)
        if self.schedule_runner is not None:
            self.schedule_runner.observe(moe_layer, ids_TK)
        self._is_at_work = False
        return out

    def _serve_alone(
        self, moe_layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Serve a layer outside any forward pass of the model: on demand, and in nobody's recording."""
        self.is_prefill = True
        self.forget_unread()
        out = self.serve(moe_layer, x, ids, weights)
        self.read_routing()
        return out

    def _serve_captured(
        self, moe_layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        layer, slots = self.layers[moe_layer], self.weights[moe_layer]
        assert self.captured is not None
        return self.captured.layer(
            moe_layer,
            layer.num_experts,
            x_TD.contiguous(),
            ids_TK,
            weights_TK,
            layer.spec,
            slots,
            self.loader.pool,
            self.host.layers[moe_layer].rows,
        )

    def _serve_now(
        self, moe_layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        recorder = self.recorder
        timed = recorder is not None and recorder.timed
        if recorder is not None and timed:
            recorder.routed(moe_layer, self.device.mark(True))
        layer = self.layers[moe_layer]
        schedule_runner = None if self.is_prefill else self.schedule_runner
        if schedule_runner is None and self.needs_nobody(layer):
            try:
                return self._serve_unread(layer, x_TD, ids_TK, weights_TK, timed)
            except CannotLaunch as problem:
                self.use_reference(problem)
        host_ids = self.device.read(ids_TK)
        sums = self.weight_sums(layer, host_ids, weights_TK)
        predicted = None
        if schedule_runner is not None:
            predicted = schedule_runner.predict(moe_layer, x_TD, ids_TK, weights_TK)
        need, decision = self.find(layer, host_ids, sums, schedule_runner, predicted)
        here = need.num_hits + need.num_late
        num_load, on_cpu = need.num_misses if decision is None else int(decision.num_load), None
        if self.is_prefill and self.schedule_runner is not None:
            num_load = self.schedule_runner.copies_of_prompt(need, self.residency)
        cold = need.experts[here + num_load :]
        if self.schedule_runner is not None and len(cold):
            on_cpu = self.schedule_runner.submit(moe_layer, cold, host_ids, x_TD)
        served = need.without(len(cold))
        rounds = self.residency.rounds(served)
        is_sure = self.is_prefill and next_is_sure(need, layer.num_experts)
        following = self._following(moe_layer) if is_sure else None
        keep = NOTHING if decision is None else decision.keep
        work, num_computed = None, 0
        for act in walk(self.residency, served, rounds, following, keep):
            if act.what is What.COPY:
                self._load(act, timed)
                continue
            if work is None:
                work = self._begin(layer, need, rounds, x_TD, ids_TK, host_ids, cold)
                self._record_begin(layer, need, len(rounds), num_load, x_TD, host_ids, weights_TK, timed)
            num_computed += 1
            if schedule_runner is not None and decision is not None and num_computed == len(rounds):
                # All that is needed now has been issued, and is safe from what is wanted next.
                self.residency.protect(act.slots)
                self.recorded(schedule_runner.hold(moe_layer, self.residency, self.loader, timed))
            self._compute(layer, work, act, timed)
        assert work is not None, "a layer has a round at least"
        if schedule_runner is not None:
            self.residency.unprotect()
            self.recorded(schedule_runner.pump(self.loader, timed))
        if on_cpu is not None and self.schedule_runner is not None:
            self.schedule_runner.merge(on_cpu, layer.spec, work.out_PD, learns=not self.is_prefill)
            if recorder is not None and timed:
                recorder.merged(on_cpu, self.device.mark(True))
        return combine(work.out_PD, weights_TK, x_TD.dtype)

    # -- layers that miss nothing, whatever was chosen -------------------------------------------------------------

    def were_computed(self, unread: list[Unread]) -> None:
        """All layers of this forward pass were computed before the host knew; `read_routing` takes that down."""
        self._unread = unread

    def needs_nobody(self, layer: MoELayer) -> bool:
        """Whether a layer can be computed before the host knows its routing.

        Waiting for that is most of a short prompt's time when the slots have everything.
        """
        if not self.kernel.serves_unread or (self.recorder is not None and self.recorder.keeps_inputs):
            return False
        return self.residency.keeps(layer.moe_layer, layer.num_experts)

    def _serve_unread(
        self, layer: MoELayer, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, timed: bool
    ) -> torch.Tensor:
        moe_layer = layer.moe_layer
        version, row = int(self.residency.versions[moe_layer]), self.residency.row(moe_layer)
        slots = self.kernel.slots_on_device(moe_layer, row, version, x_TD.device)
        out_PD = self.kernel.run_unread(
            x_TD,
            ids_TK,
            layer.spec,
            self.weights[moe_layer],
            slots[: layer.num_experts],
        )
        if self.recorder is not None and timed:
            self.recorder.computed(moe_layer, self.device.mark(True))
        self._unread.append(Unread(moe_layer, ids_TK, weights_TK.detach()))
        return combine(out_PD, weights_TK, x_TD.dtype)

    def read_routing(self) -> None:
        """Take down what layers of this forward pass needed that were computed before the host knew."""
        unread, self._unread = self._unread, []
        if not unread:
            return
        all_ids = self.device.read(torch.cat([each.ids_TK.reshape(-1) for each in unread]))
        ends = np.cumsum([each.ids_TK.numel() for each in unread])
        for each, ids in zip(unread, np.split(all_ids, ends[:-1]), strict=True):
            layer, host_ids = self.layers[each.moe_layer], ids.reshape(each.ids_TK.shape)
            need, _ = self.find(layer, host_ids, self.weight_sums(layer, host_ids, each.weights_TK))
            if self.recorder is not None:
                self.recorder.need(need, 1, len(host_ids))
                self.recorder.routing(each.moe_layer, host_ids, each.weights_TK, None)

    def forget_unread(self) -> None:
        """A forward pass begins; what one that was interrupted left is nobody's."""
        self._unread = []

    def _begin(
        self,
        layer: MoELayer,
        need: LayerNeed,
        rounds: list[IntArray],
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        host_ids: np.ndarray,
        cold: IntArray,
    ) -> Work:
        """Call when the first round's slots are taken. `cold`: experts (n,) that the CPU computes."""
        row, version = self.residency.row(layer.moe_layer), int(self.residency.versions[layer.moe_layer])
        if len(cold) and (row[cold] >= 0).any():  # on their way, and not waited for
            row, version = row.copy(), -1
            row[cold] = -1
        work = Work(
            x_TD=x_TD,
            ids_TK=ids_TK.contiguous(),
            host_ids_TK=host_ids,
            need=need,
            num_experts=layer.num_experts,
            out_PD=self._pair_outputs(x_TD, need, host_ids.size, layer),
            num_rounds=len(rounds),
            slot_row=row,
            version=version,
        )
        self.kernel.prepare(work)
        return work

    def _record_begin(
        self,
        layer: MoELayer,
        need: LayerNeed,
        num_rounds: int,
        num_load: int,
        x_TD: torch.Tensor,
        host_ids: np.ndarray,
        weights_TK: torch.Tensor,
        timed: bool,
    ) -> None:
        if self.recorder is None:
            return
        self.recorder.need(need, num_rounds, x_TD.shape[0], need.num_misses - num_load)
        self.recorder.routing(layer.moe_layer, host_ids, weights_TK, x_TD)
        if timed:
            self.recorder.decided(layer.moe_layer, self.device.mark(True))

    def weight_sums(
        self, layer: MoELayer, host_ids: np.ndarray, weights: np.ndarray | torch.Tensor
    ) -> FloatArray | None:
        """Each expert's sum of router weights (E,), if the cache policy looks at it."""
        if self.residency.policy.name != "score":
            return None
        values = self.device.read(weights.float()) if isinstance(weights, torch.Tensor) else weights
        flat = host_ids.ravel()
        valid = (flat >= 0) & (flat < layer.num_experts)
        return np.bincount(flat[valid], values.ravel()[valid], layer.num_experts).astype(np.float64)

    def find(
        self,
        layer: MoELayer,
        host_ids: np.ndarray,
        sums: FloatArray | None,
        schedule_runner: ScheduleRunner | None = None,
        predicted: Predicted | None = None,
    ) -> tuple[LayerNeed, Decision | None]:
        """What a layer needs and where it is, and what a schedule decides; the cache policy learns of it."""
        experts, counts = distinct(host_ids, layer.num_experts)
        if self.residency.in_flight.any():
            self.loader.poll()
        weights = counts.astype(np.float64) if sums is None else sums[experts]
        decision = None
        if schedule_runner is None:
            self.residency.saw_prompt(layer.moe_layer, host_ids)
            need = self.residency.need(layer.moe_layer, experts, counts, weights)
        else:
            decision, num_prefetched = schedule_runner.decide(
                layer.moe_layer, experts, counts, weights, self.residency, predicted
            )
            need = LayerNeed.of(layer.moe_layer, decision.need, num_prefetched)
        self.needs[NeedOutcome.HIT] += need.num_hits
        self.needs[NeedOutcome.LATE] += need.num_late
        self.needs[NeedOutcome.MISS] += need.num_misses
        return need, decision

    def count(self, needs: np.ndarray) -> None:
        """Count what a step from a graph needed: (L, 2) needed and missing experts."""
        needed, missing = needs.sum(axis=0).tolist()
        self.needs[NeedOutcome.HIT] += needed - missing
        self.needs[NeedOutcome.MISS] += missing

    def _pair_outputs(
        self, x_TD: torch.Tensor, need: LayerNeed, num_pairs: int, layer: MoELayer
    ) -> torch.Tensor:
        _, _, width = self.weights[layer.moe_layer].widths(layer.spec.is_transposed)
        # Ids of no expert (sentinels) contribute nothing, so their rows must be zero.
        make = x_TD.new_empty if int(need.tokens.sum()) == num_pairs else x_TD.new_zeros
        return make((num_pairs, width))

    def _following(self, moe_layer: int) -> tuple[int, int] | None:
        """The next MoE layer and its number of experts."""
        if moe_layer + 1 == len(self.layers):
            return None
        return moe_layer + 1, self.layers[moe_layer + 1].num_experts

    def _load(self, act: Act, timed: bool) -> None:
        self.recorded(self.loader.load(act.moe_layer, act.experts, act.slots, act.reason, timed))
        if self.schedule_runner is not None:
            self.schedule_runner.issued(len(act.experts))  # the link is one, whoever uses it

    def recorded(self, transfers: list[Transfer]) -> None:
        """Take down copies that were issued."""
        if self.recorder is not None and transfers:
            self.recorder.transfers(transfers)

    def _compute(self, layer: MoELayer, work: Work, act: Act, timed: bool) -> None:
        moe_layer, recorder = layer.moe_layer, self.recorder
        if len(act.experts) == 0:  # all of the layer's experts are computed on the CPU
            return
        if self.loader.wait(act.slots) and recorder is not None and timed:
            recorder.waited(moe_layer, self.device.mark(True))
        arguments = work, layer.spec, self.weights[moe_layer], act.experts, act.slots
        try:
            self.kernel.run(*arguments)
        except CannotLaunch as problem:
            self.use_reference(problem)
            self.kernel.prepare(work)
            self.kernel.run(*arguments)
        done = self.device.mark(timed)
        self.loader.release(act.slots, done)
        if recorder is not None and timed:
            recorder.computed(moe_layer, done)

    def use_reference(self, problem: CannotLaunch) -> None:
        """Compute by plain torch from now on; steps from a graph have kernels of their own."""
        self.kernel_problem = str(problem)
        self.kernel = TorchKernel()
        warnings.warn(
            f"experts are computed by plain torch, which is slower, wherever a step runs layer by layer: {problem}",
            stacklevel=2,
        )
