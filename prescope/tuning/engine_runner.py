"""Points on the device: each setting run for real, from cold slots, on the same prompts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any, NamedTuple

import numpy as np

from ..core.machine import this_place
from ..core.types import MoEShape
from ..engine.config import DECODES
from ..engine.engine import Engine
from ..errors import UnsupportedOption
from ..predictor import Predictor
from ..traces.result import RunResult
from .evaluate import Measured
from .prompts import checksum_of_prompt, require_new_tokens, texts_of
from .settings import Setting, engine_settings

#: Tokens that warm the code up, where nothing is captured for a length.
WARM_TOKENS = 2


class EngineRunner:
    """Runs settings on an engine, one after the other.

    Each point starts from the settings that the engine had when the runner was made, is warmed up, and then runs with
    cold slots. The engine gets its settings back with `restore`, which a sweep calls at its end. The costs
    that schedules go by are the engine's: `engine.configure(costs=...)` before, and every point goes by the same.

    Args:
        engine: of this process; or a function without arguments that loads one, for workers in other processes, each
            with a GPU of its own. It must be picklable: a function of a module.
        prompts: the texts (or lists of token ids) that every setting runs; with names, the values count. They are run
            `batch` at a time, one at a time where batch does not move.
        new_tokens: of each prompt, neither more nor fewer.
        predictors: that the setting `predictor` may name, besides "none".
        shape: of the model; where a function is given and must not be called in this process to find out.

    Raises:
        UnsupportedOption: there is no prompt, one is neither a text nor token ids, or fewer than two new tokens.
    """

    objectives = ("tokens_per_s", "p50_ms", "p95_ms", "ttft_ms", "gpu_bytes")
    takes_gpu = True

    def __init__(
        self,
        engine: Engine | Callable[[], Engine],
        prompts: Sequence[Any] | Mapping[str, Any],
        *,
        new_tokens: int = 32,
        predictors: Iterable[Predictor] = (),
        shape: MoEShape | None = None,
    ) -> None:
        self._texts = texts_of(prompts)
        require_new_tokens(new_tokens)
        self._new_tokens = new_tokens
        self._predictors = {one.name: one for one in predictors}
        self._load = None if isinstance(engine, Engine) else engine
        self._device: TunedEngine | None = None
        if isinstance(engine, Engine):
            self._device = TunedEngine(engine, self._predictors)
        elif shape is None:
            self._device = TunedEngine(engine(), self._predictors)
        known = shape if self._device is None else self._device.engine.shape
        assert known is not None
        self._settings = engine_settings(known, ["none", *self._predictors], DECODES)
        self._shape = known

    @property
    def settings(self) -> Mapping[str, Setting]:
        """All that can move, by name."""
        return self._settings

    @property
    def is_here(self) -> bool:
        """It holds an engine of this process and nothing that could load another."""
        return self._load is None

    @property
    def prompts(self) -> list[str]:
        """Checksums of the prompts."""
        return sorted({checksum_of_prompt(text) for text in self._texts})

    @property
    def nbytes(self) -> int:
        """Nothing besides the engine."""
        return 0

    def about(self) -> dict[str, Any]:
        """The model's shape and the tokens; which machine it was is said of each point."""
        return {
            "runner": "engine",
            "shape": list(self._shape),
            "new_tokens": self._new_tokens,
            "predictors": list(self._predictors),
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_device": None}

    @property
    def device(self) -> "TunedEngine":
        """The engine of this process, loaded if it is not there yet."""
        if self._device is None:
            assert self._load is not None
            self._device = TunedEngine(self._load(), self._predictors)
        return self._device

    def run(
        self, settings: Mapping[str, Any], seed: int = 0, is_cancelled: Callable[[], bool] = lambda: False
    ) -> Measured:
        """Configure, warm up, run from cold slots. Greedy, so that the seed changes nothing.

        Raises:
            CancelledError: told to end meanwhile.
            PrescopeError: the engine refuses the setting, and goes on with its former ones.
        """
        return self.device.measure(settings, self._texts, self._new_tokens, is_cancelled).measured

    def restore(self) -> None:
        """Give the engine the settings back that it had when the runner was made."""
        if self._device is not None:
            self._device.restore()


class Timed(NamedTuple):
    """One setting, run once.

    Attributes:
        measured: its figures. `tokens`: of each prompt. `config`: as resolved. `label`: of the machine and its link.
    """

    measured: Measured
    tokens: list[list[int]]
    config: dict[str, Any]
    label: str


class TunedEngine:
    """An engine that takes settings by the names of a sweep.

    Attributes:
        engine: itself. `default`: the settings that it has, in the same names.
    """

    def __init__(self, engine: Engine, predictors: Mapping[str, Predictor]) -> None:
        self.engine, self._predictors = engine, dict(predictors)
        config, chosen = engine.config, engine.predictor
        self.default = {
            name: getattr(config, name)
            for name in (
                "slots",
                "decode",
                "compiled",
                "schedule",
                "lookahead",
                "width",
                "threshold",
                "cpu_threads",
            )
        } | {"cache": engine.chosen_cache, "predictor": "none" if chosen is None else chosen}

    def restore(self) -> None:
        """Its own settings."""
        self.engine.configure(**self.default)

    def configure(self, settings: Mapping[str, Any]) -> None:
        """Put a setting in place; the engine goes on with its former one where it refuses."""
        self.engine.configure(**self.keywords(settings))

    def keywords(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """For `Engine.configure`: the default with these settings in it."""
        given = {name: value for name, value in settings.items() if name not in ("batch", "cpu")}
        kept = {name for name in ("slots", "decode", "compiled", "predictor") if given.get(name, 0) is None}
        found = self.default | {name: value for name, value in given.items() if name not in kept}
        found["cache"] = found["cache"] or "auto"
        name = found["predictor"]
        if isinstance(name, str) and name != "none":
            if name not in self._predictors:
                listed = ", ".join(map(repr, ["none", *self._predictors]))
                raise UnsupportedOption(f"predictor is {name!r}; choose one of {listed}")
            found["predictor"] = self._predictors[name]
        if settings.get("cpu") is False:
            found["cpu_threads"] = 0
        elif settings.get("cpu") and found["cpu_threads"] == 0:
            found["cpu_threads"] = None
        return found

    def measure(
        self,
        settings: Mapping[str, Any],
        prompts: Sequence[Any],
        new_tokens: int,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> Timed:
        """Run one setting; the engine is nobody else's meanwhile. Raises as `EngineRunner.run`."""
        told = {"was_told": is_cancelled, "is_patient": True}
        timed: Timed = self.engine.turn.run(
            "a point of a sweep", self._measure, (settings, prompts, new_tokens, is_cancelled), **told
        )
        return timed

    def _measure(
        self,
        settings: Mapping[str, Any],
        prompts: Sequence[Any],
        new_tokens: int,
        is_cancelled: Callable[[], bool],
    ) -> Timed:
        engine = self.engine
        self.configure(settings)
        batch = settings.get("batch") or 1
        groups = [list(prompts[i : i + batch]) for i in range(0, len(prompts), batch)]
        length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        longest = max(groups, key=lambda group: max(len(text) for text in group))
        # Steps are captured for a length: a shorter warm-up would leave that to the run.
        warm = new_tokens if engine.runner.device.captures_steps else min(WARM_TOKENS, new_tokens)
        engine.generate(longest, max_new_tokens=warm, min_new_tokens=warm)
        engine.clear_cache()

        def look(_: int) -> None:
            if is_cancelled():
                engine.turn.tell()

        runs = []
        for group in groups:
            runs.append(engine.generate(group, on_step=look, **length))
            if is_cancelled():
                raise CancelledError("the point was cancelled")
        return _timed(engine, runs)


def _timed(engine: Engine, runs: Sequence[RunResult]) -> Timed:
    """Figures of all groups together."""
    steps = [run.steps.loc[run.steps["phase"] == "decode", "dur_us"].to_numpy() / 1e3 for run in runs]
    step_ms = np.concatenate(steps)
    tokens = sum(sum(map(len, run.tokens)) - len(run.tokens) for run in runs)
    seconds = sum(run.metrics.decode.wall_ms for run in runs) / 1e3
    values = {
        "tokens_per_s": tokens / seconds,
        "p50_ms": float(np.percentile(step_ms, 50)),
        "p95_ms": float(np.percentile(step_ms, 95)),
        "ttft_ms": float(np.median([run.metrics.ttft_ms for run in runs])),
        "gpu_bytes": float(engine.num_slots * engine.shape.row_bytes),
    }
    hardware = runs[0].hardware
    origin = {"measured": "measured", "virtual": "simulated"}.get(str(hardware["link"]), "emulated")
    if hardware.get("link_factor", 1) > 1:
        origin = "emulated"
    measured = Measured(values, origin, f"{this_place(hardware)}{engine.form_said}")
    return Timed(measured, [row for run in runs for row in run.tokens], runs[0].config, runs[0].label)
