"""Decide about each layer's experts, by any schedule: copy now, prefetch, or compute on the CPU.

`plan` holds the decisions as compiled loops, `presched` and `baselines` how a layer's misses are split, `layer` all
that is decided about one layer, `learn` what is learned from layer to layer, `planner` keeps it for an engine;
`schedules` are the names to choose from. Pure: engine and simulator call the same functions.
"""

from .schedules import PREDICTORS, SCHEDULES, Schedule, schedule_named

__all__ = ["PREDICTORS", "SCHEDULES", "Schedule", "schedule_named"]
