"""Buffers and launches of a decode step that runs from one CUDA graph (see `graph_kernels`).

Knows the GPU's copy of the residency table and the messages between GPU and host, nothing of models.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from ..cache.residency import ResidencyTable
from ..core.types import MoEShape
from . import graph_kernels
from .base import ExpertsSpec, LayerWeights, StepLog
from .gate_kernel import Gates
from .launch import launch
from .packed_linear import PackedLinear
from .triton_experts import Linear, is_tiled, linear_of, tune_pairs

#: Steps whose messages are kept: the GPU runs at most one ahead of the host.
RING = 4
#: Programs and words (int64) per program of `fetch`: measured in benchmarks/overhead.py, see docs/log/engine.md.
FETCH_PROGRAMS, FETCH_WORDS = 64, 2048
BLOCK_M = 16
#: Copies on the link at once are fewer.
COPY_NUMBERS = 4096
#: (moe_layer, x (T, D), ids (T, K), weights (T, K)) -> (d, 2, E): expected tokens and probability of use.
ScoreFunction = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None]


class HostOptions(NamedTuple):
    """What the host adds to a step that it decides: it answers layers, and may compute and predict."""

    lookahead: int  # layers ahead that predictions are made for; 0 for none
    scores: ScoreFunction | None  # None: none are made, or they are made beside the graph
    has_cpu: bool
    width: int  # D
    dtype: torch.dtype  # of x
    is_predicted_aside: bool = False  # predictions are made on the host, from what each layer sends there

    @property
    def reads_inputs(self) -> bool:
        """Whether the host gets the routers' inputs."""
        return self.has_cpu or self.is_predicted_aside


class Messages(NamedTuple):
    """Messages of a step under a schedule, in mapped memory; see `graph_kernels`."""

    ask: NDArray[np.int64]  # (L, P)
    scores: NDArray[np.int64]  # (L, d * 2 * E)
    answers: NDArray[np.int64]  # (L, head + E)
    shown: NDArray[np.int32]  # (L * E,) slots of experts whose bytes are there, -1 for all others
    looked: NDArray[np.int64]  # (L,) number of the last step that has looked at a layer's row of it
    served: NDArray[np.int32]  # (1,) steps of which all layers are served
    numbers: NDArray[np.int32]  # (COPY_NUMBERS,)
    landed: int  # address on the GPU
    head: int


class OrderMessages(NamedTuple):
    """Messages of a step whose copies the GPU orders, in mapped memory; see `graph_kernels._plan`."""

    orders: NDArray[np.int64]  # (L, 1 + n) step << 48 | how many, then step << 48 | expert << 24 | slot
    ack_sources: NDArray[np.int32]  # (L,) what is copied to `ack` behind a layer's bytes
    ack: int  # address on the GPU of (L,) int32
    served: NDArray[np.int32]  # as in `Messages`


class DeviceTable:
    """The GPU's copy of the residency table.

    Args:
        shape, num_slots: as the table's.
        device: the GPU.

    Attributes:
        looks, side: streams on which a step is captured beside its layers: what it reads from the host, and its
            predictions; None without a GPU.
    """

    def __init__(self, shape: MoEShape, num_slots: int, device: torch.device) -> None:
        self.shape, self.num_slots = shape, num_slots
        self.slot_of = torch.empty(shape.total_experts, dtype=torch.int32, device=device)
        self.key_of = torch.empty(num_slots, dtype=torch.int32, device=device)
        self.scores = torch.empty(shape.total_experts, dtype=torch.float64, device=device)
        self.tick = torch.zeros(1, dtype=torch.int64, device=device)
        self.gates = Gates()
        # Of all steps: torch hands out 32 streams in turn, so each step's own would now and then be the one that the
        # step is captured on, which makes the branch a part of the main one; and cuBLAS keeps a workspace for each.
        self.looks, self.side = _branch(device), _branch(device)

    def new_step(
        self,
        num_tokens: int,
        top_k: int,
        *,
        policy: int,
        orders: bool,
        timed: bool,
        scheduled: HostOptions | None = None,
        keeps: tuple[int, torch.dtype] | None = None,
    ) -> "GraphBuffers":
        """Buffers of a step that goes by this table; see `GraphBuffers`."""
        return GraphBuffers(
            self,
            num_tokens,
            top_k,
            policy=policy,
            orders=orders,
            timed=timed,
            scheduled=scheduled,
            keeps=keeps,
        )

    def take(self, table: ResidencyTable) -> None:
        """Copy the host's table here."""
        self.slot_of.copy_(torch.from_numpy(table.slot_of))
        self.key_of.copy_(torch.from_numpy(table.key_of))
        # A policy that only the host runs may keep more behind its scores.
        self.scores.copy_(torch.from_numpy(table.policy.scores[: len(self.scores)]))
        self.tick.fill_(table.policy.tick)

    def give(self, table: ResidencyTable) -> None:
        """Bring the host's table up to date."""
        slots, keys = self.slot_of.cpu().numpy().astype(np.int64), self.key_of.cpu().numpy().astype(np.int64)
        table.adopt(slots, keys, self.scores.cpu().numpy(), int(self.tick))


