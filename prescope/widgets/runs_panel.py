"""Every real run by its settings, and any two beside each other."""

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as ipw
import numpy as np
import pandas as pd

from ..errors import BadTrace, PrescopeError, UnsupportedOption
from ..scheduler import SCHEDULES
from ..traces.result import RunResult
from ..views.numbers import COLUMNS, NAN, change, formatted, numbers
from ..views.schedule_pair import plot_schedule_pair, schedule_pair_info
from ..views.theme import written
from .control import Control, rebound
from .figures import SlimFigureWidget
from .runner import RealRunner
from .showing import take_off
from .style import boxed, named, panel, row
from .tables import frame_html

#: Layers that are named where two runs differ most.
MOST_LAYERS = 5
#: Settings that only say another one again.
DERIVED = {"slots", "slots_gib", "slots_frac"}


class RunsPanel:
    """The runner's runs and those opened from a folder, by their settings; two of them compared.

    Attributes:
        first, second: which two. step: of their lanes.
        folder, save_button, open_button: to keep the first one, and to take up a saved one. told: what came of it.
        opened: runs that were opened. view: all of it.
    """

    def __init__(self, runner: RealRunner) -> None:
        self._runner = runner
        self._shown: list[RunResult] = []
        self.opened: list[RunResult] = []
        self.list = ipw.HTML()
        self.folder = ipw.Text(
            value="runs/run", placeholder="folder of a saved run", layout={"width": "260px"}
        )
        self.save_button = ipw.Button(description="Save run", icon="save", layout={"width": "auto"})
        self.open_button = ipw.Button(description="Open", icon="folder-open", layout={"width": "auto"})
        self.save_button.tooltip = "Write the run chosen above with all its evidence into the folder"
        self.open_button.tooltip = "Take up a run that was saved there, of this model or another"
        self.told = ipw.HTML()
        self.first, self.second = ipw.Dropdown(), ipw.Dropdown()
        self.step = ipw.IntSlider(continuous_update=False)
        self.differences = ipw.HTML()
        self.figure = SlimFigureWidget()
        fields = [
            Control("run", self.first, "The upper lanes, and the numbers that the other's are held against."),
            Control("beside", self.second, "The lower lanes."),
            Control("step", self.step, "Decode step whose lanes are drawn."),
        ]
        controls = boxed(ipw.Box([field.view for field in fields]), "ps-controls")
        files = row(named("folder", self.folder), self.save_button, self.open_button, self.told)
        self._pair = ipw.VBox([self.differences, boxed(ipw.VBox([self.figure]), "ps-figures")])
        self.part = ipw.VBox([self.list, controls, files, self._pair])
        self.view = panel(self.part)
        self._is_quiet = False
        for widget in (self.first, self.second, self.step):
            widget.observe(self._on_move, "value")
        self.save_button.on_click(lambda _: self._try(self.save))
        self.open_button.on_click(lambda _: self._try(self.open))
        self.refresh()

    def save(self) -> str:
        """Write the first of the two runs into the folder; returns what to say of it."""
        run = self._shown[self.first.value]
        return f"{name_of_run(run, self.first.value)}: written to {run.save(self._typed())}"

    def open(self) -> str:
        """Take up the run in the folder, as the second of the two; returns what to say of it."""
        run = RunResult.load(self._typed())
        if not _has_decode(run):
            raise BadTrace(
                f"{self.folder.value} holds a run without a decode step; there is nothing to compare"
            )
        self.opened.append(run)
        self.refresh()
        return f"opened: {run.label}"

    def _typed(self) -> Path:
        if not self.folder.value.strip():
            raise UnsupportedOption("no folder is named; type one, such as runs/first")
        return Path(self.folder.value.strip())

    def _try(self, what: Callable[[], str]) -> None:
        try:
            self.told.value = escape(what())
        except (PrescopeError, OSError) as error:
            name = type(error).__name__
            self.told.value = f"<span class='ps-error'><b>{name}</b>: {escape(str(error))}</span>"

    def refresh(self) -> None:
        """Take up runs that were made since."""
        runs = [run for run in (*self._runner.runs, *self.opened) if _has_decode(run)]
        if list(map(id, runs)) == list(map(id, self._shown)) and self.list.value:
            return
        self._shown = runs
        names = [(name_of_run(run, i), i) for i, run in enumerate(runs)]
        self.list.value = (
            frame_html(runs_frame(runs)) if runs else f"<p class='ps-soft'>{self._nothing()}</p>"
        )
        self._pair.layout.display = "" if len(runs) > 1 else "none"
        self.save_button.disabled = not runs
        self._is_quiet = True
        self.first.options = self.second.options = names
        if runs:
            self.first.value, self.second.value = max(0, len(runs) - 2), len(runs) - 1
        self._is_quiet = False
        if len(runs) > 1:
            self.redraw()

    def _nothing(self) -> str:
        return "No run has a decode step yet." if self._runner.runs else "No run yet."

    def redraw(self) -> None:
        """Compare the two that are chosen."""
        if len(self._shown) < 2:
            return
        one, other = self._shown[self.first.value], self._shown[self.second.value]
        steps = sorted(_decode_steps(one) & _decode_steps(other))
        self.differences.value = _differences(one, other)
        has_lanes = bool(steps) and not one.events.empty and not other.events.empty
        (self.figure.remove_class if has_lanes else self.figure.add_class)("ps-stale")
        if not has_lanes:
            return
        self._is_quiet = True
        rebound(self.step, steps[0], steps[-1])
        self._is_quiet = False
        info = schedule_pair_info(one, other, range(self.step.value, self.step.value + 1))
        self.figure.show_figure(plot_schedule_pair(info))

    def close(self) -> None:
        """Take the panel off the page; the runs stay."""
        take_off(self.view)

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
        parts.append(f"{written(config['predictor'])}, {config['lookahead']} ahead")
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


def _has_decode(run: RunResult) -> bool:
    return bool((run.steps["phase"] == "decode").any())


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
    settings = _settings_apart(one, other)
    apart = frame_html(settings) if len(settings) else "<p class='ps-soft'>Their settings are the same.</p>"
    layers = _layers_apart(one, other)
    text = "; ".join(
        f"layer {layer}: {formatted(ms, signed=True)} ms per token, {formatted(misses, signed=True)} misses"
        for layer, ms, misses in layers
    )
    where = f"<p>Layers where they differ most: {escape(text)}</p>" if layers else ""
    same = one.trace is not None and other.trace is not None and one.tokens == other.tokens
    note = (
        ""
        if same
        else "<p class='ps-soft'>The two runs wrote different text, so they needed different experts.</p>"
    )
    return f"<div class='ps-row ps-top'>{table}{apart}</div>{where}{note}"


def _settings_apart(one: RunResult, other: RunResult) -> pd.DataFrame:
    """Settings, model and machine that the two do not share."""
    rows = {}
    kinds = [("", "config"), ("generate: ", "generate"), ("", "hardware")]
    for prefix, kind in kinds:
        before, after = (
            run.hardware
            if kind == "hardware"
            else run.config.get("generate", {})
            if kind == "generate"
            else run.config
            for run in (one, other)
        )
        for name in [*before, *(name for name in after if name not in before)]:
            first, second = before.get(name, ""), after.get(name, "")
            if first != second and not isinstance(first, dict) and name not in DERIVED:
                rows[prefix + name] = {"first": _said(first), "second": _said(second)}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["first", "second"])


def _said(value: object) -> str:
    """As a person reads it; a setting that this run has not is a dash."""
    if value is None or value == "":
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
