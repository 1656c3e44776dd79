"""Which points of a search are run on the device, and what its simulator says of them and of the default."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import PrescopeError, UnsupportedOption
from .engine_runner import TunedEngine
from .prompts import checksum_of_prompt
from .settings import engine_settings
from .simulator_runner import SimulatorRunner
from .sweep import Sweep

#: Candidates of a sweep.
TOP = 3
#: Points of a sweep that are looked through for candidates that can be run.
LOOKED_AT = 50
#: What a point says of the replay alone: the engine has its own prompts and is its own machine.
OF_THE_REPLAY = ("trace", "machine")


class Chosen(NamedTuple):
    """A setting to be run.

    Attributes:
        number: of its point, -1 where there is none. `simulated`: tokens/s that the search said, NaN where it did not.
    """

    settings: dict[str, Any]
    number: int
    simulated: float


def require_unseen(sweep: Sweep, texts: Sequence[Any], notes: list[str]) -> None:
    """Raise UnsupportedOption if a prompt was used in the search; say it where nobody knows."""
    seen = [text for text in texts if checksum_of_prompt(text) in sweep.prompts]
    if seen:
        raise UnsupportedOption(
            f"{len(seen)} of {len(texts)} prompts were used in the search ({str(seen[0])[:60]!r}); a setting proves "
            f"itself on others"
        )
    if not sweep.prompts:
        notes.append("the search did not say which prompts it used, so nobody checked that these are others")


def best_of(sweep: Sweep, device: TunedEngine, notes: list[str]) -> list[Chosen]:
    """The best points that an engine can run, each setting once; what was left out goes into the notes."""
    moving = [name for name in sweep.space if name in OF_THE_REPLAY]
    if moving:
        notes.append(f"{', '.join(moving)} moved in the search; the proof runs on this machine as it is")
    is_known = "tokens_per_s" in [one.name for one in sweep.objectives] and _is_of_the_model(sweep, device)
    found, left_out = list[Chosen](), 0
    for row in sweep.best(LOOKED_AT).to_dict("records"):
        settings = _for_engine(sweep.settings_of(row["number"]), device)
        if settings is None:
            left_out += 1
        elif settings not in [one.settings for one in found]:
            is_simulated = is_known and row["origin"] == "simulated"
            found.append(
                Chosen(settings, row["number"], row["tokens_per_s"] if is_simulated else float("nan"))
            )
        if len(found) == TOP:
            break
    if not _is_of_the_model(sweep, device):
        notes.append(
            "the search replayed a run of another model: its tokens/s are not held against those measured here"
        )
    if left_out:
        notes.append(f"{left_out} of the best points can only be simulated, not run here: left out")
    return found


def _is_of_the_model(sweep: Sweep, device: TunedEngine) -> bool:
    """Whether the search, where it was a replay, was of a run of a model of this one's shape."""
    runner = sweep.runner
    if not isinstance(runner, SimulatorRunner):
        return True
    there, here = runner.shape, device.engine.shape
    sizes = 3 if there.top_k and here.top_k else 2  # an engine may not know its top-k before the first token
    return there[:sizes] == here[:sizes]


def _for_engine(point: Mapping[str, Any], device: TunedEngine) -> dict[str, Any] | None:
    """A point without what is of the replay alone; None if the engine cannot be told the rest."""
    names = engine_settings(device.engine.shape, (), ())
    settings = {name: value for name, value in point.items() if name not in OF_THE_REPLAY}
    if any(value is not None and name not in names for name, value in settings.items()):
        return None
    settings = {name: value for name, value in settings.items() if name in names}
    try:
        device.keywords(settings)
    except UnsupportedOption:  # an oracle, or recorded predictions
        return None
    return settings


def _are_same(one: NDArray[np.floating] | None, other: NDArray[np.floating] | None) -> bool:
    return one is other if one is None or other is None else np.array_equal(one, other)


def simulated_default(
    sweep: Sweep | None, device: TunedEngine, default: Mapping[str, Any], notes: list[str]
) -> float:
    """Tokens/s that the search's simulator gives the default; NaN where it cannot."""
    runner = None if sweep is None else sweep.runner
    if sweep is None or not isinstance(runner, SimulatorRunner) or not _is_of_the_model(sweep, device):
        return float("nan")
    if not _are_same(runner.frequencies, device.engine.frequencies):
        notes.append(
            "the search was simulated with other hot experts in mind than the engine has, or none: give it "
            "SimulatorRunner(..., frequencies=engine.frequencies), as session.scenarios(run) does"
        )
    told = device.default | dict(default)
    known = {name: told.get(name) for name in runner.settings}
    known |= {name: value for name, value in sweep.fixed.items() if name in OF_THE_REPLAY}
    known["cpu"] = told.get("cpu", told["cpu_threads"] != 0)
    known["cache"] = None if told["cache"] == "auto" else told["cache"]
    known["predictor"] = getattr(told["predictor"], "name", told["predictor"])
    try:
        return runner.run(known).values["tokens_per_s"]
    except PrescopeError as error:
        notes.append(f"the default cannot be simulated: {error}")
        return float("nan")
