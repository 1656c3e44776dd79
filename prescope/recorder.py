"""Collects what a run leaves behind (marks, needs, routing) and turns it into tables when the run is over.

While the model runs only references are kept; times are computed, and tensors brought to the host, at the end.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from .core import Lane, Phase
from .device import Device, Mark
from .events import PHASES, Event, LayerRow, StepRow, event_frame, layer_frame, step_frame
from .loader import Transfer
from .residency import LayerNeed
from .routing import RoutingTrace


class _Span(NamedTuple):
    lane: Lane
    kind: str
    step: int
    moe_layer: int
    expert: int
    reason: str
    nbytes: int
    start: Mark
    end: Mark


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
    padding: NDArray[np.bool_] | None  # (batch, length), True where a token is padding
    start: Mark
    routing: dict[int, _Routing] = field(default_factory=dict)


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
    """

    def __init__(self, device: Device, *, events: bool, routing: bool, inputs: bool) -> None:
        self._device = device
        self.timed = events
        self._routing = routing
        self._inputs = inputs
        self._spans: list[_Span] = []
        self._layers: list[LayerRow] = []
        self._steps: list[_Step] = []
        self._start = device.mark(timed=True)
        self._last: Mark = self._start  # end of the last thing on the compute lane

    @property
    def num_steps(self) -> int:
        return len(self._steps)

    @property
    def batch(self) -> int:
        return max((step.batch for step in self._steps), default=0)

    def begin_step(self, batch: int, length: int, padding: NDArray[np.bool_] | None) -> None:
        """A forward pass over `batch` x `length` tokens starts."""
        mark = self._device.mark(timed=True)
        self._close_step(mark)
        phase: Phase = "prefill" if length > 1 or not self._steps else "decode"
        self._steps.append(_Step(phase, batch, length, padding, mark))
        self._last = mark

    def _close_step(self, end: Mark) -> None:
        if self._steps:
            self._span(Lane.GPU, "dense", -1, self._last, end)

    def _span(self, lane: Lane, kind: str, moe_layer: int, start: Mark, end: Mark) -> None:
        if self.timed:
            self._spans.append(_Span(lane, kind, len(self._steps) - 1, moe_layer, -1, "", 0, start, end))

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

    def need(self, need: LayerNeed, num_rounds: int, num_tokens: int) -> None:
        """What a layer needed and where it was found."""
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
            )
        )

    def routing(
        self, moe_layer: int, ids_TK: NDArray[np.integer], weights_TK: torch.Tensor, inputs_TD: torch.Tensor
    ) -> None:
        """Keep a layer's routing. Tensors are cloned: the model, or the next replay of a CUDA graph, may overwrite
        them.
        """
        if self._routing:
            inputs = inputs_TD.detach().clone() if self._inputs else None
            self._steps[-1].routing[moe_layer] = _Routing(ids_TK.copy(), weights_TK.detach().clone(), inputs)

    def tables(self) -> Tables:
        """All three tables. Call once, when the run is over."""
        end = self._device.mark(timed=True)
        self._close_step(end)
        self._device.synchronize()
        bases = self._step_times_us(end)
        steps = [
            StepRow(i, step.phase, step.batch * step.length, bases[i], bases[i + 1] - bases[i])
            for i, step in enumerate(self._steps)
        ]
        times: dict[int, float] = {}

        def time_us(mark: Mark, step: int) -> float:
            key = id(mark)
            if key not in times:
                times[key] = bases[step] + self._device.elapsed_us(self._steps[step].start, mark)
            return times[key]

        events = []
        for span in self._spans:
            start = time_us(span.start, span.step)
            events.append(
                Event(
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
            )
        return Tables(event_frame(events), layer_frame(self._layers), step_frame(steps))

    def _step_times_us(self, end: Mark) -> list[float]:
        """Start of each step, and the run's end, since the run's start.

        Summed from step to step: CUDA gives a difference of events as float32 milliseconds, which would resolve
        only some microseconds after a minute.
        """
        times = [0.0]
        last = self._start
        for mark in [*(step.start for step in self._steps), end]:
            times.append(times[-1] + self._device.elapsed_us(last, mark))
            last = mark
        return times[1:]

    def trace(self, *, num_experts: int, decoder_layers: list[int], **metadata: Any) -> RoutingTrace | None:
        """The routing of every token, or None if none was kept.

        A layer that a step did not run (or ran with other tokens, as a vision tower does) has ids of -1.
        """
        if not self._routing or not any(step.routing for step in self._steps):
            return None
        num_layers = len(decoder_layers)
        layers = [routing for step in self._steps for routing in step.routing.values()]
        top_k = max(routing.ids_TK.shape[1] for routing in layers)
        parts = [self._step_rows(i, num_layers, num_experts, top_k) for i in range(len(self._steps))]
        joined: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        past = self._positions()
        inputs = self._all_inputs(num_layers) if self._inputs else None
        return RoutingTrace(
            **joined,
            position=past,
            inputs=inputs,
            num_experts=num_experts,
            top_k=top_k,
            decoder_layers=decoder_layers,
            **metadata,
        )

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
        """Position of each row's token in its sequence, padding not counted; -1 for padding."""
        parts = []
        seen = np.zeros(self.batch, dtype=np.int64)
        for step in self._steps:
            real = np.ones((step.batch, step.length), dtype=bool)
            if step.padding is not None:
                real = ~step.padding
            count = np.cumsum(real, axis=1)
            parts.append(np.where(real, seen[: step.batch, None] + count - 1, -1).ravel())
            seen[: step.batch] += count[:, -1]
        return np.concatenate(parts).astype(np.int32)

    def _all_inputs(self, num_layers: int) -> np.ndarray:
        width = max(
            r.inputs_TD.shape[1] for s in self._steps for r in s.routing.values() if r.inputs_TD is not None
        )
        parts = []
        for step in self._steps:
            rows = np.zeros((step.batch * step.length, num_layers, width), dtype=np.float32)
            for layer, routing in step.routing.items():
                if routing.inputs_TD is not None and len(routing.inputs_TD) == len(rows):
                    rows[:, layer, : routing.inputs_TD.shape[1]] = routing.inputs_TD.float().cpu().numpy()
            parts.append(rows)
        return np.concatenate(parts)
