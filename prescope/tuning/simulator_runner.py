"""Points on the simulator: recorded routing replayed under any setting, on any machine whose times are known."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import TraceMismatch, UnsupportedOption
from ..predictor import Predictor, RecordedPredictor
from ..scheduler.costs import LayerCosts
from ..simulator import NOISY, NONE, ORACLE, Machine, Recording, Scenario, Scenarios, SimResult, as_decode
from ..traces.routing import RoutingTrace
from ..weights.formats import lossy_part
from .evaluate import Measured
from .prompts import checksum_of_prompt, texts_of
from .settings import Setting, simulator_settings

#: Traces, each at one batch, that are kept ready in a process.
MOST_READY = 8
#: Of a scenario; all others are of the replay alone, or say which trace.
_OF_SCENARIO = {field.name for field in fields(Scenario)}


class SimulatorRunner:
    """Replays recorded runs; can be pickled, so that other processes and machines can do it too.

    Args:
        traces: one, or several by name; the first is the default. All of one model's shape.
        machines: whose times are on the clock: one or several, the first is the default; or the costs of a layer.
        predictors: by their own names; "none", "oracle" and "noisy oracle" are there anyway.
        predict_us: what one prediction costs on the first machine, by predictor.
        row_bytes: of one expert; only with costs.
        slots: where they do not move.
        prompts: that the traces were recorded of, so that a proof takes others; known already where traces have texts.
        frequencies: (L, E) by which the engine that is simulated knows hot experts (`Engine.frequencies`), as of
            `Scenarios`.

    Raises:
        BadTrace: a trace has no decode step.
        TraceMismatch: traces are of different shapes.
        UnsupportedOption: there is no trace or machine, or costs come without row_bytes.
    """

    is_here = takes_gpu = False

    def __init__(
        self,
        traces: RoutingTrace | Mapping[str, RoutingTrace],
        machines: Machine | LayerCosts | Sequence[Machine],
        predictors: Iterable[Predictor] = (),
        *,
        predict_us: Mapping[str, float] | None = None,
        row_bytes: int | None = None,
        slots: int | float | str = 0.25,
        prompts: Sequence[Any] | Mapping[str, Any] = (),
        frequencies: NDArray[np.floating] | None = None,
    ) -> None:
        self.frequencies = frequencies
        self._traces = {traces.model: traces} if isinstance(traces, RoutingTrace) else dict(traces)
        self._machines = _machines_of(machines, row_bytes)
        if not self._traces or not self._machines or isinstance(predictors, Predictor):
            raise UnsupportedOption(
                "a simulator needs a trace and a machine; predictors are a list, of one too"
            )
        self._predictors, self._predict_us = list(predictors), dict(predict_us or {})
        self._slots = slots
        told = [prompt.get("text") for trace in self._traces.values() for prompt in trace.prompts]
        texts = [text for text in told if isinstance(text, str)] + (texts_of(prompts) if prompts else [])
        self._prompts = sorted({checksum_of_prompt(text) for text in texts})
        first = next(iter(self._traces.values()))
        for name, trace in self._traces.items():
            if trace.shape != first.shape:
                raise TraceMismatch(
                    f"the trace {name!r} is of {trace.shape[:3]}, the first of {first.shape[:3]}"
                )
        self.shape = first.shape._replace(row_bytes=self._machines[0].row_bytes)
        names = [
            NONE,
            *(one.name for one in self._predictors if one.name not in (NONE, ORACLE)),
            NOISY,
            ORACLE,
        ]
        self._settings = simulator_settings(
            self.shape, [one.name for one in self._machines], self._traces, names
        )
        self._ready: dict[tuple[str, int | None], Scenarios] = {}
        self._scenarios(next(iter(self._traces)), None)  # what is wrong with a trace is said here

    @classmethod
    def of_recording(cls, recording: str | Path | Recording, machines: Sequence[Machine] = ()) -> Self:
        """A recorded run with its predictions and its machine, by the name of one that comes with prescope or a path.

        Args:
            machines: to choose from besides its own.

        Raises:
            BadTrace, BadPredictor: there is none, or it is damaged.
        """
        one = recording if isinstance(recording, Recording) else Recording.load(recording)
        label = str(one.about.get("label", one.trace.model))
        return cls({label: one.trace}, [one.machine, *machines], one.predictors, predict_us=one.predict_us)

    @classmethod
    def of_scenarios(cls, scenarios: Scenarios) -> Self:
        """What a dashboard simulates."""
        return cls(
            {scenarios.label: scenarios.trace}, list(scenarios.machines.values()),
            [one for name, one in scenarios.predictors.items() if name != ORACLE], predict_us=scenarios.predict_us,
            frequencies=scenarios.frequencies,
        )  # fmt: skip

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> Mapping[str, Setting]:
        """All that can move, by name."""
        return self._settings

    @property
    def objectives(self) -> tuple[str, ...]:
        """All but the time to the first token: the prefill is not on the clock."""
        return ("tokens_per_s", "p50_ms", "p95_ms", "gpu_bytes")

    @property
    def prompts(self) -> list[str]:
        """Checksums of the prompts, where they are known."""
        return list(self._prompts)

    def about(self) -> dict[str, Any]:
        """Checksums of traces and predictions, of what is known to be hot, and the costs."""
        known = (
            {} if self.frequencies is None else {"frequencies": _checksum(repr(self.frequencies.tolist()))}
        )
        return {
            "runner": "simulator",
            "traces": {name: _checksum_of_trace(trace) for name, trace in self._traces.items()},
            "machines": {one.name: _checksum(repr(_plain(one))) for one in self._machines},
            "predictors": [one.name for one in self._predictors],
            "predict_us": self._predict_us,
            "slots": self._slots,
            **known,  # not in studies from before
        }

    @property
    def nbytes(self) -> int:
        """What its traces take in each process, prepared."""
        L, E = self._settings["lookahead"].most or 1, self._settings["width"].most or 1
        ways = len(self._machines) * (len(self._predictors) + 2)
        each = [len(trace.steps) * (L + 1) * E * 4 * (2 + 2 * min(4, L)) for trace in self._traces.values()]
        arrays = sum(trace.expert_ids.nbytes + trace.weights.nbytes for trace in self._traces.values())
        return int(arrays + ways * sum(each))

    def __getstate__(self) -> dict[str, Any]:
        """Without what is prepared: each process does it for itself, in milliseconds."""
        return {**self.__dict__, "_ready": {}}

    # -- runs ------------------------------------------------------------------------------------------------------

    def run(
        self, settings: Mapping[str, Any], seed: int = 0, is_cancelled: Callable[[], bool] = lambda: False
    ) -> Measured:
        """What a setting would do; nothing is drawn, so the seed changes nothing. Raises as `simulate`."""
        result = self.simulate(settings)
        step_ms = result.step_us / 1e3
        values = {
            "tokens_per_s": result.tokens_per_s,
            "p50_ms": float(np.percentile(step_ms, 50)),
            "p95_ms": float(np.percentile(step_ms, 95)),
            "gpu_bytes": float(result.config["num_slots"] * result.row_bytes),
        }
        return Measured(values, "simulated", settings.get("machine") or self._first_machine(settings))

    def _first_machine(self, settings: Mapping[str, Any]) -> str:
        """Its name, with a word on a model that was packed with a loss: such a point stands beside exact ones."""
        trace = self._traces[settings.get("trace") or next(iter(self._traces))]
        return f"{self._machines[0].name}{lossy_part(trace.model)}"

    def simulate(self, settings: Mapping[str, Any]) -> SimResult:
        """The whole replay of a point, for its timeline.

        Raises:
            UnsupportedOption: the setting cannot be.
            SlotPoolTooSmall: fewer slots than a token needs.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        scenarios = self._scenarios(given.get("trace", next(iter(self._traces))), given.get("batch"))
        scenario = Scenario(
            **{
                "slots": self._slots,
                "machine": self._machines[0].name,
                **{name: value for name, value in given.items() if name in _OF_SCENARIO},
            }
        )
        full = scenarios.resolved(scenario)
        # A dashboard brings what is too much within the model's bounds; here it is no point of its own.
        is_predicting = (full.predictor or NONE) != NONE
        kept = {name: given[name] for name in ("lookahead", "width") if is_predicting and name in given}
        return scenarios.replayed(
            replace(full, **kept),
            least_bytes=given.get("least_bytes"),
            most_in_flight=given.get("most_in_flight"),
        )

    def restore(self) -> None:
        """Nothing was changed."""

    def _scenarios(self, name: str, batch: int | None) -> Scenarios:
        if (name, batch) not in self._ready:
            trace = self._traces[name]
            made = Scenarios(
                trace if batch is None else as_decode(trace, batch),
                self._machines,
                # Recorded predictions are of the steps as they were.
                [one for one in self._predictors if batch is None or not isinstance(one, RecordedPredictor)],
                predict_us=self._predict_us,
                label=name,
                frequencies=self.frequencies,
            )
            self._ready[name, batch] = made
            if len(self._ready) > MOST_READY:
                del self._ready[next(iter(self._ready))]
        return self._ready[name, batch]


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(machine: Machine) -> tuple[Any, ...]:
    alone = None if machine.on_demand is None else asdict(machine.on_demand)
    return (asdict(machine.costs), alone, machine.row_bytes, machine.step_us, machine.least_bytes)


def _checksum_of_trace(trace: RoutingTrace) -> str:
    digest = hashlib.sha256(trace.fingerprint.encode())
    for array in (trace.expert_ids, trace.weights, trace.step, trace.phase):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _machines_of(given: Machine | LayerCosts | Sequence[Machine], row_bytes: int | None) -> list[Machine]:
    if isinstance(given, LayerCosts):
        if row_bytes is None:
            raise UnsupportedOption("costs alone do not say how large an expert is; give row_bytes too")
        return [Machine(given.source, given, row_bytes, 0.0, 0)]
    if row_bytes is not None:
        raise UnsupportedOption("a machine knows its row_bytes; leave them out")
    return [given] if isinstance(given, Machine) else list(given)
