"""Will this model run on this machine? A config and seven numbers in, a curve and plain advice out."""

import threading
from html import escape
from typing import Any

import ipywidgets as ipw
import plotly.graph_objects as go

from ..advice import KNOWN, Advice, MachineSpec, ModelSize, advise
from ..device import describe_auto
from ..engine import Engine
from ..errors import BadProfile, NoProfile, PrescopeError, UnsupportedOption
from ..profile import HardwareProfile
from ..profile.files import shipped_files
from ..simulator import HERE
from ..traces.routing import RoutingTrace
from ..views.capacity import capacity
from .background import in_background
from .control import Control
from .figures import SlimFigureWidget
from .measure_machine import MeasureMachine
from .showing import show_panel, take_off
from .style import boxed, panel
from .tables import frame_html

TYPED = "typed in"
SIMULATING = "<p class='ps-soft'>simulating …</p>"
#: Field of `MachineSpec` -> name, help, step.
NUMBERS = {
    "link_gb_per_s": ("link, GB/s", "Copies from pinned host memory to the GPU: PCIe 4 x16 gives 25, PCIe 5 55.", 1.0),
    "host_gib": ("host, GiB", "Host memory: all experts have to lie there.", 8.0),
    "host_gb_per_s": ("host, GB/s", "Rate at which all cores together read host memory.", 5.0),
    "gpu_gib": ("GPU, GiB", "Memory of the GPU.", 1.0),
    "gpu_gb_per_s": ("GPU, GB/s", "Rate of the GPU's memory.", 50.0),
    "cores": ("cores", "That compute experts; 0 switches the CPU lane off.", 1),
}  # fmt: skip


class CapacityPanel:
    """Model and machine, the curve of what GPU memory buys, and the advice.

    Args:
        models: by name: engines, sizes, or what `advise` takes; where the first is an engine, its machine can be
            measured. machine: name of a profile to begin with.
        trace: a recorded one of the first model, instead of guessed routing.

    Raises:
        UnsupportedOption: there is no machine of this name.

    Attributes:
        model, machine, batch, context, budget: controls. advice: the latest. figure: the curve. view: all of it.
        trace: as given; assign another one before a redraw. measure: the button that measures, or None.
    """

    def __init__(
        self,
        models: dict[str, Engine | ModelSize | str],
        machine: str | None = None,
        trace: RoutingTrace | None = None,
    ) -> None:
        self._models, self.trace = models, trace
        self._first = next(iter(models))
        self._lock = threading.Lock()
        self._asked = 0
        self.advice: Advice | None = None
        first = models[self._first]
        self._specs = _known_machines(first)
        self.measure = MeasureMachine(first, self._use_measured) if isinstance(first, Engine) else None
        names = [*self._specs, TYPED]
        if machine is not None and machine not in names:
            raise UnsupportedOption(f"machine is {machine!r}; choose one of {', '.join(map(repr, names))}")
        self.model = ipw.Dropdown(options=list(models))
        self.machine = ipw.Dropdown(options=names, value=machine or names[0])
        self.batch = ipw.BoundedIntText(value=1, min=1, max=256)
        self.context = ipw.BoundedIntText(value=4096, min=1, max=10**7)
        self.budget = ipw.BoundedFloatText(value=0.0, min=0.0, max=10**5)
        self.numbers = {
            name: ipw.BoundedFloatText(min=0.0, max=10**7, step=step)
            for name, (_, _, step) in NUMBERS.items()
        }
        fields = [
            Control("model", self.model, "A folder, a hub id or a published shape: only its config is read."),
            Control("machine", self.machine, "A measured profile, or numbers of your own."),
            Control("batch", self.batch, "Sequences side by side."),
            Control("context", self.context, "Tokens of each sequence, for keys and values."),
            Control("budget, GiB", self.budget, "GPU memory that may be used; 0 for all of it."),
            *(Control(NUMBERS[name][0], widget, NUMBERS[name][1]) for name, widget in self.numbers.items()),
        ]
        self._machine_field = fields[1]
        fields[4].say("0: all of it")
        self.words, self.table = ipw.HTML(), ipw.HTML()
        self.figure = SlimFigureWidget()
        rows = [field.view for field in fields]
        if self.measure is not None:
            rows.insert(2, self.measure.view)
        controls = boxed(ipw.Box(rows), "ps-controls", "ps-holds-wide")
        self._shown = shown = boxed(ipw.VBox([self.words, self.table]), "ps-figures")
        self.part = boxed(ipw.Box([controls, shown]), "ps-side")
        self.view = panel(self.part)
        self._is_quiet = False
        self._fill()
        for widget in (self.model, self.machine, self.batch, self.context, self.budget):
            widget.observe(self._on_move, "value")
        for widget in self.numbers.values():
            widget.observe(self._on_number, "value")

    def spec(self) -> MachineSpec:
        """The machine as the controls say: measured, or with the numbers typed in."""
        known = self._specs.get(self.machine.value)
        numbers = {name: widget.value for name, widget in self.numbers.items()}
        return known if known is not None else MachineSpec(**{**numbers, "cores": int(numbers["cores"])})

    def redraw(self) -> Advice | None:
        """Simulate what the controls say, and draw it; an error is told in words."""
        with self._lock:
            self._asked += 1
            asked = self._asked
        name = self.model.value
        model = self._models[name]
        try:
            advice = advise(
                model, self.spec(), batch=self.batch.value, context=self.context.value,
                gpu_gib=self.budget.value or None, trace=self.trace if name == self._first else None,
            )  # fmt: skip
        except PrescopeError as error:
            if asked == self._asked:
                self._fail(error)
            return None
        with self._lock:
            if asked != self._asked:  # something was moved meanwhile
                return None
            self.advice = advice
            self.words.value = advice_html(advice)
            self.figure.show_figure(capacity(advice))
            self._shown.children = (self.words, self.figure, self.table)
            self.table.value = frame_html(advice.table())
            self._mark(is_former=False)
        return advice

    def _fail(self, error: Exception) -> None:
        self.words.value = f"<p class='ps-error'><b>{type(error).__name__}</b>: {escape(str(error))}</p>"

    def _mark(self, *, is_former: bool) -> None:
        """Figure and table are of other settings than those shown, until the simulation is done."""
        for part in (self.figure, self.table):
            (part.add_class if is_former else part.remove_class)("ps-stale")

    def soon(self) -> None:
        """Redraw in the background: thousands of layers are simulated, which takes a second or some."""
        self.words.value = SIMULATING + self.words.value.removeprefix(SIMULATING)
        self._mark(is_former=True)
        in_background("advice", self.redraw, self._fail)

    def close(self) -> None:
        """Take the panel off the page; what is still being simulated is shown to nobody."""
        with self._lock:
            self._asked += 1
        if self.measure is not None:
            self.measure.close()
        take_off(self.view, self.figure)

    def _fill(self) -> None:
        """The numbers of the chosen machine, and whose they are."""
        known = self._specs.get(self.machine.value)
        self._machine_field.say(machine_note(self.machine.value))
        if known is None:
            return
        former, self._is_quiet = self._is_quiet, True
        for name, widget in self.numbers.items():
            # To four digits: an emulated link of 0.12 GB/s became one of 0.1 as soon as another number was typed.
            widget.value = float(f"{getattr(known, name):.4g}")
        self._is_quiet = former

    def _on_move(self, change: Any) -> None:
        if self._is_quiet:
            return
        if change["owner"] is self.machine:
            self._fill()
        self.soon()

    def _on_number(self, _change: Any) -> None:
        if self._is_quiet:
            return
        self._is_quiet = True
        self.machine.value = TYPED
        self._machine_field.say(machine_note(TYPED))
        self._is_quiet = False
        self.soon()

    def _use_measured(self) -> None:
        """Offer and choose this machine as it was measured just now, and draw the advice anew."""
        self._specs = _known_machines(self._models[self._first])
        former, self._is_quiet = self._is_quiet, True
        self.machine.options = [*self._specs, TYPED]
        self.machine.value = HERE if HERE in self._specs else TYPED
        self._fill()
        self._is_quiet = former
        self.soon()

    def plain(self) -> list[go.Figure]:
        """The figure without widgets."""
        return [] if self.advice is None else [capacity(self.advice)]

    def _ipython_display_(self) -> None:
        if self.advice is None:
            self.redraw()
        show_panel(self.view, self.words.value, self.plain())


