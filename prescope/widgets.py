"""Live panels for a notebook. Without a browser (PRESCOPE_HEADLESS=1) they show plain figures instead.

`SlimFigureWidget` sends plotly.js to the page once per kernel instead of once per figure, and answers a page
reload with the figure's present state (plotly's own class answers with the first). It leans on privates of
plotly 7 (`_data`, `_layout_obj._props`, widgetbundle.js): `tests/test_widgets.py` holds on to them.
"""

import os
import time
from concurrent.futures import CancelledError
from copy import deepcopy
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets as ipw
import plotly
import plotly.graph_objects as go
import traitlets
from IPython.display import HTML, display

from . import views
from .result import RunResult
from .units import GIB, format_bytes
from .views.theme import CONFIG

if TYPE_CHECKING:
    from .workbench import Job, Prompts, Session

_BUNDLE = Path(plotly.__file__).parent / "package_data" / "widgetbundle.js"
_UPDATE_S = 0.1  # progress is sent at most ten times a second

_STUB = """
async function plotly(model) {
  // One import per page, whatever the number of figures; a failed one may be tried again.
  globalThis.__prescope_plotly__ ??= (async () => {
    const id = model.get("_bundle_ref").slice("IPY_MODEL_".length);
    const bundle = await model.widget_manager.get_model(id);
    const url = URL.createObjectURL(new Blob([bundle.get("code")], { type: "text/javascript" }));
    try { return await import(url); } finally { URL.revokeObjectURL(url); }
  })().catch((error) => { delete globalThis.__prescope_plotly__; throw error; });
  return (await globalThis.__prescope_plotly__).default;
}
export default () => {
  let widget;
  return {
    async initialize(props) {
      widget = (await plotly(props.model))();
      return widget.initialize(props);
    },
    render(props) {
      // Drawn when it has a width: before that, plotly measures texts as nothing and takes 700 pixels.
      let clean, width = 0;
      const observer = new ResizeObserver(() => {
        if (!props.el.clientWidth || props.el.clientWidth === width) return;
        width = props.el.clientWidth;
        if (clean) globalThis.dispatchEvent(new Event("resize")); // Lab's side bars resize no window
        else clean = widget.render(props);
      });
      observer.observe(props.el);
      return () => { observer.disconnect(); clean?.(); };
    },
  };
};
"""


def is_headless() -> bool:
    """Whether nobody can turn a knob: `prescope.report` executes the notebook."""
    return os.environ.get("PRESCOPE_HEADLESS") == "1"


class _Bundle(anywidget.AnyWidget):
    """plotly.js as an invisible widget of its own, one per kernel."""

    _esm = "export default { render() {} };"
    code = traitlets.Unicode().tag(sync=True)


@cache
def _bundle() -> _Bundle:
    return _Bundle(code=_BUNDLE.read_text(encoding="utf-8"))


class SlimFigureWidget(go.FigureWidget):
    """A `FigureWidget` of a few kilobytes that survives a page reload."""

    data: Any  # plotly's property; its packages ship no types

    _esm = _STUB
    _bundle_ref = traitlets.Unicode().tag(sync=True)

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._config = dict(CONFIG)

    @traitlets.default("_bundle_ref")
    def _default_bundle_ref(self) -> str:  # a default: set after __init__ it would come too late for the page
        return f"IPY_MODEL_{_bundle().model_id}"

    def get_state(self, key: Any = None, drop_defaults: bool = False) -> dict[str, Any]:
        """State for the page; the whole one, which a reload asks for, is the figure as it is now."""
        if key is None and hasattr(self, "_layout_obj"):
            self._trait_values["_widget_data"] = deepcopy(self._data)
            self._trait_values["_widget_layout"] = deepcopy(self._layout_obj._props)
        return super().get_state(key=key, drop_defaults=drop_defaults)

    def show_figure(self, figure: go.Figure) -> None:
        """Take over another figure's traces and layout in place: the widget, and with it the page, stays."""
        kinds = [trace.type for trace in figure.data]
        if [trace.type for trace in self.data] == kinds:
            with self.batch_update():
                for mine, new in zip(self.data, figure.data, strict=True):
                    mine.update(new.to_plotly_json(), overwrite=True)
                self.layout.update(figure.layout.to_plotly_json(), overwrite=True)
            return
        self.data = ()
        self.add_traces(figure.data)
        self.layout.update(figure.layout.to_plotly_json(), overwrite=True)


