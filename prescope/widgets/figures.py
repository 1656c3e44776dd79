"""The figure of all live panels.

`SlimFigureWidget` sends plotly.js to the page once per kernel instead of once per figure, answers a page reload with
the figure's present state (plotly's own class answers with the first), and keeps the axes where a person has put them.
It leans on privates of plotly 7 (`_data`, `_layout_obj._props`, widgetbundle.js): `tests/widgets/test_widgets.py` holds
on to them.
"""

import os
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import anywidget
import plotly
import plotly.graph_objects as go
import traitlets
from plotly.basedatatypes import BaseFigure, Undefined

from ..views.theme import CONFIG

_BUNDLE = Path(plotly.__file__).parent / "package_data" / "widgetbundle.js"

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
// What Python says of a figure; plotly's part of the page listens to these.
const SAID = ["addTraces", "deleteTraces", "moveTraces", "restyle", "relayout", "update", "animate",
  "removeLayoutProps", "removeTraceProps"].map((name) => `_py2js_${name}`);
export default () => {
  let ready;
  return {
    initialize(props) {
      // Returns at once: of a model that takes two seconds anywidget 0.11 drops all messages for good, and on a busy
      // machine the bundle takes longer (an empty figure that nothing could fill). What is said meanwhile is kept.
      const { model } = props, kept = [];
      const ears = SAID.map((name) => [`change:${name}`, () => kept.push([name, model.get(name)])]);
      ears.forEach(([event, note]) => model.on(event, note));
      ready = plotly(model).then((make) => {
        const widget = make();
        ears.forEach(([event, note]) => model.off(event, note));
        widget.initialize(props);
        kept.forEach(([name, value]) => model.set(name, value));
        return widget;
      });
      ready.catch(() => {}); // told where it is drawn
    },
    async render(props) {
      const { model, el } = props, names = "change:_dom_classes";
      // anywidget takes the page's ears off the model before it draws: a figure's classes would stay as they were.
      const dress = () => {
        el.classList.remove(...[...el.classList].filter((name) => name.startsWith("ps-")));
        el.classList.add(...(model.get("_dom_classes") ?? []));
      };
      dress();
      model.on(names, dress);
      const widget = await ready;
      // Drawn when it has a width: before that, plotly measures texts as nothing and takes 700 pixels.
      let clean, width = 0;
      const observer = new ResizeObserver(() => {
        if (!el.clientWidth || el.clientWidth === width) return;
        width = el.clientWidth;
        if (clean) globalThis.dispatchEvent(new Event("resize")); // Lab's side bars resize no window
        else clean = widget.render(props);
      });
      observer.observe(el);
      return () => { model.off(names, dress); observer.disconnect(); clean?.(); };
    },
  };
};
"""


def is_headless() -> bool:
    """Whether nobody can turn a knob: `prescope.report` executes the notebook."""
    return os.environ.get("PRESCOPE_HEADLESS") == "1"


def _at(properties: dict[str, Any], path: str) -> Any:
    """What stands at "marker.color", say; None, which the page takes for nothing, if nothing does."""
    found: Any = properties
    for key in BaseFigure._str_to_dict_path(path):
        try:
            found = found[key]
        except (KeyError, IndexError, TypeError):
            return None
    return found


class _Bundle(anywidget.AnyWidget):
    """plotly.js as an invisible widget of its own, one per kernel."""

    _esm = "export default { render() {} };"
    code = traitlets.Unicode().tag(sync=True)


#: Where plotly's part of the page reports to Python, after each change, what it has filled in: two merges of the whole
#: figure before the change is painted, and a message back. `_forget_deltas` would drop it.
_REPORTS = re.compile(r"_send(?:Trace|Layout)Deltas?\(\w+\)\{")


def without_reports(code: str) -> str:
    """Plotly's part of the page, which then says nothing of what Python told it. Code without reports stays."""
    return _REPORTS.sub(lambda found: f"{found.group()}return;", code)


@cache
def _bundle() -> _Bundle:
    return _Bundle(code=without_reports(_BUNDLE.read_text(encoding="utf-8")))


