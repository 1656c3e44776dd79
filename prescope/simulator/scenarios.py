"""Scenarios of one recorded trace: it is prepared once for each pair of a machine and a predictor."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..errors import UnsupportedOption
from ..predictor import NoisyOracle, Oracle, Predictor, RecordedPredictor
from ..predictor.checked import require_predictor
from ..scheduler import SCHEDULES, schedule_named
from ..scheduler.settings import resolve
from ..traces.events import DECODE
from ..traces.routing import RoutingTrace
from .explain import LayerExplanation, explain_layer
from .machines import Machine
from .prepare import LOOKAHEAD, in_batches
from .result import SimResult
from .scenario import NOISY, NONE, ORACLE, Scenario
from .simulator import Simulator

#: Results that are remembered.
MOST_RESULTS = 48
#: What tells the setting of a measured run, and what it gave.
MEASURED = {
    "schedule", "num_slots", "cache", "cpu", "tokens_per_s", "tokens_per_s_runs", "p50_ms", "p95_ms", "hit_rate",
    "link_use_frac", "bytes_per_token",
}  # fmt: skip
#: Traces prepared for a machine and a predictor that are kept: each recall of a noisy oracle is one.
MOST_SIMULATORS = 64
#: Instead of a predictor that a schedule comes with and that is not there, the best first.
STAND_INS = ("llapor", "early router", "transition", "frequency")


class Scenarios:
    """Simulate one recorded trace under any settings, on any machine.

    Args:
        trace: with decode steps, and with router inputs if any predictor reads them.
        machines: to replay on.
        predictors: by their names. "none", "oracle" and "noisy oracle" are there anyway.
        predict_us: what one prediction costs on the first machine, by name; elsewhere it is not known and left out.
        label: of the trace, for titles.
        measured: runs of the first machine, as `Recording` keeps them.
        commands: what to type to record the trace again.
        frequencies: (L, E) by which the engine at hand knows hot experts, for caches and schedules that ask; without,
            those that need them go by this very trace's.
        note: of each result.

    Raises:
        UnsupportedOption: no machine, something that is no predictor, or two of one name.

    Attributes:
        frequencies: as given. `first_machine`: name of the machine that was given first.
    """

    def __init__(
        self,
        trace: RoutingTrace,
        machines: Sequence[Machine],
        predictors: Iterable[Predictor] = (),
        *,
        predict_us: Mapping[str, float] | None = None,
        label: str = "",
        measured: Sequence[Mapping[str, Any]] = (),
        commands: Sequence[str] = (),
        frequencies: NDArray[np.floating] | None = None,
        note: str = "",
    ) -> None:
        if isinstance(predictors, Predictor) or not machines:
            raise UnsupportedOption(
                "scenarios take a list of predictors, of one too, and one machine at least"
            )
        self._measured, self.commands, self._note = measured, tuple(commands), note
        self.trace, self.label, self.frequencies = trace, label or trace.model, frequencies
        self.machines = {machine.name: machine for machine in machines}
        self.first_machine = next(iter(self.machines))
        lookahead = min(LOOKAHEAD, max(1, trace.num_layers - 1))
        self.predictors: dict[str, Predictor] = {}
        for predictor in predictors:
            require_predictor(predictor, "replay")
            if self.predictors.get(predictor.name, predictor) is not predictor or predictor.name == NONE:
                raise UnsupportedOption(
                    f"a scenario tells predictors apart by their names, and {predictor.name!r} is taken; set another "
                    f"name of this one: predictor.name = ..."
                )
            self.predictors[predictor.name] = predictor
        self.predictors.setdefault(ORACLE, Oracle(trace.shape, lookahead))
        self.predict_us = dict(predict_us or {})
        self._lookahead = lookahead
        self._simulators: dict[tuple[str, str, bool], Simulator] = {}
        self._results: dict[Scenario, SimResult] = {}
        self._as_recorded = self  # of those that were regrouped: what they were made of
        for name in (NONE, *self.predictors):
            self.simulator(Scenario(slots=1, predictor=name, machine=self.first_machine))

    # -- names -------------------------------------------------------------------------------------------------

    @property
    def predictor_names(self) -> list[str]:
        """All predictors that a scenario may name, those that know the future last."""
        known = [name for name in self.predictors if name != ORACLE]
        return [NONE, *known, NOISY, ORACLE]

    @property
    def num_experts(self) -> int:
        """Experts of the whole model."""
        return self.trace.num_layers * self.trace.num_experts

    @property
    def batch(self) -> int:
        """Tokens of a decode step, the most of any."""
        return self.simulator(Scenario(slots=1, predictor=NONE, machine=self.first_machine)).batch

    @property
    def most_batch(self) -> int:
        """Sequences of the trace: as many can be served at a time."""
        return len(np.unique(self.trace.sequence[self.trace.position >= 0]))

    def at_batch(self, batch: int) -> "Scenarios":
        """The same sequences served `batch` at a time, with what predictors said of them; nothing was measured of that.

        Raises:
            UnsupportedOption: there are not as many sequences.
        """
        if self._as_recorded is not self:
            return self._as_recorded.at_batch(batch)
        if batch == self.batch:
            return self
        trace, rows = in_batches(self.trace, batch)
        decoded = rows[trace.phase == DECODE]
        known = [
            one
            if not isinstance(one, RecordedPredictor)
            else RecordedPredictor.of_scores(
                trace,
                [one.replay(self.trace, ahead)[decoded] for ahead in range(1, one.lookahead + 1)],
                name=one.name,
                is_calibrated=one.is_calibrated,
            )
            for name, one in self.predictors.items()
            if name != ORACLE  # made anew
        ]
        made = Scenarios(
            trace, list(self.machines.values()), known, predict_us=self.predict_us, label=self.label,
            commands=self.commands, frequencies=self.frequencies,
            note=f"regrouped to batch {batch}; the machine's times are those of batch {self.batch}",
        )  # fmt: skip
        made._as_recorded = self
        return made

    def machine(self, scenario: Scenario) -> Machine:
        """The machine of a scenario.

        Raises:
            UnsupportedOption: there is none of this name.
        """
        if scenario.machine not in self.machines:
            names = ", ".join(map(repr, self.machines))
            raise UnsupportedOption(f"machine is {scenario.machine!r}; choose one of {names}")
        return self.machines[scenario.machine]

    def has_cpu(self, scenario: Scenario) -> bool:
        """Whether the CPU lane can be used: by this schedule, on this machine."""
        return schedule_named(scenario.schedule).uses_cpu and len(self.machine(scenario).costs.cpu_us) > 1

    def why_not_here(self, scenario: Scenario) -> str:
        """Why a scenario cannot be run on the engine; "" if it can."""
        if not self.machine(scenario).is_here:
            here = [name for name, machine in self.machines.items() if machine.is_here]
            if not here:
                return "recorded on another machine, so it can only be simulated: record a run here first"
            return f"only {here[0]!r} can be run, {scenario.machine!r} can be simulated"
        full = self.resolved(scenario)
        if full.predictor in (ORACLE, NOISY):
            return "an oracle knows the recorded future; live there is none"
        if isinstance(self.predictors.get(full.predictor or NONE), RecordedPredictor):
            return f"the predictions of {full.predictor} were recorded; train a predictor to run it"
        if schedule_named(full.schedule).needs_predictor and (full.predictor or NONE) == NONE:
            return f"{full.schedule} prefetches by predictions; choose a predictor"
        return ""

    # -- settings ----------------------------------------------------------------------------------------------

    def resolved(self, scenario: Scenario) -> Scenario:
        """A scenario with the schedule's own values where it names none, and within what the trace has."""
        schedule = schedule_named(scenario.schedule)
        predictor = scenario.predictor or self._own_predictor(schedule.predictor)
        if predictor not in self.predictor_names:
            names = ", ".join(map(repr, self.predictor_names))
            raise UnsupportedOption(f"predictor is {predictor!r}; choose one of {names}")
        E, depth = self.trace.num_experts, self._depth(predictor)
        found = resolve(
            schedule.name,
            num_experts=E,
            top_k=self.trace.top_k,
            depth=depth,
            predictor=predictor,
            lookahead=None if scenario.lookahead is None else min(scenario.lookahead, depth),
            width=None if scenario.width is None else min(scenario.width, E),
            threshold=scenario.threshold,
            cpu=None if scenario.cpu else False,
            has_cpu=self.has_cpu(scenario),
        )
        return replace(
            scenario,
            cache=scenario.cache or schedule.cache,
            predictor=predictor,
            lookahead=found.settings.lookahead,
            width=found.settings.width,
            threshold=found.settings.threshold,
            cpu=found.cpu,
        )

    def _own_predictor(self, wanted: str) -> str:
        """The one a schedule comes with, or the next best there is."""
        if wanted == NONE:
            return NONE
        known = [name for name in (wanted, *STAND_INS) if name in self.predictors]
        return known[0] if known else NONE

    def _depth(self, predictor: str) -> int:
        if predictor == NONE:
            return 0
        return (
            self._lookahead
            if predictor == NOISY
            else min(self._lookahead, self.predictors[predictor].lookahead)
        )

    def as_published(self, scenario: Scenario, schedule: str) -> Scenario:
        """Another schedule with its own cache, predictor and settings; slots, machine and CPU lane stay."""
        return Scenario(schedule=schedule, slots=scenario.slots, cpu=scenario.cpu, machine=scenario.machine)

    def engine_settings(self, scenario: Scenario) -> dict[str, Any]:
        """The same scenario as keywords of `Engine.configure`, to run it on the engine.

        Raises:
            UnsupportedOption: it can only be simulated.
        """
        if reason := self.why_not_here(scenario):
            raise UnsupportedOption(reason)
        full, machine = self.resolved(scenario), self.machine(scenario)
        name = full.predictor or NONE
        return {
            "schedule": full.schedule,
            "slots": full.slots,
            "cache": full.cache,
            "lookahead": full.lookahead or None,
            "width": full.width,
            "threshold": full.threshold,
            "cpu_threads": None if full.cpu else 0,
            "predictor": NONE if name == NONE else self.predictors[name],
            "costs": machine.costs_with(full.cpu),
        }

    def measured_there(self, scenario: Scenario) -> Mapping[str, Any] | None:
        """What was measured under this very setting where the trace was recorded; None if nothing was."""
        full = self.resolved(scenario)
        for row in self._measured:
            if not row.keys() >= MEASURED:
                continue
            known = Scenario(
                schedule=row["schedule"],
                slots=row["num_slots"],
                cache=row["cache"],
                cpu=row["cpu"],
                machine=self.first_machine,
            )
            if replace(self.resolved(known), recall=full.recall) == full:
                return row
        return None

    # -- replays -----------------------------------------------------------------------------------------------

    def simulator(self, scenario: Scenario) -> Simulator:
        """The trace prepared for a scenario's machine and predictor."""
        full, machine = self.resolved(scenario), self.machine(scenario)
        name, costs = full.predictor or NONE, machine.costs_of(full.schedule, full.cache)
        key = (
            scenario.machine,
            f"{NOISY} {scenario.recall:.3f}" if name == NOISY else name,
            costs is machine.costs,
        )
        if key not in self._simulators:
            if scenario.machine == self.first_machine:
                costs = costs.with_predictor(self.predict_us.get(name, 0.0))
            self._simulators[key] = Simulator(
                self.trace,
                costs,
                row_bytes=machine.row_bytes,
                predictor=self._predictor(name, scenario.recall),
                lookahead=self._lookahead,
                step_us=machine.step_us,
                label=self.label,
            )
            if len(self._simulators) > MOST_SIMULATORS:
                del self._simulators[next(iter(self._simulators))]
        return self._simulators[key]

    def _predictor(self, name: str, recall: float) -> Predictor | None:
        if name == NONE:
            return None
        if name != NOISY:
            return self.predictors[name]
        least = self.trace.top_k / self.trace.num_experts
        kept = min(1.0, max(least, recall))
        return NoisyOracle(self.trace, {1: kept, self._lookahead: kept})

    def run(self, scenario: Scenario) -> SimResult:
        """Replay the trace; the last results are remembered, for who compares asks for the same ones again.

        Raises: as `Simulator.run`.
        """
        full = self.resolved(scenario)
        if full.predictor != NOISY:
            full = replace(full, recall=Scenario.recall)
        if full not in self._results:
            self._results[full] = self.replayed(full)
            if len(self._results) > MOST_RESULTS:
                del self._results[next(iter(self._results))]
        return self._results[full]

    def replayed(
        self, full: Scenario, *, least_bytes: int | None = None, most_in_flight: int | None = None
    ) -> SimResult:
        """Replay the trace under a scenario whose settings are all resolved; the rest as of `Simulator.run`.

        Args:
            least_bytes: the machine's unless given.
        """
        simulator = self.simulator(full)
        result = simulator.run(
            full.schedule,
            slots=full.slots,
            cache=full.cache,
            lookahead=full.lookahead,
            width=full.width,
            threshold=full.threshold,
            cpu=full.cpu,
            frequencies=self.frequencies,
            least_bytes=self.machine(full).least_bytes if least_bytes is None else least_bytes,
            most_in_flight=most_in_flight,
        )
        if full.lookahead and not simulator.costs.predict_us:
            result.notes.append(f"what a prediction of {full.predictor} costs here is not known; it is free")
        if self._note:
            result.notes.append(self._note)
        return result

    def compare(self, scenario: Scenario, *, published: bool = True) -> dict[str, SimResult]:
        """Every schedule with these slots on this machine, by name; the scenario's own with all its settings.

        Args:
            published: the others with the cache, predictor and settings of their own; else with those chosen.
        """
        results = {}
        for name in SCHEDULES:
            other = self.as_published(scenario, name) if published else replace(scenario, schedule=name)
            results[name] = self.run(scenario if name == scenario.schedule else other)
        return results

    def table(self, results: Mapping[str, SimResult]) -> pd.DataFrame:
        """One row for each schedule: what it did, and the bound beside it. Of its prefetches accuracy, coverage and
        timeliness, as `METRIC_DEFINITIONS` defines them; NaN where there were none.
        """
        rows = []
        for name, result in results.items():
            title, counts, decode = SCHEDULES[name].title, result.counts, result.metrics.decode
            idle_us = decode.stall_ms + decode.cpu_wait_ms + decode.host_wait_ms
            rows.append(
                {
                    "schedule": title,
                    "tokens/s": result.tokens_per_s,
                    "hit %": 100 * counts.hits / max(1, counts.needed),
                    "late %": 100 * counts.late / max(1, counts.needed),
                    "miss %": 100 * (counts.misses - counts.on_cpu) / max(1, counts.needed),
                    "on CPU %": 100 * counts.on_cpu / max(1, counts.needed),
                    "prefetches used %": 100 * decode.prefetch_accuracy,
                    "misses avoided %": 100 * decode.prefetch_coverage,
                    "used ones on time %": 100 * decode.prefetch_timeliness,
                    "MB per step": decode.h2d_bytes / decode.num_steps / 1e6,
                    "link busy %": 100 * decode.link_use_frac,
                    "GPU idle %": 100 * idle_us / decode.wall_ms,
                    "bound, tokens/s": result.bounds.tokens_per_s,
                    "cache": result.config["cache"],
                    "predictor": result.config["predictor"],
                }
            )
        return pd.DataFrame(rows).set_index("schedule")

    def bounds(self, scenario: Scenario) -> pd.DataFrame:
        """What no schedule can beat with these slots on this machine."""
        schedule = schedule_named(scenario.schedule)
        knows_hot = self.frequencies is not None or schedule.lives_on_frequencies(scenario.cache)
        found = self.simulator(scenario).bounds(
            scenario.slots,
            cpu=scenario.cpu and self.has_cpu(scenario),
            placed=schedule.places and knows_hot,
        )
        needed = max(1, len(self.simulator(scenario).needs.experts))
        rows = [
            (
                "misses of the best cache that loads on demand (Belady)",
                100 * found.belady_misses / needed,
                "%",
            ),
            ("misses of the best fixed set of experts", 100 * found.static_misses / needed, "%"),
            ("Belady's misses over the link", found.link_ms, "ms per step"),
            ("the fewest misses over link and CPU together", found.link_cpu_ms, "ms per step"),
            ("all that the GPU does", found.gpu_ms, "ms per step"),
            ("tokens per second at the longer of these", found.tokens_per_s, "1/s"),
        ]
        return pd.DataFrame(rows, columns=["bound", "value", "unit"]).set_index("bound")

    @staticmethod
    def notes() -> pd.DataFrame:
        """What of each schedule is as published, and what is not known or ours."""
        rows = [(one.title, one.same, one.unknown, one.source) for one in SCHEDULES.values()]
        columns = ["schedule", "same as published", "not known, or ours", "source"]
        return pd.DataFrame(rows, columns=columns).set_index("schedule")

    def explain(
        self, scenario: Scenario, step: int, moe_layer: int, result: SimResult | None = None
    ) -> LayerExplanation:
        """Where each expert of one layer of one step went, and what was weighed.

        Args:
            step: number as in the trace. `result`: of this scenario, if it was simulated already.

        Raises:
            UnsupportedOption: there is no such decode step or layer.
        """
        found = result or self.run(scenario)
        return explain_layer(self.simulator(scenario), found, step, moe_layer, self.frequencies)