class SlotsPanel:
    """A slider of slots that re-runs the prompts and updates timeline, hit rate and latency in place.

    Releasing the slider starts a run in the background; a run under way is cancelled first. A run that fails
    leaves the figures as they are and shows the error.

    Attributes:
        slots, step: sliders. run_button, cancel_button, bar, status: the other controls.
        figures: name -> SlimFigureWidget.
        result: the run that is shown, or None.
        job: the latest job, or None.
    """

    def __init__(self, session: "Session", prompts: "Prompts", keywords: dict[str, Any]) -> None:
        self._session, self._prompts, self._keywords = session, prompts, keywords
        engine = session.engine
        total, self._row_bytes = engine.shape.total_experts, engine.shape.row_bytes
        self._total = total
        self.result: RunResult | None = None
        self.job: Job | None = None
        self._updated = 0.0
        self.slots = ipw.IntSlider(
            value=engine.num_slots, min=max(1, engine.shape.top_k), max=total, continuous_update=False,
            description="slots", readout=False, layout={"width": "420px"},
        )  # fmt: skip
        self.label = ipw.HTML()
        self.run_button = ipw.Button(description="Run", icon="play", button_style="primary")
        self.cancel_button = ipw.Button(description="Cancel", icon="stop", disabled=True)
        self.bar = ipw.FloatProgress(min=0, max=1, layout={"width": "220px"})
        self.status = ipw.HTML()
        self.step = ipw.IntSlider(
            min=0, max=0, description="first step", continuous_update=False, layout={"width": "420px"}
        )
        # Made here and not when the first run ends: that is in another thread.
        self.figures = {name: SlimFigureWidget() for name in ("timeline", "hit_rate", "latency")}
        self._figure_box = ipw.VBox()
        self.view = ipw.VBox(
            [
                ipw.HBox([self.slots, self.label]),
                ipw.HBox([self.run_button, self.cancel_button, self.bar, self.status]),
                self.step,
                self._figure_box,
            ]
        )
        self._label_slots()
        self.slots.observe(self._on_slots, "value")
        self.step.observe(self._on_step_slider, "value")
        self.run_button.on_click(lambda _: self.start())
        self.cancel_button.on_click(lambda _: self.cancel())
        if session.runs:
            self._show(session.last)

    def state(self) -> dict[str, Any]:
        """Values of all controls, and what the panel shows."""
        return {
            "slots": self.slots.value,
            "slots_frac": self.slots.value / self._total,
            "slots_gib": self.slots.value * self._row_bytes / GIB,
            "first_step": self.step.value,
            "running": self.job is not None and not self.job.is_done,
            "shown_slots": None if self.result is None else self.result.config["num_slots"],
            "status": self.status.value,
        }

    def start(self) -> "Job":
        """Run the prompts with the slots of the slider, in the background."""
        self.cancel()
        self._busy(True)
        self.status.value = "waiting for the former run" if self._session.is_running else "running"
        self.job = self._session.prepare(self._prompts, slots=self.slots.value, **self._keywords)
        self.job.on_step(self._on_token)
        self.job.on_done(self._on_done)
        return self.job.start()

    def cancel(self) -> None:
        """End the run after the token it is at; the figures then show what there is."""
        if self.job is not None:
            self.job.cancel()

    def close(self) -> None:
        """Stop the run and take the panel off the page; the former result stays in the session."""
        self.cancel()
        self.job = None
        for widget in (*self.figures.values(), self.view):
            widget.close()

    def _label_slots(self) -> None:
        count = self.slots.value
        self.label.value = (
            f"<b>{100 * count / self._total:.0f} %</b> = {count} of {self._total} experts = "
            f"{count * self._row_bytes / GIB:.3g} GiB ({format_bytes(count * self._row_bytes)})"
        )

    def _busy(self, busy: bool) -> None:
        self.cancel_button.disabled = not busy
        self.bar.value = 0.0 if busy else 1.0
        self.bar.bar_style = "info" if busy else "success"

    def _on_slots(self, _change: Any) -> None:
        self._label_slots()
        self.start()

    def _on_step_slider(self, _change: Any) -> None:
        if self.result is not None and not self.result.events.empty:
            self.figures["timeline"].show_figure(views.timeline(self.result, self._steps()))

    def _steps(self) -> range:
        return range(self.step.value, self.step.value + 2)

    def _on_token(self, job: "Job") -> None:
        if job is self.job and time.monotonic() - self._updated > _UPDATE_S:
            self._updated = time.monotonic()
            self.bar.value = job.progress
            self.status.value = f"{job.num_tokens} tokens"

    def _on_done(self, job: "Job") -> None:
        """Runs in the job's thread; a job that a newer one has replaced shows nothing."""
        if job is not self.job:
            return
        self._busy(False)
        error = job.error
        if error is None:
            self._show(job.result())
            self.bar.bar_style = "warning" if job.is_cancelled else "success"
            self.status.value = "; ".join(["done", *map(escape, job.result().notes)])
        elif isinstance(error, CancelledError):
            self.status.value = "cancelled before the first token; the figures show the former run"
        else:
            self.bar.bar_style = "danger"
            text = f"<b>{escape(type(error).__name__)}</b>: {escape(str(error))}"
            self.status.value = f"{text} The figures show the former run."

    def _show(self, run: RunResult) -> None:
        is_first, self.result = self.result is None, run
        self.step.max = max(0, len(run.steps) - 2)
        if is_first and not run.events.empty:
            self.step.value = views.timeline_info(run).steps[0].step
        figures = _figures(run, self._steps())
        for name, figure in figures.items():
            self.figures[name].show_figure(figure)
        self._figure_box.children = tuple(self.figures[name] for name in figures)

    def _ipython_display_(self) -> None:
        if not is_headless():
            display(self.view)
            return
        display(HTML(f"<p>Slots: {self.label.value}</p>"))
        for figure in _figures(self.result, self._steps()).values() if self.result is not None else ():
            display(figure)


def _figures(run: RunResult, steps: range) -> dict[str, go.Figure]:
    """The panel's figures that this run has the evidence for."""
    has_decode = (run.steps["phase"] == "decode").any()
    figures = {} if run.events.empty else {"timeline": views.timeline(run, steps)}
    if has_decode:
        figures |= {"hit_rate": views.hit_rate(run), "latency": views.latency(run)}
    return figures
