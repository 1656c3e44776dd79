"""prescope: run a Mixture-of-Experts model with its experts in CPU memory, and see where the time goes.

The door of the package. A name or a submodule (`prescope.simulator`) is imported when it is first used, so that
`import prescope` costs milliseconds and reading a saved run needs neither transformers nor plotly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prescope.core.renamed import RENAMED, install, module_renamed

if TYPE_CHECKING:
    from prescope.advice import MachineSpec as MachineSpec
    from prescope.advice import advise as advise
    from prescope.calibration import calibrate as calibrate
    from prescope.engine import Engine as Engine
    from prescope.engine import attach as attach
    from prescope.engine import load as load
    from prescope.profile import HardwareProfile as HardwareProfile
    from prescope.traces.importers import read_trace as read_trace
    from prescope.traces.result import RunResult as RunResult
    from prescope.traces.routing import RoutingTrace as RoutingTrace
    from prescope.training import train_predictor as train_predictor

__version__ = "0.1.0"

_HOME_OF = {
    "Engine": "prescope.engine",
    "HardwareProfile": "prescope.profile",
    "MachineSpec": "prescope.advice",
    "RoutingTrace": "prescope.traces.routing",
    "RunResult": "prescope.traces.result",
    "advise": "prescope.advice",
    "attach": "prescope.engine",
    "calibrate": "prescope.calibration",
    "load": "prescope.engine",
    "read_trace": "prescope.traces.importers",
    "train_predictor": "prescope.training",
}

#: Modules that are there at once after `import prescope`.
_SUBMODULES = (
    "advice", "cache", "calibration", "cli", "core", "device", "engine", "errors", "hf", "kernels", "predictor",
    "profile", "report", "scheduler", "session", "simulator", "traces", "training", "tuning", "views", "weights",
    "widgets",
)  # fmt: skip

__all__ = [
    "Engine",
    "HardwareProfile",
    "MachineSpec",
    "RoutingTrace",
    "RunResult",
    "__version__",
    "advise",
    "attach",
    "calibrate",
    "load",
    "read_trace",
    "train_predictor",
]


def __getattr__(name: str) -> Any:
    """Import a submodule, or the module behind a public name, when it is first asked for."""
    if name in _SUBMODULES:
        return import_module(f"prescope.{name}")
    if name in RENAMED:
        return module_renamed(name)
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(
            f"module 'prescope' has no attribute {name!r}; public names: {', '.join(__all__)}, and the modules "
            f"{', '.join(_SUBMODULES)}"
        )
    value = getattr(import_module(home), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})


install()
