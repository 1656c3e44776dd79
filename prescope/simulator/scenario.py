"""One setting of everything that a schedule can be told."""

from dataclasses import dataclass

from .machines import HERE

#: Predictors that know the trace they are replayed on: no engine can run them.
NOISY, ORACLE, NONE = "noisy oracle", "oracle", "none"


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Settings of one replay, or of one run.

    Attributes:
        schedule: a name in `scheduler.SCHEDULES`.
        slots: places for experts.
        cache: policy; None: the schedule's own.
        predictor: a name that `Scenarios` knows, "none", "oracle" or "noisy oracle"; None: the schedule's own.
        recall: of the noisy oracle, at every lookahead.
        lookahead, width, threshold: None: the schedule's own.
        cpu: the CPU lane may be used, where the schedule does and the machine's was measured.
        machine: name of a machine.
    """

    schedule: str = "presched"
    slots: int
    cache: str | None = None
    predictor: str | None = None
    recall: float = 0.8
    lookahead: int | None = None
    width: int | None = None
    threshold: float | None = None
    cpu: bool = True
    machine: str = HERE
