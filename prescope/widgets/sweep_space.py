"""Which settings of a sweep may move: a tick, and a range or choices, for each that the runner knows."""

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import ipywidgets as ipw

from ..scheduler import SCHEDULES
from ..tuning import Choices, Range, Setting, Space
from .style import boxed, label

#: Ticked when the panel opens, those of them that there are.
FIRST = ("slots", "schedule", "lookahead")
#: Schedules that are ticked at first: all that are worth comparing make a grid of thousands.
FIRST_SCHEDULES = ("on-demand", "presched")
#: Of a whole number that the model does not bound.
MOST = {"batch": 8, "cpu_threads": 16, "most_in_flight": 16, "least_bytes": 1 << 26}
OWN = "its own"
#: Steps of a long range.
STEPS = 32
#: Lines of a list of choices that are seen at once.
LINES = 4
#: Settings that each schedule has a value of its own for.
OF_SCHEDULE = ("cache", "predictor", "lookahead", "width", "threshold", "recall")
#: Settings that do nothing unless something is predicted.
OF_PREDICTIONS = ("predictor", "lookahead", "width", "threshold", "recall")


class Movable:
    """One setting: stays as it is, or moves within a range or among choices.

    Args:
        name, setting: what it is. changed: called after each move.

    Attributes:
        tick: whether it moves. span: range or list of choices. view: the row.
    """

    def __init__(self, name: str, setting: Setting, changed: Callable[[], None]) -> None:
        self.name, self._setting, self._kept = name, setting, OWN
        words = label(name.replace("_", " "), setting.what)
        self.tick = ipw.Checkbox(value=name in FIRST, indent=False, tooltip=f"Let it move: {setting.what}")
        self.tick.add_class("ps-tick")
        self.span = _span(name, setting)
        self.span.tooltip = setting.what
        self._note, self._still = ipw.HTML(), ipw.HTML()
        self._note.add_class("ps-note")
        moving = boxed(ipw.Box([self.tick, self.span, self._still]), "ps-move")
        self.view = boxed(ipw.Box([words, moving, self._note]), "ps-field")
        for widget in (self.tick, self.span):
            widget.observe(lambda _: changed(), "value")
        self.explain("")

    @property
    def moved(self) -> Range | Choices | None:
        """How far it may move; None: it stays."""
        if not self.tick.value or self.tick.disabled:
            return None
        if isinstance(self.span, ipw.SelectMultiple):
            return Choices(*self.span.value) if self.span.value else None
        low, high = self.span.value
        if self._setting.kind == "int":
            return Range(int(low), int(high), int(self.span.step))
        return Range(round(low, 6), round(high, 6), self.span.step)

    def put(self, moved: Range | Choices | None) -> None:
        """Show how far it moves, as far as the control can."""
        self.tick.value = moved is not None
        if isinstance(moved, Choices) and isinstance(self.span, ipw.SelectMultiple):
            there = {value for _, value in self.span.options}
            self.span.value = tuple(value for value in moved.options if value in there)
        elif isinstance(moved, Range) and not isinstance(self.span, ipw.SelectMultiple):
            self.span.value = (moved.low, moved.high)

    def keep(self, value: Any) -> None:
        """Say what it stays at while it does not move."""
        self._kept = OWN if value is None else f"{value:.3g}" if isinstance(value, float) else _word(value)

    def explain(self, reason_not: str) -> None:
        """Enable it, or disable it and say why; what it is when it stays."""
        self.tick.disabled = bool(reason_not)
        moves = self.tick.value and not reason_not
        self.span.layout.display = "" if moves else "none"
        self._still.layout.display = "none" if moves else ""
        (self.view.add_class if reason_not else self.view.remove_class)("ps-off")
        _set(self._still, f"<span class='ps-soft'>{escape(reason_not or f'stays: {self._kept}')}</span>")
        _set(self._note, _told(self.moved) if moves else "")
        (self._note.remove_class if moves else self._note.add_class)("ps-empty")


