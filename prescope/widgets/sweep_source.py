"""A sweep panel for a runner and a recorded trace: the simulator, the device, and what happens to a chosen point."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from ..cache.num_slots import resolve_slots
from ..engine.job import NamedPrompts
from ..predictor import Predictor, RecordedPredictor
from ..simulator import ORACLE, Scenario, Scenarios
from ..training import own_prompts
from ..tuning import EngineRunner, Proof, SimulatorRunner, Sweep, prove
from ..tuning.prompts import checksum_of_prompt
from ..views.lanes import lanes
from .runner import RealRunner
from .sweep_panel import SweepPanel
from .sweep_plan import TrialPlace
from .sweep_proof import Prover

SIMULATOR, DEVICE = "simulator", "device"
#: Prompts of a proof: some of those that come with prescope.
DOMAINS, MOST_PROMPTS = ("dialogue", "docs"), 2
#: Settings of an engine that a replay does not know.
OF_ENGINE = ("cpu_threads", "decode", "compiled")
#: Of a scenario that names none.
SLOTS = 0.25


class SweepSource:
    """What a sweep panel sweeps: one recorded trace, and the engine it may have been recorded with.

    Args:
        runner: holds the engine. scenarios: of the trace.
        prompts, keywords: of points on the device, as of real runs. report: as of `SweepPanel`.

    Attributes:
        simulator: replays the trace. why_not: the device cannot be swept; "" if it can.
    """

    def __init__(
        self,
        runner: RealRunner,
        scenarios: Scenarios,
        prompts: NamedPrompts,
        keywords: Mapping[str, Any],
        report: Callable[[Sweep, Proof | None, str], Path],
    ) -> None:
        self._report = report
        self._runner, self.scenarios, self._prompts = runner, scenarios, prompts
        self._new_tokens = int(keywords.get("max_new_tokens", 32))
        self.simulator = SimulatorRunner.of_scenarios(scenarios)
        here = next(iter(scenarios.machines.values())).is_here
        self.why_not = "" if here else "the trace was recorded on another machine; record a run here first"

    def panel(
        self,
        *,
        kept: Callable[[], Mapping[str, Any]],
        shows: Callable[[Mapping[str, Any]], go.Figure | None],
    ) -> SweepPanel:
        """A panel that sweeps it; arguments as of `SweepPanel`."""
        return SweepPanel(self.places(), kept, shows, self.prover(), self._report)

    def places(self) -> dict[str, TrialPlace]:
        """Where points can be tried."""
        simulator = TrialPlace(self.simulator, code="SimulatorRunner.of_scenarios(scenarios)")
        if self.why_not:
            return {SIMULATOR: simulator, DEVICE: TrialPlace(None, self.why_not)}
        engine = EngineRunner(
            self._runner.engine, self._prompts, new_tokens=self._new_tokens, predictors=self._predictors()
        )
        code = f"EngineRunner(session.engine, prompts, new_tokens={self._new_tokens})"
        return {SIMULATOR: simulator, DEVICE: TrialPlace(engine, code=code, prepare=self._tell_costs)}

    def prover(self) -> Prover | str:
        """Runs the best of a sweep on the device, on prompts that it did not use; or why nothing can be run."""
        return self.why_not or self._prove

    def timeline(self, settings: Mapping[str, Any]) -> go.Figure:
        """The lanes of two steps of a point, simulated.

        Raises:
            PrescopeError: the setting cannot be, or is of another trace.
        """
        known = {name: value for name, value in settings.items() if name not in OF_ENGINE}
        return lanes(self.simulator.simulate(known))

    def scenario(self, settings: Mapping[str, Any]) -> Scenario | None:
        """A point's settings as the controls of a dashboard have them; None where there is no control for one.

        Raises:
            PrescopeError: the setting cannot be.
        """
        known = {name: value for name, value in settings.items() if name in Scenario.__dataclass_fields__}
        others = settings.keys() - known.keys() - {*OF_ENGINE, "trace"}
        if others or settings.get("trace", self.scenarios.label) != self.scenarios.label:
            return None
        if settings.get("cpu_threads") == 0:
            known["cpu"] = False
        known.setdefault("machine", next(iter(self.scenarios.machines)))
        row_bytes = self.scenarios.machine(Scenario(slots=1, machine=known["machine"])).row_bytes
        known["slots"], _ = resolve_slots(
            known.get("slots", SLOTS), total_experts=self.scenarios.num_experts, row_bytes=row_bytes,
            top_k=self.scenarios.trace.top_k,
        )  # fmt: skip
        return Scenario(**known)

    def _predictors(self) -> list[Predictor]:
        """Those that can predict what was not recorded."""
        every = self.scenarios.predictors.items()
        return [one for name, one in every if name != ORACLE and not isinstance(one, RecordedPredictor)]

    def _tell_costs(self) -> None:
        """Schedules weigh what copying and computing cost here; the trace knows it without a calibration."""
        self._runner.engine.configure(costs=next(iter(self.scenarios.machines.values())).costs)

    def _prove(self, sweep: Sweep, **watch: Any) -> Proof:
        self._tell_costs()
        texts = [text for several in own_prompts(*DOMAINS).values() for text in several]
        unseen = [text for text in texts if checksum_of_prompt(text) not in sweep.prompts][:MOST_PROMPTS]
        return prove(
            sweep,
            self._runner.engine,
            unseen,
            new_tokens=self._new_tokens,
            predictors=self._predictors(),
            **watch,
        )
