"""Every setting that can move: those of a replay (`Scenario`, `Simulator.run`) and those of `Engine.configure`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..cache.num_slots import require_slots_setting
from ..cache.policies import POLICIES
from ..core.types import MoEShape
from ..errors import UnsupportedOption
from ..scheduler import SCHEDULES


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting: what it is, and which values it takes.

    Attributes:
        kind: "choice", "int", "share" (a float) or "slots" (a count, a share or a text such as "8GiB").
        low, high: its values lie within, both included. `most`: the model has no more; a setting above it is
            infeasible, but part of a range may lie there.
        choices: of kind "choice", all there are; a menu can show them.
        has_own: None leaves it to the schedule, or to what the engine was loaded with.
    """

    what: str
    kind: str
    low: float = 0
    high: float | None = None
    most: float | None = None
    choices: tuple[Any, ...] = ()
    has_own: bool = True

    def problem(self, value: Any) -> str:
        """Why a value can never be one of this setting; "" if it may."""
        if value is None:
            return "" if self.has_own else "None is no value of it"
        if self.kind == "choice":
            listed = ", ".join(map(repr, self.choices))
            is_there = any(type(value) is type(one) and value == one for one in self.choices)
            return "" if is_there else f"{value!r} is none of {listed}"
        if self.kind == "slots":
            try:
                require_slots_setting(value)
            except UnsupportedOption as error:
                return str(error)
            return ""
        kinds = int if self.kind == "int" else int | float
        if isinstance(value, bool) or not isinstance(value, kinds):
            return f"{value!r} is no {'whole number' if self.kind == 'int' else 'number'}"
        if value < self.low or (self.high is not None and value > self.high):
            return f"{value!r} does not lie in [{self.low:g}, {'...' if self.high is None else f'{self.high:g}'}]"
        return ""

    def is_beyond(self, value: Any) -> bool:
        """Whether the model is too small for a value."""
        return self.most is not None and isinstance(value, int | float) and value > self.most


def _shared(shape: MoEShape, predictors: Iterable[str]) -> dict[str, Setting]:
    """What simulator and engine both know."""
    return {
        "schedule": Setting(
            what="who decides what is copied, prefetched and computed on the CPU",
            kind="choice", choices=tuple(SCHEDULES), has_own=False,
        ),
        "slots": Setting(
            what=f"places for experts: a count of {shape.total_experts}, a share in (0, 1], or '8GiB'",
            kind="slots", has_own=False,
        ),
        "cache": Setting(
            what="which expert gives up its slot; None: the schedule's own", kind="choice", choices=tuple(POLICIES)
        ),
        "predictor": Setting(
            what="whose predictions the schedule goes by; None: the schedule's own",
            kind="choice", choices=tuple(predictors),
        ),
        "lookahead": Setting(
            what="layers ahead that are predicted; None: the schedule's own",
            kind="int", low=1, most=max(1, shape.num_layers - 1),
        ),
        "width": Setting(
            what="experts prefetched for one layer at most; None: the schedule's own",
            kind="int", most=shape.num_experts,
        ),
        "threshold": Setting(
            what="experts less likely to be used are not prefetched; None: the schedule's own",
            kind="share", high=1,
        ),
        "cpu": Setting(
            what="whether the CPU may compute experts, where the schedule does", kind="choice", choices=(True, False)
        ),
        "batch": Setting(what="sequences that are decoded together", kind="int", low=1),
    }  # fmt: skip


def simulator_settings(
    shape: MoEShape, machines: Iterable[str], traces: Iterable[str], predictors: Iterable[str]
) -> Mapping[str, Setting]:
    """What moves in a replay.

    Args:
        machines, traces, predictors: by name, the first two with their default first.
    """
    chance = shape.top_k / shape.num_experts
    return {
        **_shared(shape, predictors),
        "recall": Setting(
            what="of predictor='noisy oracle': the share of the experts used that it names",
            kind="share", low=chance, high=1,
        ),
        "machine": Setting(what="whose times are on the clock", kind="choice", choices=tuple(machines)),
        "trace": Setting(what="which recorded run is replayed", kind="choice", choices=tuple(traces)),
        "most_in_flight": Setting(what="prefetches on the link at most; None: as the engine has it", kind="int"),
        "least_bytes": Setting(what="on the link for its full rate; None: the machine's own", kind="int"),
    }  # fmt: skip


def engine_settings(
    shape: MoEShape, predictors: Iterable[str], decodes: Iterable[str]
) -> Mapping[str, Setting]:
    """What moves on a device: what `Engine.configure` takes, and the batch."""
    return {
        **_shared(shape, predictors),
        "cpu_threads": Setting(what="threads that compute experts on the CPU; 0: none", kind="int"),
        "decode": Setting(what="how decode steps run", kind="choice", choices=tuple(decodes)),
        "compiled": Setting(
            what="compile the layers around the experts", kind="choice", choices=(True, False)
        ),
    }
