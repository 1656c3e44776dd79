"""A captured step that the host decides: the state that `serve` works on, and what is told to others about it."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.prefetch import Waiting
from ...cache.residency import NOTHING, IntArray
from ...core.jit import compile_first
from ...core.native import clock_address
from ...core.types import REASONS, NeedOutcome, Reason
from ...kernels import StepLog
from ...kernels.cpu import LaneFunctions
from ..layered import LayeredRunner
from ..schedule import on_demand
from . import host_state as at
from .beside import ASK_SHIFT, SCORES_SHIFT, Listening
from .copy_driver import SideTasks, require_running
from .host_cpu import collect
from .host_loop import serve
from .host_state import Addresses, Functions, HostState, PlannerState
from .stamps import read_stamps

if TYPE_CHECKING:
    from ...kernels.graph_buffers import GraphBuffers

#: A number that no batch of copies has: all layers that wait go on.
MOST_COPIES = 2**31 - 1
#: Events that a step with a timeline finds, besides those of on-demand copies: two for each prefetch.
SPARE_EVENTS = 1024
#: Each is a call of the driver's, between two layers.
BATCHES_TO_LEARN_FROM = 6


class HostDriver:
    """Serves captured steps by the engine's schedule, or on demand.

    Args:
        runner: slots, link and schedule, if there is one.
    """

    def __init__(self, runner: LayeredRunner) -> None:
        self._runner = runner
        self._schedule_runner = runner.schedule_runner or on_demand(runner.shape)
        self._captured: GraphBuffers | None = None
        self._listening: Listening | None = None  # a predictor beside the graph
        self._num_steps = 0
        #: By step, of those that are neither learned nor undone: needs, and copies if they know their time.
        self._served: dict[int, tuple[IntArray, IntArray]] = {}

    def begin(self, captured: "GraphBuffers") -> None:
        """Steps follow; the GPU has the table as it is now, and nothing is on the link."""
        runner = self._runner
        runner.loader.cancel()
        runner.device.synchronize()
        runner.loader.poll()
        runner.residency.unprotect()
        cpu = self._schedule_runner.cpu
        self._lane = cpu.functions() if cpu is not None else LaneFunctions.without()
        self._functions = Functions(runner.device.link_functions(), self._lane.addresses, clock_address())
        self._listen(captured)
        self._timed = runner.recorder is not None and runner.recorder.timed
        self._events = runner.device.open_events(self._timed)
        self._addresses = self._lay_out(captured)
        self._state = self._start(captured)
        self._addresses.shown[:] = runner.residency.slot_of
        # Before the GPU is at work on a step: it would wait as long. An interpreted one takes the
        # compiler's time, and tests ended after 300 s on a busy machine.
        compile_first(serve, (*self._arguments(0, 0, -1), 0), "the host's part of a decode step")
        self._served, self._num_steps = {}, 0
        self._captured, self._is_abandoned = captured, False
        if self._listening is not None:  # last, since from here on `end` is needed, whatever interrupts
            self._listening.begin(self._state.counts)

    def _listen(self, captured: "GraphBuffers") -> None:
        """Have the predictor asked beside the steps, if it is not part of them."""
        self._listening = None
        assert captured.scheduled is not None
        if captured.scheduled.is_predicted_aside:
            predicting = self._schedule_runner.predicting
            assert predicting is not None
            self._listening = listening = Listening(predicting, captured, captured.messages())
            self._functions = self._functions._replace(
                ring=listening.bell.ring_address, bell=listening.bell.address
            )

    def _lay_out(self, captured: "GraphBuffers") -> Addresses:
        runner, schedule_runner = self._runner, self._schedule_runner
        assert captured.scheduled is not None
        table, pool, layers = runner.residency, runner.loader.pool, runner.layers
        nothing = [0] * len(layers)
        messages = captured.messages()
        if self._listening is not None:
            messages = messages._replace(scores=self._listening.scores)
        has_cpu = schedule_runner.cpu is not None

        def per_layer(values: list[int]) -> IntArray:
            return np.array(values, dtype=np.int64)

        return Addresses(
            *messages,
            num_experts_L=per_layer([layer.num_experts for layer in layers]),
            row_bytes_L=per_layer([layer.layout.row_bytes for layer in layers]),
            rows_L=per_layer([held.rows.data_ptr() for held in runner.host.layers]),
            inputs_L=per_layer([x.data_ptr() for x in captured.inputs] if has_cpu else nothing),
            outputs_L=per_layer([y.data_ptr() for y in captured.cpu_pairs] if has_cpu else nothing),
            flags_L=per_layer([flag.data_ptr() for flag in captured.cpu_flags] if has_cpu else nothing),
            cpu_layers_L=per_layer(self._lane.layers if has_cpu else nothing),
            top_k=captured.top_k,
            width=captured.scheduled.width,
            pool=pool.data_ptr(),
            slot_bytes=pool.stride(0),
            uses_weights=int(table.policy.name == "score"),
            policy=table.policy.kind,
            most_on_wire=runner.loader.most_on_wire,
            on_demand=REASONS.index(Reason.ON_DEMAND),
            prefetch=REASONS.index(schedule_runner.reason),
            timed=int(self._timed),
            ask_shift=ASK_SHIFT,
            scores_shift=SCORES_SHIFT,
        )

    def _start(self, captured: "GraphBuffers") -> HostState:
        table, L, P = self._runner.residency, self._runner.shape.num_layers, captured.num_pairs
        total, E, most = len(table.slot_of), self._runner.shape.num_experts, self._addresses.most_on_wire
        self._events.reserve(most + 1)

        def zeros(*shape: int) -> IntArray:
            return np.zeros(shape, dtype=np.int64)

        state = HostState(
            counts=zeros(at.NUM_COUNTS),
            times=np.zeros(at.NUM_TIMES),
            shown_in=table.key_of.copy(),
            loaded=zeros(E),
            copy_of=zeros(table.num_slots),
            waiting=Waiting.none(total),
            wire_slot=zeros(most + 1),
            wire_event=zeros(most + 1),
            events=self._events.handles,
            needs=zeros(L, at.NEED_COLUMNS),
            copies=zeros(3 * total if self._timed else 0, at.COPY_COLUMNS),
            jobs=zeros(L + 1, at.JOB_COLUMNS),
            expert_batch=zeros(at.BATCH_WORDS),
            indices=zeros(2 * E + 1 + 2 * P),
            words=zeros(4),
        )
        state.counts[at.TICK] = table.policy.tick
        return state

    def _arguments(self, step: int, number: int, row: int) -> tuple[Any, ...]:
        """Of `serve`, but for the number of side tasks."""
        planner = self._schedule_runner.planner
        planner_state = PlannerState(
            planner.settings, planner.costs, *planner.calibrated_cpu(), planner.memory
        )
        table = self._runner.residency
        return (
            self._functions, self._addresses, self._state, planner_state, table.arrays, step, number, row
        )  # fmt: skip

    # -- steps -------------------------------------------------------------------------------------------------

    def run(self, step: int, row: int, side_tasks: SideTasks) -> None:
        """Serve all layers of a step that is running, with side tasks between them.

        Args:
            row: its step in the recording, -1 without one.

        Raises:
            TransferFailed: the GPU stopped, or the driver refused a copy.
            Exception: what went wrong on the CPU lane.
        """
        runner, captured = self._runner, self._captured
        recorder, table = runner.recorder, runner.residency
        assert captured is not None
        counts = self._state.counts
        if self._timed:  # events are read when the run is over, so each is used once
            self._events.reserve(counts[at.EVENTS] + at.EVENTS_OF_LAYER * len(runner.layers) + SPARE_EVENTS)
            self._state = self._state._replace(events=self._events.handles)
        counts[at.LAYER] = counts[at.NUM_COPIES] = counts[at.NUM_JOBS] = counts[at.ASKED] = 0
        self._num_steps += 1
        if self._listening is not None:
            self._listening.begin_step(step, captured.number(step))
        arguments = self._arguments(step, captured.number(step), row)
        layer, num_idle, is_idle = 0, 0, False
        while True:
            code = self._lane.serving(serve, *arguments, len(side_tasks))
            if self._listening is not None and code in (at.SERVED, at.PAUSED):
                self._listening.came_back(float(self._state.times[at.LEFT]))
            if code == at.SERVED:
                break
            if code == at.PAUSED:
                side_tasks.popleft()()
                continue
            if code == at.CPU_FAILED:
                self._lane.explain()
            is_same = layer == counts[at.LAYER]
            num_idle, layer = num_idle + 1 if is_same else 0, int(counts[at.LAYER])
            failure = int(counts[at.FAILURE])
            is_idle = require_running(runner, code, failure, layer, num_idle, is_same and is_idle)
        table.policy.tick = int(counts[at.TICK])
        needs = self._state.needs.copy()
        self._served[step] = needs, self._log()
        self._count(needs, 1)
        if recorder is not None:
            recorder.served(row, captured.num_tokens, *self._served[step], self._jobs(), self._events)

    def _log(self) -> IntArray:
        return self._state.copies[: self._state.counts[at.NUM_COPIES]].copy()

    def _jobs(self) -> IntArray:
        return self._state.jobs[: self._state.counts[at.NUM_JOBS]].copy()

    def _count(self, needs: IntArray, sign: int) -> None:
        needed, hits, late = needs.sum(0)[: at.ON_CPU].tolist()
        for kind, num in (
            (NeedOutcome.HIT, hits),
            (NeedOutcome.LATE, late),
            (NeedOutcome.MISS, needed - hits - late),
        ):
            self._runner.needs[kind] += sign * num

    def learn(self, step: int, log: StepLog) -> None:
        """What a step says about this machine: its jobs on the CPU, and its stamps, if there is a timeline."""
        schedule_runner, times = self._schedule_runner, self._state.times
        needs, copies = self._served.pop(step)
        if self._listening is not None:
            self._listening.observe(log.ids_LTK)
        if schedule_runner.cpu is not None:
            schedule_runner.planner.saw_cpu(float(times[at.CPU_TOOK]), float(times[at.CPU_CALIBRATED]))
            times[at.CPU_TOOK] = times[at.CPU_CALIBRATED] = 0.0
        if not self._timed:
            return
        needed, on_cpu = needs[:, at.NEEDED], needs[:, at.ON_CPU]
        seen = read_stamps(log.stamps_ns, log.begin_ns, log.needs[:, 1], needed, on_cpu)
        planner = schedule_runner.planner
        planner.saw_step(seen.rest_us, None if np.isnan(seen.decide_us) else seen.decide_us, seen.gpu_us)
        planner.saw_link(self._copies_us(copies), bool(on_cpu.any()))

    def _copies_us(self, copies: IntArray) -> list[float]:
        """What an expert took on the link, of the step's last batches that are over."""
        times = []
        for _, _, _, begin, end, _, num in copies[copies[:, 5] == 0][-BATCHES_TO_LEARN_FROM:].tolist():
            took_us = self._events.elapsed_us(begin, end)
            if took_us is not None:
                times.append(took_us / num)
        return times

    def undo(self, step: int) -> None:
        """A step that was served never was."""
        self._count(self._served.pop(step)[0], -1)

    # -- ends --------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """No step follows: nothing is wanted, nothing is in use."""
        if self._captured is None:
            return
        self._captured = None
        runner, counts = self._runner, self._state.counts
        if self._listening is not None:
            self._stop_listening(self._listening)
        runner.device.synchronize()
        table = runner.residency
        table.in_flight[:] = table.protected[:] = False
        table.versions += 1  # copies of the table's rows are stale
        counts[at.NUM_JOBS] = 0
        is_sound = self._lane.serving(collect, self._functions, self._state)
        if runner.recorder is not None and not self._is_abandoned:
            runner.recorder.served_late(self._jobs())
        if not is_sound and not self._is_abandoned:
            self._lane.explain()

    def _stop_listening(self, listening: Listening) -> None:
        self._listening = None
        listening.end()
        predicting, counts = self._schedule_runner.predicting, self._state.counts
        decided = self._num_steps * len(self._runner.layers)
        if predicting is not None and decided:
            predicting.note(
                f"{predicting.where}: {listening.num_answers} answers, and {int(counts[at.FORESEEN])} of {decided} "
                f"layers were decided with one"
            )

    def abandon(self, step: int) -> None:
        """Let a step that is still waiting run to its end, with whatever weights there are."""
        captured, job = self._captured, int(self._state.counts[at.JOB])
        assert captured is not None
        self._is_abandoned = True
        self._lane.settle(job)
        has_cpu = captured.scheduled is not None and captured.scheduled.has_cpu
        captured.served(step + 1)
        for layer in self._runner.layers:
            captured.reply(layer.moe_layer, step, NOTHING, last_copy=0, num_on_cpu=0)
            if has_cpu:
                word, value = captured.cpu_flag(layer.moe_layer, step)
                word.fill_(value)
        # For a layer that was answered before and waits for bytes. Last: the link may be what failed.
        self._runner.device.send([captured.landing(MOST_COPIES)], None)