class SlimFigureWidget(go.FigureWidget):
    """A `FigureWidget` of a few kilobytes that survives a page reload."""

    data: Any  # plotly's property; its packages ship no types

    _esm = _STUB
    _bundle_ref = traitlets.Unicode().tag(sync=True)
    #: The page does not say when an edit is done, so none is waited for.
    _trace_edit_in_process = _layout_edit_in_process = property(lambda self: False, lambda self, value: None)

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._config = dict(CONFIG)
        self._parts: list[dict[str, Any]] = []
        self._fitting: dict[str, list[float]] = {}
        self._zoomed: set[str] = set()
        self._on_zoom: dict[str, Callable[[float, float], None]] = {}

    def on_zoom(self, axis: str, watcher: Callable[[float, float], None]) -> None:
        """Call `watcher(low, high)` when a person chooses the range of an axis, "xaxis" say, on the page."""
        self._on_zoom[axis] = watcher

    @property
    def zoomed(self) -> frozenset[str]:
        """Axes whose range a person has chosen; `show_parts` leaves those alone."""
        return frozenset(self._zoomed)

    @traitlets.observe("_js2py_traceDeltas", "_js2py_layoutDelta")
    def _forget_deltas(self, change: Any) -> None:
        """A page may report what plotly.js has filled in (see `_REPORTS`). Plotly's class takes a property that is
        reported out of the figure, here and in the page: after a move the bars' `y` was gone, and a reload drew a
        diagonal.
        """
        if change["new"]:
            setattr(self, change["name"], None)

    def _handler_js2py_traceDeltas(self, change: Any) -> None:
        """Not plotly's: see `_forget_deltas`."""

    def _handler_js2py_layoutDelta(self, change: Any) -> None:
        """Not plotly's: see `_forget_deltas`."""

    @traitlets.observe("_js2py_relayout")
    def _handler_js2py_relayout(self, change: Any) -> None:
        """Plotly's, and note which axes a person moves; a double click gives an axis back."""
        moved = dict((change["new"] or {}).get("relayout_data") or {})
        super()._handler_js2py_relayout(change)
        for name, value in moved.items():
            axis, _, part = name.partition(".")
            if part.startswith("range"):
                self._zoomed.add(axis)
            elif part == "autorange" and value:
                self._zoomed.discard(axis)
                if axis in self._fitting:
                    self.layout[axis].update(range=self._fitting[axis], autorange=False)
        for axis, watcher in self._on_zoom.items():
            low, high = (moved.get(f"{axis}.range[{i}]") for i in (0, 1))
            if low is not None and high is not None:
                watcher(min(low, high), max(low, high))

    @traitlets.default("_bundle_ref")
    def _default_bundle_ref(self) -> str:  # a default: set after __init__ it would come too late for the page
        return f"IPY_MODEL_{_bundle().model_id}"

    def get_state(self, key: Any = None, drop_defaults: bool = False) -> dict[str, Any]:
        """State for the page; the whole one, which a reload asks for, is the figure as it is now."""
        if key is None and hasattr(self, "_layout_obj"):
            self._trait_values["_widget_data"] = deepcopy(self._data)
            self._trait_values["_widget_layout"] = deepcopy(self._layout_obj._props)
        return super().get_state(key=key, drop_defaults=drop_defaults)

    def _send_update_msg(
        self, restyle_data: Any, relayout_data: Any, trace_indexes: Any = None, source_view_id: Any = None
    ) -> None:
        """Plotly's, where one edit names a property for each trace that it touches: who was given none keeps its own.

        Plotly sends the word "_undefined_" for those, and the page, where anywidget revives nothing, took the word for
        the value: a line that was to have no place in the legend stood there as "trace 14".
        """
        touched = [self._data[i] for i in self._normalize_trace_indexes(trace_indexes)]
        filled = {
            path: [
                _at(trace, path) if value is Undefined else value
                for trace, value in zip(touched, values, strict=True)
            ]
            if isinstance(values, list) and any(value is Undefined for value in values)
            else values
            for path, values in restyle_data.items()
        }
        super()._send_update_msg(filled, relayout_data, trace_indexes, source_view_id)

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

    def show_parts(self, traces: Sequence[dict[str, Any]], layout: dict[str, Any]) -> None:
        """Take over the numbers of the same traces in place: only what differs from what is shown is set and sent.

        A third of the time of `show_figure`, for figures that answer a slider.

        Args:
            traces: one for each of this figure's, in its order. `layout`: what of it may have changed.
        """
        former = self._parts if len(self._parts) == len(self.data) else [{}] * len(self.data)
        with self.batch_update():
            for mine, new, old in zip(self.data, traces, former, strict=True):
                for name, value in new.items():
                    if name != "type" and (name not in old or old[name] != value):
                        mine[name] = value
            for name, value in layout.items():
                if not isinstance(value, dict):
                    self.layout[name] = value
                    continue
                if "range" in value:
                    self._fitting[name] = value["range"]
                    if name in self._zoomed:
                        value = {key: one for key, one in value.items() if key != "range"}
                self.layout[name].update(value)
        self._parts = [dict(trace) for trace in traces]

    def fit(self) -> None:
        """Show the whole of each axis again."""
        self._zoomed.clear()
        with self.batch_update():
            for name, limits in self._fitting.items():
                self.layout[name].update(range=limits, autorange=False)
