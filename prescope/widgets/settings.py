"""The controls for everything that a schedule can be told, on one grid; what does nothing now says why."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ipywidgets as ipw

from ..cache.policies import POLICIES
from ..core.units import format_bytes
from ..scheduler import SCHEDULES
from ..simulator import NOISY, Scenario, Scenarios
from ..views.theme import written
from .control import Control
from .style import boxed

_OWN = "the schedule's own"
HELP = {
    "schedule": "Who decides, after each router has spoken, what is copied, what the CPU computes, what is prefetched.",
    "predictor": "What foresees the experts of coming layers: LLaPor is trained; an oracle knows the recorded future.",
    "recall": "Share of the used experts that the noisy oracle names.",
    "slots": "Places for experts in GPU memory. An expert without one has to be copied before it is used.",
    "cache": "Which expert gives up its slot when another one needs it.",
    "lookahead": "How many layers before its use an expert is predicted.",
    "width": "Experts that are prefetched for one layer at most.",
    "threshold": "Least probability of use at which an expert is prefetched.",
    "cpu": "Experts that are missing may be computed on the CPU, where they lie.",
    "batch": "Sequences that are served together: those of the trace, regrouped.",
    "machine": "Whose link, GPU and CPU times the simulation goes by.",
}  # fmt: skip

#: Of the menu, as far as there are sequences.
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class ScenarioControls:
    """Controls of one `Scenario`.

    Args:
        scenarios: what there is to choose. `slots`: where the slider starts. `changed`: called after each move.
        regrouped: called with another batch instead; it gives the scenarios to `regroup`.
        how_to_measure: what a person who reads that this machine's CPU was not measured is told to do.

    Attributes:
        schedule, predictor, recall, slots, cache, lookahead, width, threshold, cpu, batch, machine: widgets.
        fields: the same with their labels. view: the grid.
    """

    def __init__(
        self,
        scenarios: Scenarios,
        slots: int,
        changed: Callable[[], None],
        regrouped: Callable[[int], None],
        how_to_measure: str,
    ) -> None:
        self._changed, self._regrouped, self._is_quiet = changed, regrouped, True
        self._how_to_measure = how_to_measure
        self._scenarios = scenarios
        titles = [(schedule.title, name) for name, schedule in SCHEDULES.items()]
        self.schedule = ipw.Dropdown(options=titles, value="presched")
        self.predictor, self.machine, self.batch = ipw.Dropdown(), ipw.Dropdown(), ipw.Dropdown()
        self.cache = ipw.Dropdown(options=[_OWN, *POLICIES])
        self.recall = ipw.FloatSlider(value=0.8, min=0.0, max=1.0, step=0.05)
        self.slots = ipw.IntSlider(value=1, min=1, max=10**6)
        self.lookahead = ipw.IntSlider(value=1, min=1, max=4)
        self.width = ipw.IntSlider(value=1, min=0, max=10**4)
        self.threshold = ipw.FloatSlider(value=0.0, min=0.0, max=1.0, step=0.01)
        self.cpu = ipw.Checkbox(value=True, indent=False, description="may compute experts")
        widgets = {
            "schedule": self.schedule, "slots": self.slots, "predictor": self.predictor, "recall": self.recall,
            "lookahead": self.lookahead, "width": self.width, "threshold": self.threshold, "cache": self.cache,
            "cpu": self.cpu, "batch": self.batch, "machine": self.machine,
        }  # fmt: skip
        names = {"cpu": "CPU lane"}
        self.fields = {
            name: Control(names.get(name, name), widget, HELP[name]) for name, widget in widgets.items()
        }
        self.view = boxed(ipw.Box([field.view for field in self.fields.values()]), "ps-controls")
        self.use(scenarios, slots)
        own = {"schedule": self._on_schedule, "batch": self._on_batch}
        for name, widget in widgets.items():
            widget.observe(own.get(name, self._on_move), "value")
        self._is_quiet = False

    # -- what is chosen ----------------------------------------------------------------------------------------

    @property
    def scenario(self) -> Scenario:
        """The settings as the controls stand."""
        return Scenario(
            schedule=self.schedule.value,
            slots=self.slots.value,
            cache=None if self.cache.value == _OWN else self.cache.value,
            predictor=self.predictor.value,
            recall=round(self.recall.value, 3),
            lookahead=self.lookahead.value,
            width=self.width.value,
            threshold=round(self.threshold.value, 3),
            cpu=self.cpu.value,
            machine=self.machine.value,
        )

    def choose(self, scenario: Scenario) -> None:
        """Put all controls where a choice has them; `changed` is called once."""
        full = self._scenarios.resolved(scenario)
        former, self._is_quiet = self._is_quiet, True
        try:
            self.schedule.value, self.predictor.value = full.schedule, full.predictor
            self.cache.value = scenario.cache or _OWN
            self.machine.value, self.cpu.value = scenario.machine, scenario.cpu
            self.slots.value, self.recall.value = scenario.slots, scenario.recall
            self.lookahead.value, self.width.value = max(1, full.lookahead or 0), full.width
            self.threshold.value = full.threshold
        finally:
            self._is_quiet = former
        if not former:
            self._changed()

    def use(self, scenarios: Scenarios, slots: int) -> None:
        """Offer what another trace and its machines have; all settings are the schedule's own then."""
        former, self._is_quiet = self._is_quiet, True
        try:
            self._scenarios = scenarios
            trace = scenarios.trace
            self.predictor.options, self.machine.options = (
                [(written(name), name) for name in scenarios.predictor_names],
                list(scenarios.machines),
            )
            self.machine.value = next(iter(scenarios.machines))
            # No moment at which a bound lies beyond the value: the widget would refuse it.
            self.slots.min, self.slots.max = 1, max(scenarios.num_experts, self.slots.max)
            self.slots.value = min(max(slots, trace.top_k), scenarios.num_experts)
            self.slots.min, self.slots.max = max(1, trace.top_k), scenarios.num_experts
            self.width.value = 0
            self.width.max = trace.num_experts
            self.batch.options = sorted({*(n for n in BATCHES if n <= scenarios.most_batch), scenarios.batch})
            self.batch.value = scenarios.batch
            self.recall.min = math.ceil(20 * trace.top_k / trace.num_experts) / 20
            self._adopt()
        finally:
            self._is_quiet = former

    def regroup(self, scenarios: Scenarios) -> None:
        """Go by the same sequences at another batch: all settings stay."""
        self._scenarios = scenarios

    def _adopt(self) -> None:
        """Controls take the schedule's own values."""
        own = self._scenarios.resolved(
            Scenario(schedule=self.schedule.value, slots=self.slots.value, machine=self.machine.value)
        )
        self.cache.value, self.predictor.value = _OWN, own.predictor
        self.lookahead.value, self.width.value = max(1, own.lookahead or 0), own.width
        self.threshold.value = own.threshold

    def _on_schedule(self, _change: Any) -> None:
        if self._is_quiet:
            return
        self._is_quiet = True
        try:
            self._adopt()
        finally:
            self._is_quiet = False
        self._changed()

    def _on_batch(self, _change: Any) -> None:
        if not self._is_quiet:
            self._regrouped(self.batch.value)

    def _on_move(self, _change: Any) -> None:
        if not self._is_quiet:
            self._changed()

    # -- what does nothing, and why ----------------------------------------------------------------------------

    def explain(self) -> None:
        """Say of each control what it means now, or why it does nothing."""
        scenarios, full = self._scenarios, self._scenarios.resolved(self.scenario)
        way = SCHEDULES[full.schedule]
        ignores = f"{way.title} looks at no predictions" if way.predictor == "none" else ""
        nobody = ignores or ("nothing is predicted: choose a predictor" if full.predictor == "none" else "")
        streams = f"{way.title} copies whole layers" if way.streams else ""
        self.fields["predictor"].allow(ignores)
        is_noisy = full.predictor == NOISY and not ignores  # of any other predictor recall is what it is
        self.fields["recall"].allow("" if is_noisy else "of the noisy oracle")
        (self.fields["recall"].view.remove_class if is_noisy else self.fields["recall"].view.add_class)(
            "ps-hidden"
        )
        self.fields["lookahead"].allow(nobody)
        for name in ("width", "threshold"):
            self.fields[name].allow(nobody or streams)
        machine = scenarios.machine(full)
        has_lane = len(machine.costs.cpu_us) > 1
        remedy = f": {self._how_to_measure}" if machine.is_here else ""
        self.fields["cpu"].allow(
            f"{way.title} never uses the CPU" if not way.uses_cpu
            else "" if has_lane else f"no CPU times of this machine{remedy}"
        )  # fmt: skip
        self.fields["batch"].allow("" if len(self.batch.options) > 1 else "one sequence was recorded")
        self.fields["cache"].allow(note="" if self.cache.value != _OWN else f"{way.title}: {way.cache}")
        count, total = self.slots.value, scenarios.num_experts
        size = format_bytes(count * scenarios.machine(full).row_bytes)
        self.fields["slots"].say(f"<b>{100 * count / total:.0f} %</b> of {total:,}, {size}")

    def published(self, schedule: str) -> Scenario:
        """Another schedule with these slots on this machine, all else its own."""
        return self._scenarios.as_published(replace(self.scenario, schedule=schedule), schedule)
