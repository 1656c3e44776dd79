"""A point of a sweep on its way: asked, told, and as one row of the table."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

#: What Optuna calls the states of a point that was told. A setting that the library refuses is "pruned": TPE then looks
#: elsewhere, where a failed one teaches it nothing.
STATES = {
    "finished": TrialState.COMPLETE,
    "infeasible": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
NAMES = {state: name for name, state in STATES.items()}
#: Given out before it was told: to be tried again.
INTERRUPTED = "interrupted"
#: Columns of every point, before its settings and objectives. `machine`: whose time was measured or simulated.
COLUMNS = ("number", "state", "reason", "seed", "seconds", "origin", "machine", "commit", "started")


class Asked(NamedTuple):
    """A point to be tried.

    Attributes:
        number: of its trial in the study. `settings`: those that move. `seed`: of whatever is drawn in it.
        notes: what the search must find again about it after a restart (system attributes of its trial).
    """

    number: int
    settings: Mapping[str, Any]
    seed: int
    notes: Mapping[str, Any] = {}


class Outcome(NamedTuple):
    """What became of a point.

    Attributes:
        state: "finished", "infeasible", "failed" or `INTERRUPTED`.
        values: by objective; empty unless finished. `reason`: why not, "" if finished.
    """

    number: int
    state: str
    values: Mapping[str, float] = {}
    reason: str = ""
    seconds: float = 0.0
    origin: str = ""
    machine: str = ""


def seed_of(sweep_seed: int, number: int) -> int:
    """A point's own seed, whoever runs it and when."""
    return int(np.random.SeedSequence([sweep_seed, number]).generate_state(1)[0])


def table(
    trials: Sequence[FrozenTrial], settings: Sequence[str], objectives: Sequence[str], is_alive: bool
) -> pd.DataFrame:
    """One row a point, by number.

    Args:
        is_alive: somebody runs the sweep, so that what was asked and not told is running.
    """
    rows = [_row(one, settings, objectives) for one in trials if one.state in NAMES or is_alive]
    frame = pd.DataFrame(rows, columns=[*_columns(settings), *objectives])
    return frame.astype(dict.fromkeys(("seconds", *objectives), "float64"))


def _columns(settings: Sequence[str]) -> list[str]:
    """A machine that moves is the machine that was simulated, so that its column is there once."""
    return [*COLUMNS, *(name for name in settings if name not in COLUMNS)]


def _row(trial: FrozenTrial, settings: Sequence[str], objectives: Sequence[str]) -> dict[str, Any]:
    told = trial.user_attrs
    values = trial.values or [float("nan")] * len(objectives)
    return {
        **{name: trial.params.get(name) for name in settings},
        "number": trial.number,
        "state": NAMES.get(trial.state, "running"),
        "reason": told.get("reason", ""),
        "seed": told.get("seed"),
        "seconds": told.get("seconds", float("nan")),
        "origin": told.get("origin", ""),
        "machine": told.get("machine", "") or trial.params.get("machine", ""),
        "commit": told.get("commit", ""),
        "started": trial.datetime_start,
        **dict(zip(objectives, values, strict=True)),
    }


class Asking(NamedTuple):
    """What is the same of all points that are asked together."""

    commit: str
    started: datetime
