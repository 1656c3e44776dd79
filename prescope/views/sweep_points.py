"""What the figures of a sweep read of its table of points: which columns are settings, which objectives, their units.

The table is that of `Sweep.points()`: one row a point, columns that tell of the point (`RECORD`), one for each setting,
one for each objective.
"""

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd

from prescope.core.units import GIB, MIB, count_of
from prescope.errors import UnsupportedOption

from .numbers import formatted
from .theme import SOURCES

#: Columns that are neither a setting nor an objective.
RECORD = ("number", "state", "reason", "seed", "seconds", "origin", "machine", "commit", "started")
#: A number with more values than this is cut into so many ranges where cells are needed.
MOST_CELLS = 20
#: Of a figure among others of the same sweep, beside words that say what the points are.
BRIEF_HEIGHT, BRIEF_TOP = 330, 56
#: Plotly takes a marker's colour for the ground of its words; grey ones would be hard to read on.
HOVER = {"bgcolor": "#ffffff", "bordercolor": "#929697", "font": {"color": "#222222"}}


class Shown(NamedTuple):
    """An objective of a sweep as figures and tables show it."""

    head: str  # with its unit
    more_is_better: bool
    scale: float = 1.0  # from the table's unit to the one shown


#: As `prescope.tuning` knows them, which needs an extra that figures do not.
OBJECTIVES: dict[str, Shown] = {
    "tokens_per_s": Shown("tokens/s", True),
    "p50_ms": Shown("ms per token, p50", False),
    "p95_ms": Shown("ms per token, p95", False),
    "ttft_ms": Shown("first token, ms", False),
    "gpu_bytes": Shown("GPU memory, GiB", False, 1 / GIB),
}
#: Setting -> its unit, where its name does not say it.
UNITS: dict[str, str] = {
    "slots": "experts",
    "lookahead": "layers",
    "width": "experts per layer",
    "threshold": "least probability",
    "recall": "share of the used experts",
    "cpu": "lane",
    "cpu_threads": "threads",
    "link_factor": "copies of each expert",
    "link_gb_per_s": "GB/s",
    "batch": "sequences",
    "max_new_tokens": "tokens",
}


class Axis(NamedTuple):
    """A setting or an objective of some points."""

    name: str  # of its column
    label: str  # with its unit
    values: tuple[float, ...]  # one a point; of names their place in `names`
    names: tuple[str, ...] = ()  # of what is no number; empty: numbers

    def shown(self, index: int) -> str:
        """The value of one point in words."""
        value = self.values[index]
        return self.names[int(value)] if self.names else formatted(value)


def finished(points: pd.DataFrame) -> pd.DataFrame:
    """The points that have been measured or simulated.

    Raises:
        UnsupportedOption: there is none yet.
    """
    rows = points[points["state"] == "finished"]
    if rows.empty:
        raise UnsupportedOption("the sweep has no finished point yet; start it, or wait for its first point")
    return rows


def settings_in(points: pd.DataFrame) -> list[str]:
    """Columns that are settings."""
    named = [name for name in points.columns if name not in RECORD and name not in OBJECTIVES]
    return (
        [*named, "machine"] if points.loc[points["state"] == "finished", "machine"].nunique() > 1 else named
    )


def moved_in(points: pd.DataFrame) -> list[str]:
    """Settings of which there is more than one value; the machine is one where several were simulated."""
    return [name for name in settings_in(points) if points[name].map(repr).nunique() > 1]


def objectives_in(points: pd.DataFrame) -> list[str]:
    """Objectives that are known of every finished point."""
    rows = points[points["state"] == "finished"]
    return [name for name in OBJECTIVES if name in points.columns and rows[name].notna().all()]


def objective_of(points: pd.DataFrame, name: str) -> Shown:
    """An objective as it is shown of these points: memory in the unit that suits its size."""
    one = OBJECTIVES[name]
    is_small = one.scale == 1 / GIB and not points[name].max() >= GIB / 2
    return Shown("GPU memory, MiB", False, 1 / MIB) if is_small else one


def require_objective(points: pd.DataFrame, name: str) -> Shown:
    """What a name stands for.

    Raises:
        UnsupportedOption: the points have no such objective.
    """
    known = objectives_in(points)
    if name not in known:
        raise UnsupportedOption(
            f"the points have no objective {name!r}; they have {', '.join(known) or 'none'}"
        )
    return objective_of(points, name)


def require_setting(points: pd.DataFrame, name: str) -> None:
    """Refuse what is no setting of these points.

    Raises:
        UnsupportedOption: with the names that are.
    """
    if name not in settings_in(points):
        raise UnsupportedOption(
            f"the points have no setting {name!r}; they have {', '.join(settings_in(points)) or 'none'}"
        )


