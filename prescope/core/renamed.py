"""Names of prescope from before it was sorted into folders: an import of one gives the module, or the class, of today.

Standard library only: `import prescope` loads this.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: Former name -> name, both below `prescope`.
RENAMED = {
    "bounds": "traces.bounds",
    "config": "engine.config",
    "cost": "scheduler.costs",
    "cpu_experts": "kernels.cpu",
    "events": "traces.events",
    "hardware": "core.machine",
    "jit": "core.jit",
    "learning": "training",
    "metrics": "traces.metrics",
    "paths": "core.paths",
    "perfetto": "traces.perfetto",
    "planner": "scheduler.planner",
    "recorder": "engine.recorder",
    "replays": "simulator",
    "residency": "cache.residency",
    "result": "traces.result",
    "rounds": "cache.rounds",
    "routing": "traces.routing",
    "scheduling": "engine.schedule",
    "synthetic": "traces.synthetic",
    "units": "core.units",
    "workbench": "session",
}
#: Package -> former names in it that users had, by where they are below `prescope` today.
MOVED = {
    "cache": {"make_policy": "cache.policies.make_policy"},
    "core": {
        "ExpertKey": "core.types.ExpertKey",
        "Lane": "core.types.Lane",
        "MoEShape": "core.types.MoEShape",
        "Need": "core.types.NeedOutcome",
        "Reason": "core.types.Reason",
    },
    "predictor": {"Shape": "core.types.MoEShape"},
}


def moved(package: str, former: str) -> Any:
    """What was once called `prescope.<package>.<former>`, with a warning; for the package's `__getattr__`."""
    if former not in MOVED[package]:
        raise AttributeError(f"module 'prescope.{package}' has no attribute {former!r}")
    module, _, name = MOVED[package][former].rpartition(".")
    warnings.warn(
        f"prescope.{package}.{former} is called prescope.{module}.{name} now", FutureWarning, stacklevel=3
    )
    return getattr(import_module(f"prescope.{module}"), name)


def module_renamed(former: str) -> ModuleType:
    """The module that was once called `prescope.<former>`, with a warning that says what it is called now."""
    name = f"prescope.{RENAMED[former]}"
    warnings.warn(f"prescope.{former} is called {name} now", FutureWarning, stacklevel=3)
    return import_module(name)


class _Finder:
    """Finds and loads former names, when nobody else has found the module.

    A finder and a loader by their methods: importing importlib.abc takes longer than the rest of `import prescope`.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        is_ours = package == "prescope" and name in RENAMED
        return ModuleSpec(fullname, self) if is_ours else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None  # an ordinary one, which is not kept

    def exec_module(self, module: ModuleType) -> None:
        # Python takes what stands here afterwards for the module it was asked for.
        sys.modules[module.__name__] = module_renamed(module.__name__.partition(".")[2])


def install() -> None:
    """Let imports of former names be found."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
