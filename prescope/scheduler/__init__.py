"""What is done about each layer's experts, by any schedule: copied now, copied ahead, computed on the CPU.

`decide` holds the decisions as compiled loops, `presched` and `baselines` how a layer's misses are split, `terms` their
words, `schedules` the names to choose from. Pure: engine and simulator call the same functions.
"""

from .schedules import PREDICTORS, SCHEDULES, Schedule, schedule_named

__all__ = ["PREDICTORS", "SCHEDULES", "Schedule", "schedule_named"]