def setting_axis(points: pd.DataFrame, name: str) -> Axis:
    """A setting of these points: numbers as they are, everything else by name, numbers of names in their order."""
    values = points[name].tolist()
    if all(_is_number(value) for value in values):
        return Axis(name, label_of(name, values), tuple(float(value) for value in values))
    names = sorted({_word(value) for value in values}, key=_natural)
    places = {word: place for place, word in enumerate(names)}
    return Axis(name, label_of(name, values), tuple(float(places[_word(v)]) for v in values), tuple(names))


def objective_axis(points: pd.DataFrame, name: str) -> Axis:
    """An objective of these points in the unit that is shown."""
    one = objective_of(points, name)
    return Axis(name, one.head, tuple((points[name].astype(float) * one.scale).tolist()))


def label_of(name: str, values: Sequence[object]) -> str:
    """A setting's name with its unit; slots may be a count, a share or an amount of memory."""
    unit = UNITS.get(name, "")
    if name == "slots" and any(isinstance(value, float | np.floating) and value <= 1 for value in values):
        unit = "share of the experts"
    return f"{name.replace('_', ' ')}, {unit}" if unit else name.replace("_", " ")


def cells_of(axis: Axis) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names of an axis's cells in order, and the cell of each point: one for each value, or ranges of many."""
    if axis.names:
        return axis.names, tuple(int(value) for value in axis.values)
    values = np.array(axis.values)
    distinct = np.unique(values)
    if len(distinct) <= MOST_CELLS:
        return tuple(f"{value:g}" for value in distinct), tuple(np.searchsorted(distinct, values).tolist())
    edges = np.linspace(distinct[0], distinct[-1], MOST_CELLS + 1)
    cells = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, MOST_CELLS - 1)
    names = tuple(f"{low:.3g} to {high:.3g}" for low, high in pairwise(edges))
    return names, tuple(cells.tolist())


def told_of_points(points: pd.DataFrame) -> str:
    """How many points there are, simulated or measured, on which machine, and how many came to nothing.

    Html, for titles and pages alike.
    """
    rows = points[points["state"] == "finished"]
    parts = []
    for (origin, machine), group in rows.groupby(["origin", "machine"], sort=False):
        count = count_of(len(group), "point")
        parts.append(f"<b>{escape(SOURCES.get(origin, origin))}</b>: {count}, {escape(str(machine))}")
    for state in ("infeasible", "failed", "running"):
        if number := int((points["state"] == state).sum()):
            parts.append(f"{number:,} {state}")
    return " · ".join(parts)


def settings_in_words(row: "pd.Series[object]", names: Sequence[str]) -> str:
    """Some settings of one point in a line."""
    return ", ".join(f"{name} {_word(row[name])}" for name in names)


def best_first(points: pd.DataFrame, objective: str) -> pd.DataFrame:
    """The finished points, the best first; each setting once, by the best of its points."""
    rows = points[points["state"] == "finished"]
    rows = rows.sort_values(objective, ascending=not OBJECTIVES[objective].more_is_better, kind="stable")
    return rows.drop_duplicates(settings_in(points))


def points_frame(
    points: pd.DataFrame, objectives: Sequence[str], most: int, *, like: pd.DataFrame | None = None
) -> pd.DataFrame:
    """The best points as people read them: number, objectives and moved settings with their units, origin.

    Args:
        like: the sweep's whole table, where these are some of it: whose moved settings are shown.
    """
    rows, whole = best_first(points, objectives[0]).head(most), points if like is None else like
    columns: dict[str, list[object]] = {}
    for name in objectives:
        one = objective_of(whole, name)
        columns[one.head] = [float(value) * one.scale for value in rows[name]]
    for name in moved_in(whole):
        values = rows[name].tolist()
        is_number = all(map(_is_number, whole[name].tolist()))
        columns[label_of(name, whole[name].tolist())] = (
            values if is_number else [_word(one) for one in values]
        )
    columns["origin"] = [SOURCES.get(origin, origin) for origin in rows["origin"]]
    return pd.DataFrame(columns, index=pd.Index(rows["number"].tolist(), name="point"))


def _is_number(value: object) -> bool:
    is_number = isinstance(value, int | float | np.integer | np.floating)
    return is_number and not isinstance(value, bool) and value == value


def _word(value: object) -> str:
    if value is None or value != value:
        return "its own"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float | np.floating) else str(value)


def _natural(word: str) -> tuple[bool, float, str]:
    """Numbers by size before words by letters."""
    try:
        return False, float(word), word
    except ValueError:
        return True, 0.0, word
