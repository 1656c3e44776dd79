"""The recommendation is run: the best of a search against the default, on the device, on other prompts."""

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pandas as pd

from ..core.numbers import is_count
from ..core.units import digits, format_bytes
from ..core.waiting import waiting_bar
from ..engine.engine import Engine
from ..errors import UnsupportedOption
from ..predictor import Predictor
from .candidates import Chosen, best_of, require_unseen, simulated_default
from .engine_runner import Timed, TunedEngine
from .prompts import require_new_tokens, texts_of
from .sweep import Sweep
from .timings import Verdict, verdict

#: Width of an interval from which on the machine was too busy, or the runs too short.
WIDE = 0.2


class Candidate(NamedTuple):
    """One setting that was run against the default.

    Attributes:
        settings: as `EngineRunner` takes them. `number`: of its point, -1 where there was no sweep.
        default_ms, candidate_ms: time per token of each run, two a block.
        verdict: what they say. `tokens_per_s`: mean of its runs.
        simulated: tokens/s that the sweep said, and `simulated_gain` over the default; NaN where it did not.
        gpu_bytes: of its slots. `texts_differ`: of how many prompts the text is not the default's.
    """

    settings: Mapping[str, Any]
    number: int
    default_ms: tuple[float, ...]
    candidate_ms: tuple[float, ...]
    verdict: Verdict
    tokens_per_s: float
    simulated: float
    simulated_gain: float
    gpu_bytes: float
    texts_differ: int

    @property
    def simulator_off(self) -> float:
        """Simulated over measured tokens/s, less 1."""
        return self.simulated / self.tokens_per_s - 1


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was measured.

    Attributes:
        kept: a candidate is faster than the default, by more than 3 % and beyond the spread.
        settings: those to use, in a sweep's names: the candidate's, or the default's. `keywords`: the same as
            `Engine.configure` takes them; a batch is none of its settings.
        best: the candidate that is kept, else the one with the highest lower end. `candidates`: all, as in the sweep.
        default: settings it was compared with. `words`: the verdict in one line.
        origin, machine: "measured" or "emulated", and where.
        notes: what a reader of the figures must know.
    """

    kept: bool
    settings: Mapping[str, Any]
    keywords: Mapping[str, Any]
    best: Candidate
    candidates: Sequence[Candidate]
    default: Mapping[str, Any]
    words: str
    origin: str
    machine: str
    label: str
    notes: Sequence[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([self.words, *self.notes])

    @property
    def is_lossless(self) -> bool:
        """The best candidate's texts are the default's."""
        return self.best.texts_differ == 0

    def table(self) -> pd.DataFrame:
        """One row a candidate: its settings, what was measured, by how much the simulator was off."""
        rows = [
            {
                **one.settings,
                "tokens/s": one.tokens_per_s,
                "gain %": 100 * one.verdict.gain,
                "from %": 100 * one.verdict.low,
                "to %": 100 * one.verdict.high,
                "kept": one.verdict.kept,
                "simulated gain %": 100 * one.simulated_gain,
                "simulator off %": 100 * one.simulator_off,
                "GPU memory": format_bytes(int(one.gpu_bytes)),
                "other texts": one.texts_differ,
            }
            for one in self.candidates
        ]
        return pd.DataFrame(rows)


def prove(
    sweep: Sweep | Mapping[str, Any] | Sequence[Mapping[str, Any]],
    engine: Engine,
    prompts: Sequence[Any] | Mapping[str, Any],
    *,
    default: Mapping[str, Any] | None = None,
    repeats: int = 4,
    new_tokens: int = 32,
    predictors: Iterable[Predictor] = (),
    on_progress: Callable[[int, int], object] | None = None,
    cancel: threading.Event | None = None,
) -> Proof:
    """Run the best of a search against the default, in blocks default - candidate - candidate - default.

    The engine has its former settings again afterwards; `engine.configure(**proof.keywords)` is yours. The costs that
    its schedules go by stay as they are: calibrate, and `engine.configure(costs=...)`, before.

    Args:
        sweep: its three best points that an engine can run; or settings, or several.
        prompts: not those of the search.
        default: settings to beat, over those that the engine has now; None: these.
        repeats: blocks for each candidate, two or more.
        new_tokens: of each prompt, two or more. `predictors`: that settings may name.
        on_progress: called with runs done and runs in all, from the calling thread. None: a bar shows them.
        cancel: set from elsewhere, it ends the proof.

    Raises:
        UnsupportedOption: a prompt was used in the search, nothing of it can be run, or there are too few blocks or
            new tokens.
        CancelledError: cancelled.
        PrescopeError: the engine refuses the default, or a candidate; nothing was run then.
    """
    texts = texts_of(prompts)
    require_new_tokens(new_tokens)
    if not is_count(repeats) or repeats < 2:
        raise UnsupportedOption(f"repeats is {repeats!r}; two blocks or more show the spread")
    device = TunedEngine(engine, {one.name: one for one in predictors})
    trial = _Trial(sweep, device, texts, dict(default or {}), repeats, new_tokens, cancel)
    told = {"was_told": trial.is_cancelled, "is_patient": True}
    with waiting_bar(trial.num_runs, "proving", "run") as bar:
        tell = on_progress or (lambda done, _: bar.update(done - bar.n))
        proof: Proof = engine.turn.run("a proof", trial.run, (tell,), **told)
    return proof


class _Trial:
    """One proof on its way."""

    def __init__(
        self,
        sweep: Sweep | Mapping[str, Any] | Sequence[Mapping[str, Any]],
        device: TunedEngine,
        texts: Sequence[Any],
        default: dict[str, Any],
        repeats: int,
        new_tokens: int,
        cancel: threading.Event | None,
    ) -> None:
        self._sweep = sweep if isinstance(sweep, Sweep) else None
        self._device, self._texts, self._default = device, texts, default
        self._repeats, self._new_tokens = repeats, new_tokens
        self._cancel = cancel or threading.Event()
        self._tell: Callable[[int, int], object] = lambda done, total: None
        self._notes: list[str] = []
        self._done = 0
        if isinstance(sweep, Sweep):
            require_unseen(sweep, texts, self._notes)
            self._chosen = best_of(sweep, device, self._notes)
        else:
            given = [sweep] if isinstance(sweep, Mapping) else sweep
            self._chosen = [Chosen(dict(one), -1, float("nan")) for one in given]
        if not self._chosen:
            raise UnsupportedOption(
                "there is nothing to prove: give a sweep with finished points, or settings"
            )

    def is_cancelled(self) -> bool:
        return self._cancel.is_set()

    @property
    def num_runs(self) -> int:
        """Of the default and all candidates, and the first, which is nobody's."""
        return 1 + 4 * self._repeats * len(self._chosen)

    # -- runs ------------------------------------------------------------------------------------------------------

    def run(self, tell: Callable[[int, int], object]) -> Proof:
        """All blocks of all candidates; call it in the engine's turn.

        Args:
            tell: called with runs done and runs in all.
        """
        self._tell = tell
        try:
            for one in self._chosen:  # what the engine refuses is said before minutes are spent on the others
                self._device.configure(one.settings)
            simulated = simulated_default(self._sweep, self._device, self._default, self._notes)
            candidates, timed = [], self._measure(self._default)  # the first run of all is nobody's
            for one in self._chosen:
                candidates.append(self._compare(one, simulated))
        finally:
            self._device.restore()
        return self._proof(candidates, timed)

    def _measure(self, settings: Mapping[str, Any]) -> Timed:
        timed = self._device.measure(settings, self._texts, self._new_tokens, self.is_cancelled)
        self._done += 1
        self._tell(self._done, self.num_runs)
        return timed

    def _compare(self, chosen: Chosen, simulated_default: float) -> Candidate:
        default, candidate = list[Timed](), list[Timed]()
        for _ in range(self._repeats):
            for settings, runs in (
                (self._default, default), (chosen.settings, candidate),
                (chosen.settings, candidate), (self._default, default),
            ):  # fmt: skip
                runs.append(self._measure(settings))
        default_ms, candidate_ms = (
            tuple(1e3 / one.measured.values["tokens_per_s"] for one in runs) for runs in (default, candidate)
        )
        return Candidate(
            chosen.settings,
            chosen.number,
            default_ms,
            candidate_ms,
            verdict(default_ms, candidate_ms, candidates=len(self._chosen)),
            1e3 * len(candidate_ms) / sum(candidate_ms),
            chosen.simulated,
            chosen.simulated / simulated_default - 1,
            candidate[0].measured.values["gpu_bytes"],
            sum(a != b for a, b in zip(default[0].tokens, candidate[0].tokens, strict=True)),
        )

    def _proof(self, candidates: Sequence[Candidate], timed: Timed) -> Proof:
        best = max(candidates, key=lambda one: one.verdict.low)
        kept = best.verdict.kept
        words = (
            best.verdict.words
            if kept or len(candidates) == 1
            else f"best of {len(candidates)}: {best.verdict.words}"
        )
        notes = [*self._notes, *self._about(best, timed)]
        default = self._device.default | self._default
        settings = best.settings if kept else self._default
        return Proof(
            kept=kept,
            settings=settings,
            keywords=self._device.keywords(settings),
            best=best,
            candidates=candidates,
            default={name: getattr(value, "name", value) for name, value in default.items()},
            words=words,
            origin=timed.measured.origin,
            machine=timed.measured.machine,
            label=timed.label,
            notes=notes,
        )

    def _about(self, best: Candidate, timed: Timed) -> list[str]:
        notes = []
        if timed.config.get("lossy"):
            notes.append(
                f"these are figures of {timed.config['expert_form']} experts (lossy), and of no others"
            )
        if best.texts_differ:
            notes.append(
                f"not the same texts: {best.texts_differ} of {len(self._texts)} differ from the default's, so the two "
                f"do not compute exactly the same"
            )
        batches = [one.get("batch") or 1 for one in (best.settings, self._default)]
        if batches[0] != batches[1]:
            notes.append(
                f"not the same work: it decodes {batches[0]} sequences together, the default {batches[1]}; fix batch "
                f"in the search, or give the default the same"
            )
        if best.verdict.high - best.verdict.low > WIDE:
            notes.append(
                "the runs differ so much that little can be told: prove it on a quiet machine, or with more repeats "
                "and new_tokens"
            )
        more = best.gpu_bytes - timed.measured.values["gpu_bytes"]
        if more:
            side = "more" if more > 0 else "less"
            notes.append(f"it takes {format_bytes(int(abs(more)))} {side} GPU memory than the default")
        if math.isfinite(best.simulated):
            said = (
                f"the simulator said {digits(best.simulated)} tokens/s, {digits(best.tokens_per_s)} were measured: "
                f"{100 * best.simulator_off:+.1f} % off"
            )
            if math.isfinite(best.simulated_gain):
                said += (
                    f"; gain {100 * best.simulated_gain:+.1f} % there, {100 * best.verdict.gain:+.1f} % here"
                )
            notes.append(said)
        return notes
