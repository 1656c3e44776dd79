"""What a few runs of a batch say of its machine: all that the simulator is told before other settings are compared."""

from collections.abc import Callable

from prescope.engine.engine import Engine
from prescope.profile import HardwareProfile
from prescope.simulator import Machine, machine_of_run
from prescope.traces.result import RunResult

#: Makes a run under these settings of `Engine.configure`.
Run = Callable[..., RunResult]
#: Settings that belong to a schedule, as it has them itself.
OWN = {"cache": "auto", "predictor": "none", "lookahead": None, "threshold": None, "width": None}


def known_machine(
    engine: Engine, run: Run, profile: HardwareProfile | None, slots: float = 0.5, *, has_lane: bool = True
) -> Machine:
    """The machine at hand, by two runs on demand, two whose schedule decides without predictions, and two with the CPU
    lane, beside copies and without.

    Args:
        run: makes a run of the batch in question.
        profile: of this machine, for the CPU lane; without one there is none.
        slots: of these runs, as a share of all experts.
        has_lane: run with the CPU lane as well.
    """
    here = engine.shape, engine.expert_size, profile
    on_demand = {"schedule": "on-demand", "slots": slots, **OWN}
    alone = run(**on_demand)
    by_alone = machine_of_run(alone, *here)
    planned = {
        "schedule": "hybrimoe", "slots": slots, "cpu_threads": 0, "costs": by_alone.costs_with(False), **OWN,
    }  # fmt: skip
    decided = run(**planned)
    # Once more of each: how far the machine drifts meanwhile is part of the interval.
    others = [run(**on_demand), run(**planned)]
    if has_lane:
        with_lane = planned | {"cpu_threads": None, "costs": by_alone.costs_with(True)}
        others += [run(**with_lane | {"schedule": schedule}) for schedule in ("hybrimoe", "static-split")]
    costs = machine_of_run(alone, *here, others).costs_of("on-demand")
    return machine_of_run(decided, *here, others)._replace(on_demand=costs)
