"""Collects what a run leaves behind (marks, needs, routing) and turns it into tables when the run is over.

While the model runs only references are kept; times are computed, and tensors brought to the host, at the end.
"""

import threading
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from ..cache.residency import LayerNeed
from ..core.jit import warm_up_us
from ..core.types import REASONS, IntArray, Lane, Phase, Reason
from ..device import Device, Events, Mark
from ..kernels import StepLog
from ..traces.events import PHASES, Event, LayerRow, StepRow, event_frame, layer_frame, step_frame
from ..traces.routing import RoutingTrace
from ..weights.loader import Transfer
from .positions import Forward, Positions, Rereading, TextKey
from .schedule import CpuWork

#: In a run's note of router inputs or weights that a trace cannot hold; whoever learns from the trace looks for it.
NOT_FINITE = "are not finite"


class _Span(NamedTuple):
    lane: Lane
    kind: str
    step: int
    moe_layer: int
    expert: int
    reason: str
    nbytes: int
    start: Mark | float  # a float is microseconds since the run's start
    end: Mark | float
    warm_up_us: float = 0.0  # the part of it in which its thread compiled decisions


@dataclass
class _Routing:
    """One layer's routing in one step."""

    ids_TK: NDArray[np.integer]
    weights_TK: torch.Tensor
    inputs_TD: torch.Tensor | None


@dataclass
class _Step:
    phase: Phase
    batch: int
    length: int  # tokens per sequence
    text: TextKey
    past: int | None  # tokens cached before; None for all of the text so far
    real: NDArray[np.bool_] | None  # as `Forward.real`
    start: Mark | None  # None for a step from a graph: its log says
    log: StepLog | None = None
    is_counted: bool = False  # the log's needs were taken down as the host served them
    routing: dict[int, _Routing] = field(default_factory=dict)


class _Served(NamedTuple):
    """A step that compiled code decided; columns as in `engine.graph.host_loop`."""

    step: int
    num_tokens: int
    needs: NDArray[np.int64]  # (L, 5) needed, hits, late, on the CPU, prefetched
    copies: NDArray[np.int64]  # (n, 7) layer, expert, reason's rank, begin, end, place in its batch, its size
    jobs: NDArray[np.int64]  # (m, 4) layer, step, begin and end in ns
    events: Events


class Tables(NamedTuple):
    """The three tables of a run."""

    events: pd.DataFrame
    layers: pd.DataFrame
    steps: pd.DataFrame


