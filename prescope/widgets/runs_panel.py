"""Every real run by its settings, and any two beside each other."""

from html import escape
from typing import Any

import ipywidgets as ipw
import numpy as np
import pandas as pd

from ..scheduler import SCHEDULES
from ..traces.result import RunResult
from ..views.numbers import COLUMNS, NAN, change, formatted, numbers
from ..views.schedule_pair import plot_schedule_pair, schedule_pair_info
from .field import Field
from .figures import SlimFigureWidget
from .runner import Runner
from .style import boxed, panel
from .tables import frame_html

#: Layers that are named where two runs differ most.
MOST_LAYERS = 5


class RunsPanel:
    """The runner's runs, and two of them compared.

    Attributes:
        first, second: which two. step: of their lanes. view: all of it.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._shown: list[RunResult] = []
        self.list = ipw.HTML()
        self.first, self.second = ipw.Dropdown(), ipw.Dropdown()
        self.step = ipw.IntSlider(continuous_update=False)
        self.differences = ipw.HTML()
        self.figure = SlimFigureWidget()
        fields = [
            Field("run", self.first, "The upper lanes, and the numbers that the other's are held against."),
            Field("beside", self.second, "The lower lanes."),
            Field("step", self.step, "Decode step whose lanes are drawn."),
        ]
        controls = boxed(ipw.Box([field.view for field in fields]), "ps-controls")
        self._pair = ipw.VBox([controls, self.differences, boxed(ipw.VBox([self.figure]), "ps-figures")])
        self.part = ipw.VBox([self.list, self._pair])
        self.view = panel(self.part)
        self._is_quiet = False
        for widget in (self.first, self.second, self.step):
            widget.observe(self._on_move, "value")
        self.refresh()

    def refresh(self) -> None:
        """Take up runs that were made since."""
        runs = [run for run in self._runner.runs if (run.steps["phase"] == "decode").any()]
        if list(map(id, runs)) == list(map(id, self._shown)) and self.list.value:
            return
        self._shown = runs
        names = [(name_of_run(run, i), i) for i, run in enumerate(runs)]
        self.list.value = frame_html(runs_frame(runs)) if runs else "<p class='ps-soft'>No run yet.</p>"
        self._pair.layout.display = "" if len(runs) > 1 else "none"
        if len(runs) < 2:
            return
        self._is_quiet = True
        self.first.options = self.second.options = names
        self.first.value, self.second.value = len(runs) - 2, len(runs) - 1
        self._is_quiet = False
        self.redraw()

    def redraw(self) -> None:
        """Compare the two that are chosen."""
        one, other = self._shown[self.first.value], self._shown[self.second.value]
        steps = sorted(_decode_steps(one) & _decode_steps(other))
        self._is_quiet = True
        self.step.max, self.step.min = max(steps[-1], self.step.min), steps[0]
        self.step.max = steps[-1]
        self._is_quiet = False
        self.differences.value = _differences(one, other)
        if one.events.empty or other.events.empty:
            return
        info = schedule_pair_info(one, other, range(self.step.value, self.step.value + 1))
        self.figure.show_figure(plot_schedule_pair(info))

    def close(self) -> None:
        """Take the panel off the page; the runs stay."""
        self.figure.close()
        self.view.close()

    def _on_move(self, _change: Any) -> None:
        if not self._is_quiet:
            self.redraw()


def name_of_run(run: RunResult, number: int) -> str:
    """Number, schedule, slots and what else a person would know it by."""
    config = run.config
    parts = [
        SCHEDULES[str(config.get("schedule", "on-demand"))].title,
        f"{config['num_slots']} slots",
        config["cache"],
    ]
    if config.get("predictor", "none") != "none":
        parts.append(f"{config['predictor']}, {config['lookahead']} ahead")
    if config.get("cpu_threads"):
        parts.append("CPU lane")
    return f"{number + 1}: " + ", ".join(map(str, parts))


def runs_frame(runs: list[RunResult]) -> pd.DataFrame:
    """One row a run, the numbers of `views.numbers` with their units."""
    rows = [
        {
            "tokens": len(run.steps),
            **{
                head: formatted(getattr(numbers(run), field), field=field)
                for field, (head, _) in COLUMNS.items()
            },
        }
        for run in runs
    ]
    names = [name_of_run(run, i) for i, run in enumerate(runs)]
    return pd.DataFrame(rows, index=pd.Index(names, name="run"))


def _decode_steps(run: RunResult) -> set[int]:
    return set(run.steps[run.steps["phase"] == "decode"]["step"].tolist())


def _differences(one: RunResult, other: RunResult) -> str:
    """The second against the first: numbers, and the layers where they differ most."""
    before, after = numbers(one), numbers(other)
    delta = change(after, before)
    rows = {
        head: {
            "first": formatted(getattr(before, field), field=field),
            "second": formatted(getattr(after, field), field=field),
            "difference": formatted(getattr(delta, field), signed=True, field=field)
            + (" %" if field == "tokens_per_s" else ""),
        }
        for field, (head, _) in COLUMNS.items()
    }
    table = frame_html(pd.DataFrame.from_dict(rows, orient="index"))
    layers = _layers_apart(one, other)
    text = "; ".join(
        f"layer {layer}: {ms:+.3f} ms per token, {misses:+.2f} misses" for layer, ms, misses in layers
    )
    where = f"<p>Layers where they differ most: {escape(text)}</p>" if layers else ""
    same = one.trace is not None and other.trace is not None and one.tokens == other.tokens
    note = (
        ""
        if same
        else "<p class='ps-soft'>The two runs wrote different text, so they needed different experts.</p>"
    )
    return f"<div class='ps-row'>{table}</div>{where}{note}"


def _layers_apart(one: RunResult, other: RunResult) -> list[tuple[int, float, float]]:
    """Layer, milliseconds and misses per decode step that the second has more, the largest change first."""
    found = []
    for run in (one, other):
        steps = max(1, len(_decode_steps(run)))
        layers = run.layers[run.layers["phase"] == "decode"]
        size = int(layers["moe_layer"].max()) + 1
        misses = np.bincount(layers["moe_layer"], layers["misses"], minlength=size) / steps
        events = run.events
        mine = (
            (events["phase"] == "decode")
            & (events["moe_layer"] >= 0)
            & events["lane"].isin(["gpu", "stall", "host"])
        )
        ms = (
            np.bincount(events["moe_layer"][mine], events["dur_us"][mine], minlength=size) / steps / 1e3
            if mine.any()
            else np.full(size, NAN)
        )
        found.append((ms, misses))
    (ms_a, miss_a), (ms_b, miss_b) = found
    if len(ms_a) != len(ms_b) or np.isnan(ms_a + ms_b).any():
        return []
    order = np.argsort(-np.abs(ms_b - ms_a))[:MOST_LAYERS]
    return [(int(i), float(ms_b[i] - ms_a[i]), float(miss_b[i] - miss_a[i])) for i in order]
