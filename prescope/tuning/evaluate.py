"""Try one point: in this process, in another one, or on another machine, always by the same function."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any, NamedTuple, Protocol

from ..errors import (
    BadProfile,
    BadTrace,
    NotEnoughMemory,
    SlotPoolTooLarge,
    SlotPoolTooSmall,
    TraceMismatch,
    UnsupportedOption,
)
from .points import INTERRUPTED, Asked, Outcome
from .settings import Setting

#: The library's own refusals of a setting.
REFUSALS = (
    UnsupportedOption,
    SlotPoolTooSmall,
    SlotPoolTooLarge,
    NotEnoughMemory,
    BadProfile,
    BadTrace,
    TraceMismatch,
)
#: Characters of a reason that are kept.
MOST_REASON = 500


class Measured(NamedTuple):
    """What a runner found.

    Attributes:
        values: by the name of the objective. `origin`: "simulated", "measured" or "emulated".
        machine: whose time it is.
    """

    values: Mapping[str, float]
    origin: str
    machine: str


class Runner(Protocol):
    """Says what a point is worth.

    Attributes:
        settings: all that it can move, by name. `objectives`: all that it can tell.
        prompts: checksums of the prompts that it uses, so that a proof can take others.
        is_here: it can only run in this process. `nbytes`: memory that it takes in each process.
        takes_gpu: it measures on a device: where there are GPUs, each process has one of its own.
    """

    @property
    def settings(self) -> Mapping[str, Setting]: ...

    @property
    def objectives(self) -> Sequence[str]: ...

    @property
    def prompts(self) -> Sequence[str]: ...

    @property
    def is_here(self) -> bool: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def takes_gpu(self) -> bool: ...

    def about(self) -> dict[str, Any]:
        """What its figures depend on besides the settings; two runs of one sweep must agree in it."""
        ...

    def run(self, settings: Mapping[str, Any], seed: int, is_cancelled: Callable[[], bool]) -> Measured:
        """Try one setting.

        Raises:
            CancelledError: `is_cancelled` came true before it was done.
            PrescopeError: the library refuses the setting.
        """
        ...

    def restore(self) -> None:
        """Leave what it ran on as it was."""
        ...


def evaluate(
    runner: Runner,
    asked: Asked,
    fixed: Mapping[str, Any],
    objectives: Sequence[str],
    is_cancelled: Callable[[], bool],
) -> Outcome:
    """Try one point; whatever goes wrong becomes its outcome."""
    begin = time.perf_counter()

    def ended(state: str, reason: str) -> Outcome:
        return Outcome(asked.number, state, {}, reason[:MOST_REASON], time.perf_counter() - begin)

    try:
        found = runner.run({**fixed, **asked.settings}, asked.seed, is_cancelled)
    except REFUSALS as error:
        return ended("infeasible", f"{type(error).__name__}: {error}")
    except CancelledError:
        return ended(INTERRUPTED, "cancelled")
    except Exception as error:  # noqa: BLE001 - kept with the point; one of a thousand must not end the night's sweep
        return ended("failed", f"{type(error).__name__}: {error}")
    values = {name: float(found.values[name]) for name in objectives}
    if unknown := [name for name, value in values.items() if not math.isfinite(value)]:
        return ended("failed", f"{', '.join(unknown)} is not known of this run")
    seconds = time.perf_counter() - begin
    return Outcome(asked.number, "finished", values, "", seconds, found.origin, found.machine)
