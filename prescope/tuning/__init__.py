"""Sweeps: which setting is the best, searched on the simulator or on the device, and proved on the device.

A `space` says which settings may move, a runner (`simulator_runner`, `engine_runner`) what one of them is worth, a
`search` which one is tried next. `sweep` is the door: it asks, hands points to its `pools` of workers, and tells the
`record`, an Optuna study that optuna-dashboard opens as it is. `proof` runs the best against the default.

    space = Space(slots=Range(0.1, 0.9), schedule=Choices("on-demand", "presched"), lookahead=Range(1, 4))
    sweep = open_sweep("first", space, SimulatorRunner.of_recording("medium.b1"))
    print(sweep.estimate(500, workers=2))
    sweep.run(points=500, workers=2)
    sweep.best()

A name is imported when it is first used: a worker that simulates needs no engine, and is there seconds sooner.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..core.extras import missing_extra

try:
    import distributed  # noqa: F401 - asked for here, so that its absence is said once for all of them
    import optuna  # noqa: F401
except ImportError as error:
    raise missing_extra("prescope.tuning", "sweep", error) from error

if TYPE_CHECKING:
    from .engine_runner import EngineRunner as EngineRunner
    from .estimate import Estimate as Estimate
    from .evaluate import Measured as Measured
    from .evaluate import Runner as Runner
    from .job import SweepJob as SweepJob
    from .objectives import OBJECTIVES as OBJECTIVES
    from .objectives import Objective as Objective
    from .progress import Progress as Progress
    from .proof import Proof as Proof
    from .proof import prove as prove
    from .search import METHODS as METHODS
    from .settings import Setting as Setting
    from .simulator_runner import SimulatorRunner as SimulatorRunner
    from .space import Choices as Choices
    from .space import Range as Range
    from .space import Space as Space
    from .sweep import Sweep as Sweep
    from .sweep import load_sweep as load_sweep
    from .sweep import open_sweep as open_sweep
    from .timings import Verdict as Verdict
    from .timings import verdict as verdict

_HOME_OF = {
    "Choices": "space",
    "EngineRunner": "engine_runner",
    "Estimate": "estimate",
    "METHODS": "search",
    "Measured": "evaluate",
    "OBJECTIVES": "objectives",
    "Objective": "objectives",
    "Progress": "progress",
    "Proof": "proof",
    "Range": "space",
    "Runner": "evaluate",
    "Setting": "settings",
    "SimulatorRunner": "simulator_runner",
    "Space": "space",
    "Sweep": "sweep",
    "SweepJob": "job",
    "Verdict": "timings",
    "load_sweep": "sweep",
    "open_sweep": "sweep",
    "prove": "proof",
    "verdict": "timings",
}
__all__ = [
    "METHODS",
    "OBJECTIVES",
    "Choices",
    "EngineRunner",
    "Estimate",
    "Measured",
    "Objective",
    "Progress",
    "Proof",
    "Range",
    "Runner",
    "Setting",
    "SimulatorRunner",
    "Space",
    "Sweep",
    "SweepJob",
    "Verdict",
    "load_sweep",
    "open_sweep",
    "prove",
    "verdict",
]


def __getattr__(name: str) -> Any:
    """Import the module behind a public name when it is first asked for."""
    if name not in _HOME_OF:
        raise AttributeError(
            f"module 'prescope.tuning' has no attribute {name!r}; public names: {', '.join(__all__)}"
        )
    value = getattr(import_module(f"prescope.tuning.{_HOME_OF[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