class GraphBuffers:
    """All that a captured step writes, and the launches of its MoE layers.

    Args:
        table: shared by all steps of an engine.
        num_tokens, top_k: T and K of each layer.
        policy: number in `CachePolicy.kind`, or `graph_kernels.HOST` when the host decides, by `scheduled`.
        orders: the host hands the GPU's decisions to the copy engine; if not, the GPU fetches misses itself.
        timed: write stamps.
        scheduled: how the host takes part; None where the GPU decides.
        keeps: width D and dtype of the routers' inputs, if the log is to have them.
    """

    def __init__(
        self,
        table: DeviceTable,
        num_tokens: int,
        top_k: int,
        *,
        policy: int,
        orders: bool,
        timed: bool,
        scheduled: HostOptions | None = None,
        keeps: tuple[int, torch.dtype] | None = None,
    ) -> None:
        shape, device = table.shape, table.slot_of.device
        self.table, self.num_tokens, self.top_k = table, num_tokens, top_k
        self.policy, self.orders, self._timed, self.scheduled = policy, orders, timed, scheduled
        self.num_pairs = num_tokens * top_k
        L, P, most = shape.num_layers, self.num_pairs, min(self.num_pairs, shape.num_experts)
        self.launched = 0  # steps since `restart`; the next one's number
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self._log = self._make_log(L, P, device)
        self._ring = _mapped((RING, self._log.numel()), torch.int32, device)
        self._tokens_ring = _mapped((RING, num_tokens), torch.int64, device)
        self._inputs_ring = (
            None if keeps is None else _mapped((RING, L, num_tokens, keeps[0]), keeps[1], device)
        )
        self._fetch_slot = torch.zeros(most, dtype=torch.int32, device=device)
        self._mark = torch.zeros(_power_of_2(shape.num_experts + 1), dtype=torch.int32, device=device)
        # Messages to the host and back, where the host serves misses.
        self._ask = _mapped((L, P), torch.int64, device)
        self._orders = _mapped((L, 1 + most), torch.int64, device)
        self._answers = _mapped((L, graph_kernels.HEAD + shape.num_experts), torch.int64, device)
        self._shown = _mapped((shape.total_experts,), torch.int32, device).fill_(-1)
        self._looked = _mapped((L,), torch.int64, device)
        self._served = _mapped((1,), torch.int32, device)
        self._on_cpu = torch.zeros(L, dtype=torch.int32, device=device)
        # What is read from the host beside the layers. Not on the predictions' branch, which may be busy.
        has_host = scheduled is not None or orders
        self._looks = table.looks if has_host else None
        self._ack = torch.zeros(L, dtype=torch.int32, device=device)
        self._ack_sources = _mapped((L,), torch.int32, device)
        # Host views.
        self._asked = self._ask.numpy()
        self._ordered = self._orders.numpy()
        self._answer_rows = self._answers.numpy()
        self._make_lanes(L, P, device)
        self._host_ring = self._ring.numpy()
        self._host_tokens = self._tokens_ring.numpy()
        # Tiles, when an expert has several pairs on average.
        self._tiles = is_tiled(P, shape.num_experts)
        self._most_blocks = min(P, shape.num_experts + P // BLOCK_M)
        self._order = torch.zeros(P, dtype=torch.int32, device=device)
        self._blocks = torch.zeros((self._most_blocks, 3), dtype=torch.int32, device=device)
        self._first = torch.zeros_like(self._mark)

    def _make_lanes(self, L: int, P: int, device: torch.device) -> None:
        """Messages of a schedule: router inputs and predictions to the host, the CPU's outputs back."""
        way, E = self.scheduled, self.table.shape.num_experts
        if way is None:
            return
        T = self.num_tokens
        # Predictions are made beside the layer, not in its way.
        self._side = self.table.side if way.scores is not None else None
        self._read_aside: list[torch.Tensor] = []
        self._landed = torch.zeros(1, dtype=torch.int32, device=device)
        numbers = _mapped((COPY_NUMBERS,), torch.int32, device)
        self._numbers, self._number_words = numbers.numpy(), numbers.split(1)
        self._scores = _mapped((L, way.lookahead * 2 * E), torch.int64, device)
        self._scored = self._scores.numpy()
        if way.reads_inputs:
            # By layer, as views made once: the host hands them out while the GPU waits.
            self.inputs = _mapped((L, T, way.width), way.dtype, device).unbind(0)
        if way.has_cpu:
            self.cpu_pairs = _mapped((L, P, way.width), way.dtype, device).unbind(0)
            self.cpu_flags = _mapped((L,), torch.int32, device)
            self._cpu_flag_words = self.cpu_flags.split(1)

    def _make_log(self, L: int, P: int, device: torch.device) -> torch.Tensor:
        M = min(P, self.table.shape.num_experts)
        sizes = {
            "stamps": 2 * (L * graph_kernels.NUM_STAMPS + 2),
            "needs": 2 * L,
            "fetched": L * M,
            "ids": L * P,
            "weights": L * P,
        }
        log = torch.zeros(sum(sizes.values()) + sum(sizes.values()) % 2, dtype=torch.int32, device=device)
        parts = dict(zip(sizes, log[: sum(sizes.values())].split(list(sizes.values())), strict=True))
        self._stamps = parts["stamps"].view(torch.int64)
        self._needs = parts["needs"].view(L, 2)
        self._fetched = parts["fetched"].view(L, M).fill_(-1)
        self._ids = parts["ids"].view(L, P)
        self._weights = parts["weights"].view(torch.float32).view(L, P)
        self._sizes = sizes
        return log

    # -- launches, while the step is captured ------------------------------------------------------------------

    def begin(self) -> None:
        """First launch of a step."""
        if self._timed:
            launch(graph_kernels._stamp, (1,), self._stamps[-2:])
        if self.scheduled is None and not self.orders:
            return
        with self._beside():
            launch(graph_kernels._await_served, (1,), self._served, self.step, num_warps=1)
            self._look(0)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Launch what is read from the host on a branch of the graph, which the next layer waits for."""
        if self._looks is None:
            yield
            return
        self._looks.wait_stream(torch.cuda.current_stream(self._looks.device))
        with torch.cuda.stream(self._looks):
            yield

    def _look(self, moe_layer: int) -> None:
        """Read what a coming layer will find."""
        if self.scheduled is None or moe_layer >= self.table.shape.num_layers:
            return
        E = self.table.shape.num_experts
        row = slice(moe_layer * E, (moe_layer + 1) * E)
        launch(
            graph_kernels._look, (1,),
            self._shown[row], self._looked[moe_layer:], self.table.slot_of[row], self.step, E,
            FENCE=self.step.is_cuda, EXPERTS=_power_of_2(E), num_warps=1,
        )  # fmt: skip

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
        ids = ids_TK.reshape(-1).to(torch.int64)  # which routers give: no launch
        weights_TK = weights_TK.contiguous()
        way = self.scheduled
        has_cpu = way is not None and way.has_cpu
        if self._looks is not None:
            torch.cuda.current_stream(self._looks.device).wait_stream(self._looks)
        if self._inputs_ring is not None:
            graph_kernels._keep_inputs[(triton.cdiv(x_TD.numel(), 1024),)](
                x_TD, self._inputs_ring[0, moe_layer], self.step, x_TD.numel(), self._inputs_ring.stride(0), RING=RING,
                BLOCK=1024,
            )  # fmt: skip
        if way is not None and way.reads_inputs:
            launch(
                graph_kernels._to_host,
                (triton.cdiv(x_TD.numel(), 1024),),
                x_TD,
                self.inputs[moe_layer],
                x_TD.numel(),
                BLOCK=1024,
            )
        self._plan(moe_layer, num_experts, ids, weights_TK)
        if way is not None and way.scores is not None:
            self._predict(way.scores, moe_layer, x_TD, ids_TK, weights_TK)
        first = moe_layer * self.table.shape.num_experts
        slot_of = self.table.slot_of[first : first + num_experts]
        stamps = self._stamps[moe_layer * graph_kernels.NUM_STAMPS :]
        if way is not None:
            launch(
                graph_kernels._await_answer, (1,),
                self._needs[moe_layer], self.step, self._landed, self._answers[moe_layer], slot_of,
                self._on_cpu[moe_layer:], stamps, num_experts, WORDS=_power_of_2(graph_kernels.HEAD + num_experts),
                TIMED=self._timed, num_warps=1,
            )  # fmt: skip
        elif self.orders:
            launch(
                graph_kernels._wait,
                (1,),
                self._needs[moe_layer],
                self.step,
                self._ack[moe_layer : moe_layer + 1],
                stamps,
                TIMED=self._timed,
                num_warps=1,
            )
        else:
            launch(
                graph_kernels.fetch, (FETCH_PROGRAMS,),
                host_rows.view(torch.int64), pool.view(torch.int64), self._needs[moe_layer], self._fetched[moe_layer],
                self._fetch_slot, stamps, host_rows.shape[1] // 8, pool.shape[1] // 8, BLOCK=FETCH_WORDS,
                TIMED=self._timed, num_warps=8,
            )  # fmt: skip
        y_PD = self.experts(num_experts, x_TD, ids, slot_of, spec, slots)
        if has_cpu:
            launch(
                graph_kernels._await_cpu,
                (1,),
                self._on_cpu[moe_layer:],
                self.step,
                self.cpu_flags[moe_layer:],
                stamps,
                TIMED=self._timed,
                num_warps=1,
            )
        if way is not None:
            # Not before this layer is decided: what the host copies for it may take the next layer's slots. As late as
            # the round trip allows: what is shown behind it is asked for.
            with self._beside():
                self._look(moe_layer + 1)
        width = y_PD.shape[1]
        out = torch.empty((self.num_tokens, width), dtype=x_TD.dtype, device=x_TD.device)
        block = min(512, _power_of_2(width))
        launch(
            graph_kernels._combine, (self.num_tokens, triton.cdiv(width, block)),
            y_PD, weights_TK, ids, out, stamps, slot_of, self.cpu_pairs[moe_layer] if has_cpu else y_PD, width,
            num_experts, TOP_K=self.top_k, ROUNDED=weights_TK.dtype == y_PD.dtype, CPU=has_cpu, BLOCK=block,
            TIMED=self._timed,
        )  # fmt: skip
        return out

    def _predict(
        self,
        function: ScoreFunction,
        moe_layer: int,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> None:
        """Predictions go to the host, on a branch of the graph that only the step's end waits for."""
        if self._side is None:
            self._publish_scores(moe_layer, function(moe_layer, x_TD, ids_TK, weights_TK))
            return
        # Nobody may write there before the branch has read: memory is handed out by the main branch's order.
        self._read_aside += [x_TD, ids_TK, weights_TK]
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        with torch.cuda.stream(self._side):
            self._publish_scores(moe_layer, function(moe_layer, x_TD, ids_TK, weights_TK))

    def _publish_scores(self, moe_layer: int, scores: torch.Tensor | None) -> None:
        assert scores is not None, "a schedule that predicts has a predictor"
        flat = scores.reshape(-1).contiguous()
        assert flat.numel() == self._scores.shape[1], (
            f"{flat.numel()} predictions, {self._scores.shape[1]} expected"
        )
        launch(
            graph_kernels._publish_scores,
            (triton.cdiv(flat.numel(), 1024),),
            flat,
            self._scores[moe_layer],
            self.step,
            flat.numel(),
            BLOCK=1024,
        )

    def _plan(self, moe_layer: int, num_experts: int, ids: torch.Tensor, weights_TK: torch.Tensor) -> None:
        shape = self.table.shape
        launch(
            graph_kernels._plan, (1,),
            ids, weights_TK, self.table.slot_of, self.table.key_of, self.table.scores, self.table.tick, self.step,
            self._ids[moe_layer], self._weights[moe_layer], self._needs[moe_layer],
            self._stamps[moe_layer * graph_kernels.NUM_STAMPS :], self._ask[moe_layer], self._orders[moe_layer],
            self._fetched[moe_layer], self._fetch_slot, self._mark, moe_layer * shape.num_experts, self.num_pairs,
            num_experts, self.table.num_slots,
            # At least as many pairs as threads: histograms of fewer elements are not supported everywhere.
            POLICY=self.policy, ORDERS=self.orders,
            FENCE=ids.is_cuda, ALWAYS=self.scheduled is not None and self.scheduled.is_predicted_aside,
            PAIRS=max(128, _power_of_2(self.num_pairs)),
            EXPERTS=len(self._mark), SLOTS=_power_of_2(self.table.num_slots), TIMED=self._timed,
            num_warps=4 if self.table.num_slots <= 2048 else 16,
        )  # fmt: skip

    def experts(
        self,
        num_experts: int,
        x_TD: torch.Tensor,
        ids: torch.Tensor,
        slot_of: torch.Tensor,
        spec: ExpertsSpec,
        slots: LayerWeights,
    ) -> torch.Tensor:
        """Outputs of all pairs (P, D) whose experts have a slot; ids (P,) int64, slot_of (E,) int32."""
        if self._tiles:
            launch(
                graph_kernels.align, (1,),
                ids, slot_of, self._order, self._first, self._blocks, self.num_pairs, num_experts, self._most_blocks,
                PAIRS=max(128, _power_of_2(self.num_pairs)), EXPERTS=len(self._first),
                BLOCKS=_power_of_2(self._most_blocks), BLOCK_M=BLOCK_M, num_warps=4,
            )  # fmt: skip
        _, up_dim, out_dim = slots.widths(spec.is_transposed)
        h = x_TD.new_empty((self.num_pairs, up_dim))
        up = linear_of(x_TD, self.top_k, slots.up, slots.up_bias, h, spec.is_transposed)
        self._linear(up, ids, slot_of, num_experts)
        act = self.table.gates.apply(spec, h, slots.inner_width(spec.is_transposed))
        y = x_TD.new_empty((self.num_pairs, out_dim))
        down = linear_of(act, 1, slots.down, slots.down_bias, y, spec.is_transposed)
        self._linear(down, ids, slot_of, num_experts)
        return y if spec.post_norm is None else spec.post_norm(y)

    def _linear(
        self, linear: Linear | PackedLinear, ids: torch.Tensor, slot_of: torch.Tensor, num_experts: int
    ) -> None:
        if self._tiles:
            linear.tiles(self._order, self._blocks, self._most_blocks, BLOCK_M)
        else:
            linear.pairs(ids, slot_of, num_experts)

    def tune(self, x_TD: torch.Tensor, spec: ExpertsSpec, slots: LayerWeights, num_experts: int) -> None:
        """Tune the pair kernels for these shapes; the slots' contents do not matter."""
        if self._tiles:
            return
        P, device = self.num_pairs, x_TD.device
        ids = torch.arange(P, device=device) % num_experts
        slot_of = (torch.arange(num_experts, device=device) % self.table.num_slots).to(torch.int32)
        _, up_dim, out_dim = slots.widths(spec.is_transposed)
        h = x_TD.new_empty((P, up_dim))
        up = linear_of(x_TD, self.top_k, slots.up, slots.up_bias, h, spec.is_transposed)
        tune_pairs(up, ids, slot_of, num_experts)
        act, y = spec.gate(h).contiguous(), x_TD.new_empty((P, out_dim))
        tune_pairs(
            linear_of(act, 1, slots.down, slots.down_bias, y, spec.is_transposed), ids, slot_of, num_experts
        )

    def finish(self, tokens: torch.Tensor) -> None:
        """Last launches of a step: the log and the chosen tokens (T,) go to the host."""
        if self.scheduled is not None and self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)
            self._read_aside.clear()
        if self._timed:
            launch(graph_kernels._stamp, (1,), self._stamps[-1:])
        words = self._log.numel()
        launch(
            graph_kernels._publish,
            (triton.cdiv(words, 1024),),
            self._log,
            self._ring,
            self.step,
            words,
            RING=RING,
            BLOCK=1024,
        )
        launch(
            graph_kernels._finish,
            (1,),
            tokens,
            self._tokens_ring,
            self.step,
            self.num_tokens,
            RING=RING,
            BLOCK=_power_of_2(self.num_tokens),
        )

    # -- the host's side ---------------------------------------------------------------------------------------

    def stamp(self) -> torch.Tensor:
        """The GPU's clock now, nanoseconds, (1,)."""
        now = torch.zeros(1, dtype=torch.int64, device=self.step.device)
        launch(graph_kernels._stamp, (1,), now)
        return now

    def restart(self) -> None:
        """Before a run: number steps from 0, forget old messages. The GPU must be idle."""
        self.launched = 0
        self.step.zero_()
        self._ack.zero_()
        self._ask.zero_()
        self._orders.zero_()
        self._tokens_ring.zero_()
        self._answers.zero_()
        self._shown.fill_(-1)
        self._looked.zero_()
        self._served.zero_()
        if self.scheduled is not None:
            self._scores.zero_()
            self._landed.zero_()
        if self.scheduled is not None and self.scheduled.has_cpu:
            self.cpu_flags.zero_()

    @staticmethod
    def number(step: int) -> int:
        """A step's number in messages (`graph_kernels.sequence_of`)."""
        return step % graph_kernels.NUMBERS + 1

    def reply(
        self, moe_layer: int, step: int, slot_of_E: NDArray[np.integer], last_copy: int, num_on_cpu: int
    ) -> None:
        """Scheduled: let a layer go on.

        Args:
            slot_of_E: (E,) the layer's row of the slot table; -1 for experts that the CPU computes. Of those that it is
                too short for, none.
            last_copy: number of the copy whose bytes it must wait for, see `landing`; 0: it has all it needs.
            num_on_cpu: its experts that the CPU computes: `cpu_flag` must be set when that is done.
        """
        message, head = self._answer_rows[moe_layer], graph_kernels.HEAD
        number = step + 1 << 32
        values = np.full(len(message), -1)
        values[:head] = last_copy, num_on_cpu
        values[head : head + len(slot_of_E)] = slot_of_E
        message[:] = number | (values & 0xFFFFFFFF)

    def served(self, steps: int) -> None:
        """So many steps are served: the next one may ask."""
        self._served.fill_(steps)

    def messages(self) -> Messages:
        """Scheduled: where messages lie, as the host sees them."""
        return Messages(
            self._asked,
            self._scored,
            self._answer_rows,
            self._shown.numpy(),
            self._looked.numpy(),
            self._served.numpy(),
            self._numbers,
            self._landed.data_ptr(),
            graph_kernels.HEAD,
        )

    def landing(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scheduled: the (target, source) of the copy that must follow the bytes of copy `number`, from 1 on."""
        place = number % COPY_NUMBERS
        self._numbers[place] = number  # the one before it in this place landed long ago
        return self._landed, self._number_words[place]

    def cpu_flag(self, moe_layer: int, step: int) -> tuple[torch.Tensor, int]:
        """Scheduled: the word (1,) to set, and to what, when the CPU's part of a layer is done."""
        return self._cpu_flag_words[moe_layer], step + 1

    def order_messages(self) -> OrderMessages:
        """Copy-engine: where orders lie, as the host sees them."""
        return OrderMessages(
            self._ordered, self._ack_sources.numpy(), self._ack.data_ptr(), self._served.numpy()
        )

    def acknowledgement(self, moe_layer: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy-engine: the (target, source) of a copy that lets a layer go on."""
        at = slice(moe_layer, moe_layer + 1)
        self._ack_sources[at] = step + 1
        return self._ack[at], self._ack_sources[at]

    def tokens(self, step: int) -> NDArray[np.int64] | None:
        """The tokens (T,) chosen in a step, once they are there."""
        words = self._host_tokens[step % RING]
        if not (words >> 32 == self.number(step)).all():
            return None
        return words & 0xFFFFFFFF

    def log(self, step: int) -> StepLog:
        """What a step left. Call after its tokens are there and before the step RING - 1 later is launched."""
        tokens = self.tokens(step)
        assert tokens is not None, f"step {step} is not over"
        words = self._host_ring[step % RING].copy()
        shape = (self.table.shape.num_layers, self.num_tokens, self.top_k)
        ends = np.cumsum([0, *self._sizes.values()])
        stamps, needs, fetched, ids, weights = (words[a:b] for a, b in pairwise(ends))
        stamps = stamps.view(np.int64)
        return StepLog(
            tokens,
            ids.reshape(shape),
            weights.view(np.float32).reshape(shape),
            needs.reshape(-1, 2),
            fetched.reshape(shape[0], -1),
            stamps[:-2].reshape(-1, graph_kernels.NUM_STAMPS),
            int(stamps[-2]),
            int(stamps[-1]),
            None if self._inputs_ring is None else self._inputs_ring[step % RING].clone(),
        )


def _mapped(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeroed host memory that the GPU reads and writes (the CPU's own in the interpreter)."""
    return torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda", device="cpu")


def _branch(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