def _known_machines(first: Engine | ModelSize | str) -> dict[str, MachineSpec]:
    """This machine if it has been calibrated, and those that come with prescope."""
    described = first.hardware() if isinstance(first, Engine) else describe_auto()
    try:
        known = {HERE: MachineSpec.of_profile(HardwareProfile.of_this_machine(described), HERE)}
    # Not calibrated, or damaged, or of an older calibration, which did not note the GPU's memory.
    except (NoProfile, BadProfile, UnsupportedOption):
        known = {}
    for file in shipped_files():
        profile = HardwareProfile.load(file)
        if profile.link_gb_per_s is None:  # an emulated link is nobody's machine
            known[file.stem] = MachineSpec.of_profile(profile, file.stem)
    return known | KNOWN


def machine_note(name: str) -> str:
    """Whose the numbers of a choice of machine are, in a few words."""
    return {HERE: "", TYPED: "your numbers"}.get(name, "shipped with prescope")


def advice_html(advice: Advice) -> str:
    """The advice in words, then what it goes by."""
    facts = "".join(
        f"<tr><td class='ps-words ps-soft'>{escape(what)}</td>"
        f"<td class='ps-words ps-long'>{escape(value)}</td></tr>"
        for what, value in advice.facts()
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in advice.assumptions)
    mood = "ps-bad" if advice.kind == "not with this machine" else "ps-good"
    kind = f"<span class='{mood}'>{escape(advice.kind[0].upper() + advice.kind[1:])}.</span>"
    return (
        f"<div class='ps-advice'><p class='ps-verdict'>{kind} {escape(advice.words)}</p>"
        f"<table class='ps-table'><tbody>{facts}</tbody></table><details><summary>{len(advice.assumptions)} assumptions"
        f"</summary><ul>{notes}</ul></details></div>"
    )
