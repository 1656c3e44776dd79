"""Serve MoE layers from slots: read the routing, copy what is missing, compute, release.

Per MoE layer: the host reads the chosen experts (one small copy), the residency table says where they are, misses
are copied into slots on the H2D lane, and the compute lane waits for exactly those copies. If a layer needs more
experts than there are slots, it is served in rounds; a token's output is summed at the end, in one order. While a
decode step is captured, the layer's launches go into the graph instead (`kernels.captured`).
"""

from typing import TYPE_CHECKING

import numpy as np
import torch

from .cache import CachePolicy, FloatArray
from .core import MoEShape, Need, Reason
from .device import Device
from .hf import MoELayer
from .host_pool import HostPool
from .kernels import LayerWeights, Work, combine, make_kernel
from .loader import Loader
from .recorder import Recorder
from .residency import ROUND_EXPERTS, IntArray, LayerNeed, ResidencyTable, distinct

if TYPE_CHECKING:
    from .kernels.captured import CapturedStep


#: When a layer needed at least this share of its experts, as a long prompt's do, the next one will too: its first
#: experts are copied ahead, so that the link does not wait for its router.
STREAM_SHARE = 0.95
#: How many: two rounds, which keep the link busy for longer than the layers around the experts take.
STREAM_EXPERTS = 2 * ROUND_EXPERTS


