"""A schedule with a person's settings, resolved: engine and simulator ask the same function."""

from typing import NamedTuple

import numpy as np

from ..core.numbers import is_count, is_number
from ..errors import UnsupportedOption
from .schedules import Schedule, schedule_named
from .types import ScheduleSettings


class Resolved(NamedTuple):
    """What a schedule goes by.

    Attributes:
        settings: as its decisions read them.
        predicts: layers ahead that predictions are made for; 0: none are made.
        cpu: whether the CPU computes experts.
    """

    schedule: Schedule
    settings: ScheduleSettings
    predicts: int
    cpu: bool


def resolve(
    name: str,
    *,
    num_experts: int,
    depth: int,
    top_k: int = 1,
    predictor: str = "",
    lookahead: int | None = None,
    width: int | None = None,
    threshold: float | None = None,
    cpu: bool | None = None,
    has_cpu: bool = True,
) -> Resolved:
    """A schedule's own settings where a person gives none.

    A schedule that looks at no predictions has none made, whatever lookahead is given.

    Args:
        num_experts: of a layer. `top_k`: of them that a token uses.
        depth: layers ahead that predictions can be had for; 0 without a predictor. `predictor`: its name.
        cpu: None: where the schedule uses it and it is there. `has_cpu`: whether it is there.

    Raises:
        UnsupportedOption: there is no such schedule, or a setting is out of its range.
    """
    schedule = schedule_named(name)
    if schedule.predictor == "none":
        depth = lookahead = 0
    if lookahead is None:
        lookahead = min(schedule.lookahead, depth)
    if not (is_count(lookahead) and 0 <= lookahead <= depth):
        by = f"{predictor} answers" if predictor else "there is no predictor, so choose one or None:"
        raise UnsupportedOption(f"lookahead is {lookahead!r}; {by} for 0 to {depth} layers ahead here")
    if width is None:
        width = num_experts if schedule.width is None else min(schedule.width, num_experts)
    if not (is_count(width) and 0 <= width <= num_experts):
        raise UnsupportedOption(
            f"width is {width!r}; a layer has {num_experts} experts: choose 0 to {num_experts}"
        )
    threshold = schedule.threshold if threshold is None else threshold
    if not (is_number(threshold) and 0.0 <= threshold <= 1.0):
        raise UnsupportedOption(f"threshold is {threshold!r}; a probability lies in [0, 1]")
    if not isinstance(cpu, bool | np.bool_ | None):
        raise UnsupportedOption(f"cpu is {cpu!r}; it is True, False, or None for the schedule's own")
    if cpu and not (schedule.uses_cpu and has_cpu):
        why = "the costs have no CPU times (cpu_us)" if schedule.uses_cpu else f"{name} never uses the CPU"
        raise UnsupportedOption(f"cpu=True, but {why}")
    lag = schedule.lag if lookahead else 0
    return Resolved(
        schedule,
        # Compiled decisions are compiled anew for a number of another type.
        ScheduleSettings(schedule.number, int(lookahead), int(width), float(threshold), lag, top_k),
        min(int(lookahead) + lag, depth),
        schedule.uses_cpu and has_cpu if cpu is None else bool(cpu),
    )