class SpaceControls:
    """Rows of all settings of a runner.

    Args:
        settings: that may move. kept: what those that do not move stay at. changed: called after each move.

    Attributes:
        rows: by name. view: the grid.
    """

    def __init__(
        self,
        settings: Mapping[str, Setting],
        kept: Callable[[], Mapping[str, Any]],
        changed: Callable[[], None],
    ) -> None:
        self._kept, self._changed = kept, changed
        self.rows: dict[str, Movable] = {}
        self.view = boxed(ipw.Box(), "ps-controls")
        self.use(settings)

    def use(self, settings: Mapping[str, Setting]) -> None:
        """Offer another runner's settings; what was ticked stays ticked."""
        former = {name: row.moved for name, row in self.rows.items()}
        self.rows = {
            name: Movable(name, setting, self._on_move)
            for name, setting in settings.items()
            if setting.kind != "choice" or len(setting.choices) > 1  # one choice is none
        }
        for name, row in self.rows.items():
            if name in former:
                row.put(former[name])
        self.view.children = [row.view for row in self.rows.values()]
        self.explain()

    @property
    def space(self) -> Space:
        """What may move.

        Raises:
            UnsupportedOption: nothing does.
        """
        moved = {name: row.moved for name, row in self.rows.items()}
        return Space({name: one for name, one in moved.items() if one is not None})

    @property
    def fixed(self) -> dict[str, Any]:
        """What all others stay at; those left to the schedule are not named."""
        kept = self._staying()
        return {name: kept[name] for name, row in self.rows.items() if row.moved is None and name in kept}

    def _staying(self) -> dict[str, Any]:
        """What settings stay at; where schedules are compared, each keeps to its own cache and predictions."""
        moves = "schedule" in self.rows and self.rows["schedule"].moved is not None
        return {
            name: value
            for name, value in self._kept().items()
            if value is not None and not (moves and name in OF_SCHEDULE)
        }

    def put(self, space: Space) -> None:
        """Show a study's space."""
        for name, row in self.rows.items():
            row.put(space.get(name))
        self.explain()

    def explain(self) -> None:
        """Say of each setting what it stays at, or why it does nothing."""
        kept = self._staying()
        moved = self.rows["schedule"].moved if "schedule" in self.rows else None
        ways = moved.options if isinstance(moved, Choices) else (kept.get("schedule"),)
        titles = [SCHEDULES[str(one)].title for one in ways if one in SCHEDULES]
        blind = all(SCHEDULES[str(one)].predictor == "none" for one in ways if one in SCHEDULES)
        for name, row in self.rows.items():
            row.keep(kept.get(name))
            reason = ""
            if name in OF_PREDICTIONS and titles and blind:
                reason = f"{' and '.join(titles[:2])} look{'s' if len(titles) == 1 else ''} at no predictions"
            elif name == "recall" and not self._may_be_noisy():
                reason = "of the noisy oracle"
            row.explain(reason)

    def _may_be_noisy(self) -> bool:
        moved = self.rows["predictor"].moved if "predictor" in self.rows else None
        names = moved.options if isinstance(moved, Choices) else (self._staying().get("predictor"),)
        return "noisy oracle" in names

    def _on_move(self) -> None:
        self.explain()
        self._changed()


def _span(name: str, setting: Setting) -> ipw.Widget:
    if setting.kind == "choice":
        options = [(_word(one), one) for one in setting.choices]
        if setting.has_own:
            options.insert(0, (OWN, None))
        first = FIRST_SCHEDULES if name == "schedule" else setting.choices[:2]
        return ipw.SelectMultiple(options=options, value=first, rows=min(LINES, len(options)))
    if setting.kind == "slots":
        return ipw.FloatRangeSlider(
            min=0.05, max=1.0, step=0.05, value=(0.1, 0.9), readout=False, continuous_update=False
        )
    if setting.kind == "share":
        low = round(setting.low, 2)
        return ipw.FloatRangeSlider(
            min=low, max=setting.high or 1.0, step=0.05, value=(low, min(0.6, setting.high or 1.0)),
            readout=False, continuous_update=False,
        )  # fmt: skip
    low, high = int(setting.low), int(min(setting.most or MOST.get(name, 16), setting.high or 1 << 30))
    step = max(1, (high - low) // STEPS)
    top = min(high, 2) if name == "lookahead" else high  # not every predictor sees further
    return ipw.IntRangeSlider(
        min=low, max=high, step=step, value=(low, top), readout=False, continuous_update=False
    )


def _set(widget: ipw.HTML, text: str) -> None:
    if widget.value != text:
        widget.value = text


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return SCHEDULES[value].title if isinstance(value, str) and value in SCHEDULES else str(value)


def _told(moved: Range | Choices | None) -> str:
    if moved is None:
        return "choose one or more (Ctrl or Shift for several)"
    count = len(moved.values() or ())
    many = f"{count} value{'s' if count != 1 else ''}"
    if isinstance(moved, Choices):
        return many
    step = f", step {moved.step:g}" if moved.step not in (None, 1) else ""
    return f"<b>{moved.low:g} to {moved.high:g}</b>, {many}{step}"