class Serving:
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
        captured: where launches go while a decode step is captured.
        needs: hits, late ones and misses so far, by `Need`.
    """

    host: HostPool
    residency: ResidencyTable
    loader: Loader

    def __init__(
        self, device: Device, layers: list[MoELayer], shape: MoEShape, kernels: str, dtype: torch.dtype
    ) -> None:
        self.device, self.layers, self.shape = device, layers, shape
        self._kernels, self._dtype = kernels, dtype
        self.weights: list[LayerWeights] = []
        self.recorder: Recorder | None = None
        self.captured: CapturedStep | None = None
        self.needs = dict.fromkeys(Need, 0)
        self._serving = False

    def open_slots(self, num_slots: int, policy: CachePolicy) -> None:
        """Take memory for slots; all of them are free."""
        # Kernels keep copies of the residency table's rows, so a new table comes with a new kernel.
        self._kernel, _ = make_kernel(self._kernels, self.device.kind, self._dtype)
        self.residency = ResidencyTable(self.shape, num_slots, policy)
        self.loader = Loader(self.device, self.host, self.residency, self.shape.row_bytes)
        self.weights = [self._layer_weights(layer) for layer in self.layers]

    def close_slots(self) -> None:
        """Give the slots' memory back; both lanes must be idle."""
        self.weights = []
        self.loader.close()

    def _layer_weights(self, layer: MoELayer) -> LayerWeights:
        spec, pool = layer.spec, self.loader.pool
        return LayerWeights(
            up=layer.layout.view(pool, spec.up),
            down=layer.layout.view(pool, spec.down),
            up_bias=layer.layout.view(pool, spec.up_bias) if spec.up_bias else None,
            down_bias=layer.layout.view(pool, spec.down_bias) if spec.down_bias else None,
        )

    def clear(self) -> None:
        """Empty all slots and forget what the cache policy learned; both lanes must be idle."""
        self.residency.clear()
        self.residency.policy.reset()
        self.loader.clear()

    def recover(self) -> None:
        """Make the lanes usable after an interrupt or a failed copy; the slots are cold afterwards."""
        self.device.recover()
        self.clear()
        self._serving = False
        self.captured = None

    # -- one MoE layer -----------------------------------------------------------------------------------------

    def serve(
        self, moe_layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """What stands in for the experts' forward of every MoE layer: x (..., D), ids and weights (T, K)."""
        if x.numel() == 0:  # image tokens only, in a family with experts of its own for them
            return torch.zeros_like(x)
        x_TD = x.reshape(-1, x.shape[-1])
        ids_TK = ids.reshape(x_TD.shape[0], -1)
        weights_TK = weights.reshape(ids_TK.shape)
        if self.captured is not None:
            return self._serve_captured(moe_layer, x_TD, ids_TK, weights_TK).view(x.shape)
        if self._serving:  # an interrupt or an error ended the last call half-way
            self.recover()
        self._serving = True
        out = self._serve_now(moe_layer, x_TD, ids_TK.to(torch.int64), weights_TK)
        self._serving = False
        return out.view(x.shape)

    def _serve_captured(
        self, moe_layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        assert self.captured is not None
        layer = self.layers[moe_layer]
        return self.captured.layer(
            moe_layer,
            layer.num_experts,
            x_TD.contiguous(),
            ids_TK,
            weights_TK,
            layer.spec,
            self.weights[moe_layer],
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
        host_ids = self.device.read(ids_TK)
        layer = self.layers[moe_layer]
        need = self.find(layer, host_ids, self.weight_sums(layer, host_ids, weights_TK))
        rounds = self.residency.rounds(need)
        if need.num_misses:
            found = need.experts[: need.num_hits + need.num_late]
            self.residency.protect(self.residency.slots_for(moe_layer, found))
            self._issue(moe_layer, rounds[0], timed)
        work = Work(
            x_TD=x_TD,
            ids_TK=ids_TK.contiguous(),
            host_ids_TK=host_ids,
            need=need,
            num_experts=layer.num_experts,
            out_PD=self._pair_outputs(x_TD, need, host_ids.size, layer),
            num_rounds=len(rounds),
            slot_row=self.residency.row(moe_layer),
            version=int(self.residency.versions[moe_layer]),
        )
        self._kernel.prepare(work)
        if recorder is not None:
            recorder.need(need, len(rounds), x_TD.shape[0])
            recorder.routing(moe_layer, host_ids, weights_TK, x_TD)
            if timed:
                recorder.decided(moe_layer, self.device.mark(True))
        for i, experts in enumerate(rounds):
            following = rounds[i + 1] if i + 1 < len(rounds) else None
            if following is None:
                self._stream_ahead(layer, need, experts, timed)
            self._serve_round(layer, work, experts, following, timed)
        if need.num_misses:
            self.residency.unprotect()
        return combine(work.out_PD, weights_TK, x_TD.dtype)

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

    def find(self, layer: MoELayer, host_ids: np.ndarray, sums: FloatArray | None) -> LayerNeed:
        """What a layer needs and where it is; the cache policy learns of it."""
        experts, counts = distinct(host_ids, layer.num_experts)
        if self.residency.in_flight.any():
            self.loader.poll()
        weights = counts.astype(np.float64) if sums is None else sums[experts]
        need = self.residency.need(layer.moe_layer, experts, counts, weights)
        self.needs[Need.HIT] += need.num_hits
        self.needs[Need.LATE] += need.num_late
        self.needs[Need.MISS] += need.num_misses
        return need

    def count(self, needs: np.ndarray) -> None:
        """Count what a step from a graph needed: (L, 2) needed and missing experts."""
        needed, missing = needs.sum(axis=0).tolist()
        self.needs[Need.HIT] += needed - missing
        self.needs[Need.MISS] += missing

    def _pair_outputs(
        self, x_TD: torch.Tensor, need: LayerNeed, num_pairs: int, layer: MoELayer
    ) -> torch.Tensor:
        down = self.weights[layer.moe_layer].down
        width = down.shape[2] if layer.spec.is_transposed else down.shape[1]
        # Ids of no expert (sentinels) contribute nothing, so their rows must be zero.
        make = x_TD.new_empty if int(need.tokens.sum()) == num_pairs else x_TD.new_zeros
        return make((num_pairs, width))

    def _issue(self, moe_layer: int, experts: IntArray, timed: bool) -> None:
        """Copy those of a round's experts that have no slot yet; all of the round's slots are protected then."""
        missing = experts[self.residency.slots_for(moe_layer, experts) < 0]
        if len(missing) == 0:
            return
        slots = self.residency.take(moe_layer, missing)
        self.residency.protect(slots)
        transfers = self.loader.load(moe_layer, missing, slots, Reason.ON_DEMAND, timed)
        if self.recorder is not None:
            self.recorder.transfers(transfers)

    def _stream_ahead(self, layer: MoELayer, need: LayerNeed, experts: IntArray, timed: bool) -> None:
        """Copy experts of the next layer behind this layer's own, if it is all but certain to need them.

        Args:
            experts: of this layer's last round, which are still to be computed.
        """
        if layer.moe_layer + 1 == len(self.layers) or len(need.experts) < STREAM_SHARE * layer.num_experts:
            return
        following = self.layers[layer.moe_layer + 1]
        row = self.residency.row(following.moe_layer)[: following.num_experts]
        missing, resident = np.flatnonzero(row < 0), row[row >= 0]
        count = min(len(missing), STREAM_EXPERTS, self.residency.num_slots // 4)
        # Needed now (a layer that missed nothing has not protected them), or next, however long ago they were used.
        wanted = np.concatenate([self.residency.slots_for(layer.moe_layer, experts), resident])
        free = wanted[~self.residency.is_protected(wanted)]
        self.residency.protect(free)
        if count and self.residency.can_take(count):
            slots = self.residency.take(following.moe_layer, missing[:count])
            transfers = self.loader.load(following.moe_layer, missing[:count], slots, Reason.PREFETCH, timed)
            if self.recorder is not None:
                self.recorder.transfers(transfers)
        self.residency.unprotect(free)

    def _serve_round(
        self, layer: MoELayer, work: Work, experts: IntArray, following: IntArray | None, timed: bool
    ) -> None:
        moe_layer, recorder = layer.moe_layer, self.recorder
        slots = self.residency.slots_for(moe_layer, experts)
        # The next round's copies are issued before this round is computed wherever there is room for both.
        issued = following is None or self.residency.can_take(len(following))
        if following is not None and issued:
            self._issue(moe_layer, following, timed)
        if self.loader.wait(slots) and recorder is not None and timed:
            recorder.waited(moe_layer, self.device.mark(True))
        self._kernel.run(work, layer.spec, self.weights[moe_layer], experts, slots)
        done = self.device.mark(timed)
        self.loader.release(slots, done)
        if work.num_rounds > 1:
            self.residency.unprotect(slots)
        if recorder is not None and timed:
            recorder.computed(moe_layer, done)
        if following is not None and not issued:
            self._issue(moe_layer, following, timed)