class Recorder:
    """Evidence of one run.

    Args:
        device: gives marks their times.
        events: record the timeline.
        routing: keep expert ids and router weights; `inputs`: and router inputs.

    Attributes:
        thread: ident of the one whose forward passes it records.
        num_foreign: forward passes of other threads meanwhile, which are not in it; `num_batched`: those of them that
            transformers' continuous batching ran.
        rereading: knows the text of its last forward.
    """

    def __init__(self, device: Device, *, events: bool, routing: bool, inputs: bool) -> None:
        self._device = device
        self.timed = events
        self._routing = routing
        self._inputs = inputs
        self._spans: list[_Span] = []
        #: Step, copy, and its part of the batch's time.
        self._batches: list[tuple[int, Transfer, float, float]] = []
        self._served: list[_Served] = []
        self._layers: list[LayerRow] = []
        self._steps: list[_Step] = []
        self.num_foreign = self.num_batched = 0
        self.rereading = Rereading()
        self.thread = threading.get_ident()
        self._start = device.mark(timed=True)
        self._start_ns = time.perf_counter_ns()  # the same moment by the host's clock, on an idle device
        self._last: Mark = self._start  # end of the last thing on the compute lane
        self._warm_before_us = warm_up_us()
        self._warm_us = self._warm_before_us  # by the end of the last span of the compute lane
        self._not_finite: dict[str, IntArray] = {}  # (L,) tokens, by what of theirs is NaN or infinite
        self._anchor: tuple[Mark, int] | None = (
            None  # one moment by both clocks: a mark, and the GPU's own in ns
        )

    @property
    def keeps_inputs(self) -> bool:
        """Whether router inputs are kept."""
        return self._inputs

    @property
    def num_steps(self) -> int:
        return len(self._steps)

    @property
    def batch(self) -> int:
        return max((step.batch for step in self._steps), default=0)

    def begin_step(self, forward: Forward) -> None:
        """A forward pass starts."""
        # A GPU's mask is read only where it can say something new: tokens that follow a known text are real.
        is_known = forward.length == 1 and any(step.text == forward.text for step in self._steps[-1:])
        real = None if is_known else forward.real()
        mark = self._device.mark(timed=True)
        self._close_step(mark)
        self._steps.append(
            _Step(forward.phase, forward.batch, forward.length, forward.text, forward.past, real, mark)
        )
        self._last = mark

    # -- steps from a graph ------------------------------------------------------------------------------------

    def anchor(self, mark: Mark, gpu_ns: int) -> None:
        """The moment of `mark` by the GPU's clock, from which the stamps of graph steps are counted."""
        self._close_step(mark)
        self._anchor = mark, gpu_ns

    def begin_logged_step(self, batch: int) -> int:
        """A decode step from a graph is launched; `log` follows when it is over. Returns its number."""
        self._steps.append(_Step("decode", batch, 1, self._steps[-1].text, None, None, None))
        return len(self._steps) - 1

    def drop_step(self) -> None:
        """The step launched last came after the end of all sequences: it never was."""
        dropped = len(self._steps) - 1
        del self._steps[-1]
        self._spans = [span for span in self._spans if span.step < dropped]
        self._batches = [batch for batch in self._batches if batch[0] < dropped]
        self._layers = [row for row in self._layers if row.step < dropped]
        self._served = [served for served in self._served if served.step < dropped]

    def log(self, step: int, log: StepLog, is_counted: bool = False) -> None:
        """What a graph step wrote down; `is_counted`: its needs were taken down as the host served them."""
        entry = self._steps[step]
        entry.log, entry.is_counted = log, is_counted

    def _logged_layers(self) -> None:
        """What layers of graph steps needed that nobody took down before."""
        for index, step in enumerate(self._steps):
            if step.log is None or step.is_counted:
                continue
            tokens = step.log.ids_LTK.shape[1]
            for layer, (needed, missing) in enumerate(step.log.needs.tolist()):
                hits = needed - missing
                self._layers.append(LayerRow(index, "decode", layer, tokens, needed, hits, 0, missing, 1))

    def _logged_spans(self, row_bytes: list[int]) -> None:
        """The timeline of all graph steps, from their stamps."""
        if self._anchor is None or not self.timed:
            return
        former_end = None
        for index, step in enumerate(self._steps):
            if step.log is None:
                continue
            begin, end = self._log_us(step.log.begin_ns), self._log_us(step.log.end_ns)
            if former_end is not None:  # between two steps the GPU waits for the next launch
                self._add(index - 1, Lane.HOST, "host_wait", -1, former_end, begin)
            former_end, last = end, begin
            for layer, stamps in enumerate(step.log.stamps_ns.tolist()):
                routed, decided, fetched, done, computed = map(self._log_us, stamps)
                missing = int(step.log.needs[layer, 1])  # not there, as the GPU saw it when it asked
                self._add(index, Lane.GPU, "dense", layer, last, routed)
                self._add(index, Lane.HOST, "host_wait", layer, routed, decided)
                has_cpu = stamps[-1] > 0
                if missing:
                    self._add(index, Lane.STALL, "stall", layer, decided, fetched)
                    experts = step.log.fetched[layer]
                    share = (fetched - decided) / max(1, missing)
                    for i, expert in enumerate(experts[:missing].tolist() if experts[0] >= 0 else []):
                        start = decided + i * share
                        self._spans.append(
                            _Span(Lane.H2D, "transfer", index, layer, expert, Reason.ON_DEMAND, row_bytes[layer],
                                  start, start + share)
                        )  # fmt: skip
                begin = fetched if missing else decided
                self._add(index, Lane.GPU, "experts", layer, begin, computed if has_cpu else done)
                if has_cpu:  # summing up the pairs, some microseconds, is in it
                    self._add(index, Lane.STALL, "cpu_wait", layer, computed, done)
                last = done
            self._add(index, Lane.GPU, "dense", -1, last, end)

    def _add(self, step: int, lane: Lane, kind: str, layer: int, start: float, end: float) -> None:
        self._spans.append(_Span(lane, kind, step, layer, -1, "", 0, start, end))

    def _log_us(self, gpu_ns: int) -> float:
        assert self._anchor is not None
        _, at_ns = self._anchor
        return self._anchor_us + (gpu_ns - at_ns) / 1e3

    # -- tables ------------------------------------------------------------------------------------------------

    def _close_step(self, end: Mark) -> None:
        if self._steps and self._steps[-1].start is not None:
            self._span(Lane.GPU, "dense", -1, self._last, end)

    def _span(self, lane: Lane, kind: str, moe_layer: int, start: Mark, end: Mark) -> None:
        """One of the compute lane. Whatever it was for, what its thread did once and never again is no part of it."""
        if self.timed:
            former_us, self._warm_us = self._warm_us, warm_up_us()
            warmed_us = self._warm_us - former_us
            step = len(self._steps) - 1
            self._spans.append(_Span(lane, kind, step, moe_layer, -1, "", 0, start, end, warmed_us))

    def routed(self, moe_layer: int, mark: Mark) -> None:
        """The router of a layer has spoken: what came before was dense compute."""
        self._span(Lane.GPU, "dense", moe_layer, self._last, mark)
        self._last = mark

    def decided(self, moe_layer: int, mark: Mark) -> None:
        """The host has read the routing and issued what it decided."""
        self._span(Lane.HOST, "host_wait", moe_layer, self._last, mark)
        self._last = mark

    def waited(self, moe_layer: int, mark: Mark) -> None:
        """The bytes of a round have arrived."""
        self._span(Lane.STALL, "stall", moe_layer, self._last, mark)
        self._last = mark

    def computed(self, moe_layer: int, mark: Mark) -> None:
        """A round's experts are computed."""
        self._span(Lane.GPU, "experts", moe_layer, self._last, mark)
        self._last = mark

    def transfers(self, transfers: list[Transfer]) -> None:
        """Copies have been issued."""
        if self.timed:
            step = len(self._steps) - 1
            self._spans.extend(
                _Span(Lane.H2D, "transfer", step, t.moe_layer, t.expert, t.reason, t.nbytes, t.start, t.end)
                for t in transfers
            )

    def merged(self, work: CpuWork, mark: Mark) -> None:
        """The outputs of experts on the CPU are where they belong."""
        self._span(Lane.STALL, "cpu_wait", work.moe_layer, self._last, mark)
        self._last = mark
        if self.timed:
            self._cpu_span(len(self._steps) - 1, work.moe_layer, *work.job.span_ns())

    def _cpu_span(self, step: int, moe_layer: int, begin_ns: int, end_ns: int) -> None:
        """Experts were computed on the CPU; its clock is the host's."""
        start, end = ((at_ns - self._start_ns) / 1e3 for at_ns in (begin_ns, end_ns))
        self._spans.append(_Span(Lane.CPU, "experts", step, moe_layer, -1, Reason.CPU, 0, start, end))

    def served(
        self,
        step: int,
        num_tokens: int,
        needs: NDArray[np.int64],
        copies: NDArray[np.int64],
        jobs: NDArray[np.int64],
        events: Events,
    ) -> None:
        """What compiled code did about a step, in rows of `engine.graph.host_loop`; read when the run is over."""
        self._served.append(_Served(step, num_tokens, needs, copies, jobs, events))

    def served_late(self, jobs: NDArray[np.int64]) -> None:
        """Jobs of the CPU lane that were still under way when their step had been served."""
        if not self._served:
            return
        last = self._served[-1]
        self._served[-1] = last._replace(jobs=np.concatenate([last.jobs, jobs]))

    def need(self, need: LayerNeed, num_rounds: int, num_tokens: int, num_on_cpu: int = 0) -> None:
        """What a layer needed, where it was found, and how many of the missing are computed on the CPU."""
        step = len(self._steps) - 1
        self._layers.append(
            LayerRow(
                step,
                self._steps[step].phase,
                need.moe_layer,
                num_tokens,
                len(need.experts),
                need.num_hits,
                need.num_late,
                need.num_misses,
                num_rounds,
                num_on_cpu,
                need.num_prefetched,
            )
        )

    def routing(
        self,
        moe_layer: int,
        ids_TK: NDArray[np.integer],
        weights_TK: torch.Tensor,
        inputs_TD: torch.Tensor | None,
    ) -> None:
        """Keep a layer's routing. Tensors are cloned: the model, or the next replay of a CUDA graph, may overwrite
        them.
        """
        if self._routing:
            inputs = inputs_TD.detach().clone() if self._inputs and inputs_TD is not None else None
            self._steps[-1].routing[moe_layer] = _Routing(ids_TK.copy(), weights_TK.detach().clone(), inputs)

    def tables(self, row_bytes: list[int]) -> Tables:
        """All three tables. Call once, when the run is over; `row_bytes` of one expert of each MoE layer."""
        end = self._device.mark(timed=True)
        if self._anchor is None:
            self._close_step(end)
        self._device.synchronize()
        bases = self._step_times_us(end)
        self._logged_spans(row_bytes)
        self._logged_layers()
        for served in self._served:
            self._take_down(served, row_bytes)
        steps = [
            StepRow(i, step.phase, step.batch * step.length, bases[i], bases[i + 1] - bases[i])
            for i, step in enumerate(self._steps)
        ]
        times: dict[int, float] = {}

        def time_us(mark: Mark | float, step: int) -> float:
            if isinstance(mark, float):
                return mark
            key = id(mark)
            if key not in times:
                base, reference = bases[step], self._steps[step].start
                if reference is None:
                    assert self._anchor is not None
                    base, reference = self._anchor_us, self._anchor[0]
                times[key] = base + self._device.elapsed_us(reference, mark)
            return times[key]

        events = []
        for span in self._spans:
            start = time_us(span.start, span.step)
            event = Event(
                span.lane,
                span.kind,
                span.step,
                self._steps[span.step].phase,
                span.moe_layer,
                span.expert,
                span.reason,
                span.nbytes,
                start,
                max(0.0, time_us(span.end, span.step) - start),
            )
            events += [event] if not span.warm_up_us else _parted(event, span.warm_up_us)
        link_free = 0.0
        for step, t, first, end in self._batches:
            # Issued while the link was busy, a batch begins when it is free.
            ends = time_us(t.end, step)
            begins = max(time_us(t.start, step), min(link_free, ends))
            start, stop = begins + first * (ends - begins), begins + end * (ends - begins)
            if end == 1.0:
                link_free = ends
            phase = self._steps[step].phase
            events.append(
                Event(
                    Lane.H2D,
                    "transfer",
                    step,
                    phase,
                    t.moe_layer,
                    t.expert,
                    t.reason,
                    t.nbytes,
                    start,
                    stop - start,
                )
            )
        return Tables(event_frame(events), layer_frame(self._layers), step_frame(steps))

    def _take_down(self, served: _Served, row_bytes: list[int]) -> None:
        """The rows of one served step."""
        step, tokens = served.step, served.num_tokens
        for layer, (needed, hits, late, on_cpu, prefetched) in enumerate(served.needs.tolist()):
            misses = needed - hits - late
            self._layers.append(
                LayerRow(step, "decode", layer, tokens, needed, hits, late, misses, 1, on_cpu, prefetched)
            )
        marks = {place: served.events.mark(place) for place in np.unique(served.copies[:, 3:5]).tolist()}
        for layer, expert, reason, begin, end, i, num in served.copies.tolist():
            transfer = Transfer(layer, expert, REASONS[reason], row_bytes[layer], marks[begin], marks[end])
            self._batches.append((step, transfer, i / num, (i + 1) / num))
        for layer, of_step, begin, end in served.jobs.tolist():
            if self.timed and of_step < len(self._steps):  # not of a step that never was
                self._cpu_span(of_step, layer, begin, end)

    def _step_times_us(self, end: Mark) -> list[float]:
        """Start of each step, and the run's end, since the run's start.

        Summed from step to step: CUDA gives a difference of events as float32 milliseconds, which would resolve
        only some microseconds after a minute.
        """
        times = [0.0]
        last = self._start
        for step in self._steps:
            if step.start is not None:
                times.append(times[-1] + self._device.elapsed_us(last, step.start))
                last = step.start
        if self._anchor is None:
            times.append(times[-1] + self._device.elapsed_us(last, end))
            return times[1:]
        mark, _ = self._anchor
        self._anchor_us = times[-1] + self._device.elapsed_us(last, mark)
        logs = [step.log for step in self._steps if step.log is not None]
        times += [self._log_us(log.begin_ns) for log in logs] if self.timed else []
        end_us = self._anchor_us + self._device.elapsed_us(mark, end)
        if not self.timed:  # no stamps: the steps of a graph share the time evenly
            times += np.linspace(self._anchor_us, end_us, len(logs), endpoint=False).tolist()
        elif logs:  # what follows the last step's end is not the step's
            end_us = self._log_us(logs[-1].end_ns)
        return [*times[1:], end_us]

    def trace(self, *, num_experts: int, decoder_layers: list[int], **metadata: Any) -> RoutingTrace | None:
        """The routing of every token, or None if none was kept.

        A layer that a step did not run (or ran with other tokens, as a vision tower does) has ids of -1. What is NaN or
        infinite is 0 in it, and said by `notes`.
        """
        for step in self._steps if self._routing else []:
            if step.log is not None:
                step.routing = _logged_routing(step.log)
        layers = [routing for step in self._steps for routing in step.routing.values()]
        if not layers:
            return None
        num_layers = len(decoder_layers)
        top_k = max(routing.ids_TK.shape[1] for routing in layers)
        parts = [self._step_rows(i, num_layers, num_experts, top_k) for i in range(len(self._steps))]
        joined: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        self._not_finite["router weights"] = _take_out_not_finite(joined["weights"])
        inputs = self._all_inputs(num_layers) if self._inputs else None
        return RoutingTrace(
            **joined,
            position=self._positions(),
            inputs=inputs,
            num_experts=num_experts,
            top_k=top_k,
            decoder_layers=decoder_layers,
            **metadata,
        )

    def notes(self) -> list[str]:
        """What a reader of the figures and of the trace must know; call it after `trace`."""
        return self._notes_of_warm_up() + [
            f"{what} of {count} tokens {NOT_FINITE} in MoE layer {layer} (NaN or infinite); the trace has 0 for them"
            for what, of_layer in self._not_finite.items()
            for layer, count in enumerate(of_layer.tolist())
            if count
        ]

    def _notes_of_warm_up(self) -> list[str]:
        """Without a timeline nothing tells warm-up from the steps it was in."""
        warmed_us = 0.0 if self.timed else warm_up_us() - self._warm_before_us
        return [
            f"{warmed_us / 1e6:.2g} s of this run went into what is done once: decisions and layers compiled, or read "
            f"from the disk, and graphs recorded; without events its times hold that"
        ] * (warmed_us > 0)

    def _step_rows(self, index: int, num_layers: int, num_experts: int, top_k: int) -> dict[str, np.ndarray]:
        step = self._steps[index]
        rows = step.batch * step.length
        ids = np.full((rows, num_layers, top_k), -1, dtype=np.int16)
        weights = np.zeros((rows, num_layers, top_k), dtype=np.float32)
        for layer, routing in step.routing.items():
            if routing.ids_TK.shape[0] != rows:
                continue
            valid = (routing.ids_TK >= 0) & (routing.ids_TK < num_experts)
            k = routing.ids_TK.shape[1]
            ids[:, layer, :k] = np.where(valid, routing.ids_TK, -1)
            weights[:, layer, :k] = np.where(valid, routing.weights_TK.float().cpu().numpy(), 0.0)
        return {
            "expert_ids": ids,
            "weights": weights,
            "step": np.full(rows, index, dtype=np.int32),
            "sequence": np.repeat(np.arange(step.batch, dtype=np.int16), step.length),
            "phase": np.full(rows, PHASES.index(step.phase), dtype=np.int8),
        }

    def _positions(self) -> np.ndarray:
        """Position of each row's token in its text, padding not counted; -1 for padding."""
        positions = Positions()
        parts = [
            positions.of(step.text, step.past, (step.batch, step.length), step.real).ravel()
            for step in self._steps
        ]
        return np.concatenate(parts)

    def _all_inputs(self, num_layers: int) -> np.ndarray:
        """(R, L, D) float16, as `saturating_float16` but on the device, into the one array that is kept: in float32,
        step by step, joined and cut, 8192 tokens of 16 layers of 2048 took 3.8 GB on their way to 0.5
        (docs/log/predictor.md).
        """
        width = max(
            r.inputs_TD.shape[1] for s in self._steps for r in s.routing.values() if r.inputs_TD is not None
        )
        most = torch.finfo(torch.float16).max
        total = sum(step.batch * step.length for step in self._steps)
        inputs = np.zeros((total, num_layers, width), dtype=np.float16)
        self._not_finite["router inputs"] = not_finite = np.zeros(num_layers, dtype=np.int64)
        first = 0
        for step in self._steps:
            rows = inputs[first : first + step.batch * step.length]
            first += len(rows)
            for layer, routing in step.routing.items():
                if routing.inputs_TD is not None and len(routing.inputs_TD) == len(rows):
                    x_TD = routing.inputs_TD.float()
                    is_finite_TD = x_TD.isfinite()
                    not_finite[layer] += int((~is_finite_TD).any(1).sum())
                    half_TD = x_TD.clamp(-most, most).where(is_finite_TD, 0.0).half()
                    rows[:, layer, : x_TD.shape[1]] = half_TD.cpu().numpy()
        return inputs


def _parted(event: Event, warm_up_us: float) -> list[Event]:
    """A span of the compute lane in two parts: first what happens once in a process."""
    warm_up_us = min(warm_up_us, event.dur_us)
    return [
        event._replace(lane=Lane.HOST, kind="warm_up", dur_us=warm_up_us),
        event._replace(start_us=event.start_us + warm_up_us, dur_us=event.dur_us - warm_up_us),
    ]


def _take_out_not_finite(values_RLK: NDArray[np.floating]) -> IntArray:
    """Put 0 in the place of NaN and infinities; returns how many tokens (L,) had any."""
    is_finite = np.isfinite(values_RLK)
    values_RLK[~is_finite] = 0.0
    return (~is_finite).any(axis=2).sum(axis=0)


def _logged_routing(log: StepLog) -> dict[int, _Routing]:
    inputs = [None] * len(log.ids_LTK) if log.inputs_LTD is None else log.inputs_LTD.unbind(0)
    layers = zip(log.ids_LTK, log.weights_LTK, inputs, strict=True)
    return {
        layer: _Routing(ids, torch.from_numpy(weights), inputs_TD)
        for layer, (ids, weights, inputs_TD) in enumerate(layers)
    }
