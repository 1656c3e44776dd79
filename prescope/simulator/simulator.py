"""The simulator: what any setting would have done with a recorded trace, in milliseconds.

Pure: a trace, costs and a predictor in, a `SimResult` out. Only decode steps are on the clock; prefill steps bring
the slots into the state that the engine's prefill leaves.
"""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..cache.frequencies import require_frequencies
from ..cache.num_slots import resolve_slots
from ..cache.policies import CHANGES_ALL, by_frequency, make_policy
from ..cache.prefetch import LEAST_BYTES_ON_WIRE, Waiting, most_on_wire, prefetch_slots
from ..cache.residency import ResidencyTable
from ..cache.rounds import STREAM_SHARE
from ..cache.slots import bounds_of
from ..core.jit import said_if_compiled_first
from ..core.numbers import is_count, is_number
from ..errors import UnsupportedOption
from ..predictor.base import Predictor
from ..scheduler.costs import LayerCosts, compiled_costs
from ..scheduler.schedules import Schedule
from ..scheduler.settings import Resolved, resolve
from ..scheduler.types import Costs, Memory, ScheduleSettings
from ..traces.bounds import decode_misses, static_misses
from ..traces.routing import RoutingTrace
from .prefill import prefill, prefill_steps
from .prepare import LOOKAHEAD, PART_BYTES, Needs, Predicted, Predictions, needs_of
from .replay import STEP, Demand, Log, State, begin, replay
from .result import Bounds, Interval, SimResult

#: Steps replayed at once, at most: the copies of a part are counted as it goes.
MOST_STEPS = 256
#: Tokens/s may be wrong by this share however exact the costs are: of 76 cells on an H200 that the costs had not been
#: fitted to, the worst was 3.6 % off, half of them 0.6 % (docs/log/simulator.md).
LEAST_OFF = 0.04
#: States after the first prompt that are kept, one for each number of slots and cache.
MOST_WARM = 256
NO_WEIGHTS = np.zeros(0, np.float32)
NOTHING_PREDICTED = np.zeros((0, 0, 0, 0), np.float32)


class ResolvedSettings(NamedTuple):
    """A run's settings as resolved."""

    schedule: Resolved
    num_slots: int
    cache: str
    most_in_flight: int
    hindsight: bool  # what is hot is told by the very trace that is replayed


class Simulator:
    """Replays one trace under any setting.

    Args:
        trace: with decode steps; see `as_decode` for one without.
        costs: of one layer, with their origin.
        row_bytes: of one expert.
        predictor: what prefetching schedules go by; None: no predictions.
        lookahead: layers ahead that predictions are prepared for.
        step_us: what a step takes besides its MoE layers.
        label: what was replayed, for titles; the trace's model unless given.

    Raises:
        BadTrace: no decode step, or the predictor reads router inputs and the trace has none.
        TraceMismatch: the predictor is for another model.
        UnsupportedOption: it is no predictor, or a number is out of its range.
        BadPrediction: its scores are of another shape, or no probabilities; of one that scores rows (`ReplaysRows`)
            and is not kept whole, said by `run`.
    """

    def __init__(
        self,
        trace: RoutingTrace,
        costs: LayerCosts,
        *,
        row_bytes: int,
        predictor: Predictor | None = None,
        lookahead: int = LOOKAHEAD,
        step_us: float = 0.0,
        label: str = "",
    ) -> None:
        if not isinstance(trace, RoutingTrace) or not isinstance(costs, LayerCosts):
            raise UnsupportedOption(
                f"a simulator replays a RoutingTrace by LayerCosts, not a {type(trace).__name__} by a "
                f"{type(costs).__name__}; RoutingTrace.load and HardwareProfile.costs make them"
            )
        if not (is_count(row_bytes) and row_bytes >= 1 and is_number(step_us) and step_us >= 0):
            raise UnsupportedOption("row_bytes is at least 1; step_us is a time in microseconds")
        if not (is_count(lookahead) and lookahead >= 0):
            raise UnsupportedOption(f"lookahead is {lookahead!r}; it is a number of layers, 0 or more")
        self.trace, self.costs, self.predictor, self.row_bytes = trace, costs, predictor, row_bytes
        self.step_us = step_us
        self.label = label or trace.model
        self.shape = trace.shape._replace(row_bytes=row_bytes)
        self.needs = needs_of(trace)
        self.predictions = Predictions(predictor, trace, lookahead)
        self._segments = _segments(trace, self.needs)
        self._warm: dict[tuple[int, str, bytes, bytes], tuple[NDArray[np.generic], ...]] = {}
        self._bounds: dict[tuple[int, bool, bool], Bounds] = {}

    @property
    def predicted(self) -> Predicted:
        """All that the predictor says of the decode steps, as two arrays: large where there are many."""
        return self.predictions.of(slice(0, len(self.needs.steps)))

    @property
    def batch(self) -> int:
        """Tokens of a step, the most of any."""
        return int(self.needs.tokens_S.max())

    def run(
        self,
        schedule: str = "presched",
        *,
        slots: int | float | str = 0.25,
        cache: str | None = None,
        lookahead: int | None = None,
        width: int | None = None,
        threshold: float | None = None,
        cpu: bool | None = None,
        frequencies: NDArray[np.floating] | None = None,
        least_bytes: int = LEAST_BYTES_ON_WIRE,
        most_in_flight: int | None = None,
        believed: LayerCosts | None = None,
        resident: NDArray[np.bool_] | None = None,
    ) -> SimResult:
        """Replay the trace; what is not given is the schedule's own.

        Args:
            schedule: name in `scheduler.SCHEDULES`.
            slots: as of the engine: a count, a share of all experts, or a text such as "8GiB".
            cache: name in `cache.policies.POLICIES`.
            lookahead, width, threshold: see `scheduler.Schedule`.
            cpu: whether the CPU lane is used; by schedules that can, if the costs have one, unless given.
            frequencies: (L, E) that "static" goes by, and what a schedule has in slots from the start. A schedule that
                cannot do without is told those of this very trace unless given, which is said in `notes`.
            least_bytes: on the link, for its full rate; 0 on an emulated link (`prefetch.most_on_wire`).
            most_in_flight: prefetches on the link at most; as the engine has it unless given.
            believed: costs that decisions go by, to see what a wrong calibration does; the clock's unless given.
            resident: (L, E) experts that are in slots when the first step begins; as the trace's first prompt leaves
                them unless given.

        Raises:
            UnsupportedOption: a setting that does not exist or cannot be; more residents than slots; costs by which no
                time passes.
            SlotPoolTooSmall: fewer slots than a token needs.
        """
        if not isinstance(believed, LayerCosts | None):
            raise UnsupportedOption(f"believed are LayerCosts, not a {type(believed).__name__}")
        settings = self._resolve(
            schedule, slots, cache, lookahead, width, threshold, cpu, frequencies, least_bytes, most_in_flight
        )
        if frequencies is None and settings.hindsight:
            frequencies = self.trace.expert_counts()
        known = None if frequencies is None else require_frequencies(self.shape, frequencies)
        log = self._replay(settings, known, self.costs, believed, resident)
        if not log.step_end_us[-1] > 0:
            raise UnsupportedOption(
                f"by these costs no time passes ({self.costs.source}), so there are no tokens/s; give rest_us, what a "
                f"layer takes besides its experts, or step_us"
            )
        return SimResult(
            log=log,
            config=self._config(settings),
            label=f"simulated, costs: {self.costs.source}",
            trace=self.trace,
            batch=self.batch,
            row_bytes=self.row_bytes,
            notes=self._notes(settings, believed),
            needs=self.needs,
            streams=settings.schedule.schedule.streams,
            find_bounds=lambda: self.bounds(
                settings.num_slots,
                cpu=settings.schedule.cpu,
                placed=resident is not None or (known is not None and settings.schedule.schedule.places),
            ),
            find_interval=partial(self._find_interval, settings, known, believed, resident),
        )

    def bounds(self, slots: int | float | str = 0.25, *, cpu: bool = False, placed: bool = False) -> Bounds:
        """What no schedule can beat with so many slots, with or without the CPU lane.

        Args:
            placed: slots may hold any experts before the trace begins, and behind each prompt.
        """
        num_slots, _ = self._num_slots(slots)
        key = num_slots, cpu, placed
        if key not in self._bounds:
            self._bounds[key] = self._find_bounds(num_slots, cpu, placed)
        return self._bounds[key]

    # -- settings ----------------------------------------------------------------------------------------------

    def _num_slots(self, slots: int | float | str) -> tuple[int, str]:
        return resolve_slots(
            slots, total_experts=self.shape.total_experts, row_bytes=self.row_bytes, top_k=self.shape.top_k
        )

    def _resolve(
        self,
        name: str,
        slots: int | float | str,
        cache: str | None,
        lookahead: int | None,
        width: int | None,
        threshold: float | None,
        cpu: bool | None,
        frequencies: NDArray[np.floating] | None,
        least_bytes: int,
        most_in_flight: int | None,
    ) -> ResolvedSettings:
        resolved = resolve(
            name,
            num_experts=self.shape.num_experts,
            top_k=self.shape.top_k,
            depth=self.predictions.depth,
            predictor="" if self.predictor is None else self.predictor.name,
            lookahead=lookahead,
            width=width,
            threshold=threshold,
            cpu=cpu,
            has_cpu=len(self.costs.cpu_us) > 1,
        )
        cache = resolved.schedule.cache if cache is None else cache
        num_slots, _ = self._num_slots(slots)
        most = most_on_wire(self.row_bytes, num_slots, least_bytes)
        if most_in_flight is not None:
            if not is_count(most_in_flight) or most_in_flight < 0:
                raise UnsupportedOption(f"most_in_flight is {most_in_flight!r}; a count is at least 0")
            most = min(int(most_in_flight), prefetch_slots(num_slots))
        return ResolvedSettings(
            resolved,
            num_slots,
            cache,
            most,
            self._is_hindsight(frequencies, resolved.schedule, cache),
        )

    def _is_hindsight(
        self, frequencies: NDArray[np.floating] | None, schedule: Schedule, cache: str | None
    ) -> bool:
        """Whether what is hot is told by the trace itself."""
        if frequencies is None:
            return schedule.lives_on_frequencies(cache)
        goes_by_them = schedule.places or schedule.lives_on_frequencies(cache)
        return goes_by_them and np.array_equal(frequencies, self.trace.expert_counts())

    def _config(self, settings: ResolvedSettings) -> dict[str, Any]:
        resolved = settings.schedule
        told = resolved.settings
        predictor = self.predictor.name if self.predictor is not None and resolved.predicts else "none"
        return {
            "schedule": resolved.schedule.name,
            "num_slots": settings.num_slots,
            "slots_frac": settings.num_slots / self.shape.total_experts,
            "cache": settings.cache,
            "predictor": predictor,
            "lookahead": told.lookahead,
            "lag": told.lag,
            "width": told.width,
            "threshold": told.threshold,
            "cpu": resolved.cpu,
            "most_in_flight": settings.most_in_flight,
            "model": self.label,
            "row_bytes": self.row_bytes,
            "step_us": self.step_us,
            "costs": asdict(self.costs),
        }

    def _notes(self, settings: ResolvedSettings, believed: LayerCosts | None) -> list[str]:
        notes = []
        if settings.hindsight:
            notes.append("what is hot is told by how often this very trace uses each expert (hindsight)")
        if settings.schedule.schedule.predictor != "none" and self.predictor is None:
            notes.append(
                f"{settings.schedule.schedule.title} ran without predictions: the simulator was given no predictor"
            )
        if believed is not None:
            notes.append(f"decisions believed other costs: {believed.source}")
        return notes

    # -- the replay --------------------------------------------------------------------------------------------

    def _replay(
        self,
        settings: ResolvedSettings,
        known: NDArray[np.float64] | None,
        clock_costs: LayerCosts,
        believed: LayerCosts | None,
        resident: NDArray[np.bool_] | None,
        step_us: float | None = None,
    ) -> Log:
        policy = make_policy(settings.cache, self.shape, known)
        table = ResidencyTable(self.shape, settings.num_slots, policy)
        if known is not None and settings.schedule.schedule.places:
            table.placed = by_frequency(known)[-settings.num_slots :]
            table.known_LE = known if settings.schedule.schedule.heeds_prompt else None
        if resident is not None:
            _fill(table, resident)
        resolved = settings.schedule
        form = partial(compiled_costs, cpu=resolved.cpu, predicts=resolved.predicts > 0)
        costs, by = form(clock_costs), form(self.costs if believed is None else believed)
        if clock_costs.is_layered:
            # In every layer's way, and counted with its rest; but the host looks at what has landed before it decides.
            decide_us = min(clock_costs.decide_us, costs.rest_us)
            costs = costs._replace(rest_us=costs.rest_us - decide_us, decide_us=decide_us)
        step_us = self.step_us if step_us is None else step_us
        depth = resolved.predicts
        memory = Memory.fresh(depth, self.shape.num_layers, self.shape.num_experts)
        logs, now = [], 0.0
        with said_if_compiled_first(replay, "the simulator"):
            for i, (prefills, steps) in enumerate(self._segments):
                if i > 0 or resident is None:
                    self._prefill(table, prefills, resolved.settings, by, is_first=i == 0)
                tick = np.array([policy.tick], np.int64)
                slots = table.arrays
                if policy.kind not in CHANGES_ALL:
                    slots = slots._replace(lowest=bounds_of(slots, self.shape.num_layers))
                state = State(slots, tick, memory, Waiting.none(self.shape.total_experts))
                clock, wire = begin(table.num_slots, settings.most_in_flight, now)
                for part in self._parts(steps):
                    demand = self._demand(part, depth, with_weights=settings.cache == "score")
                    log = replay(
                        resolved.settings, costs, by, policy.kind, settings.most_in_flight, self.costs.is_layered,
                        step_us, state, demand, clock, wire,
                    )  # fmt: skip
                    logs.append(log)
                table.unprotect()
                table.in_flight[:] = False  # whatever follows waits for all copies first
                policy.tick, now = int(state.tick[0]), float(logs[-1].step_end_us[-1])
        return _joined(logs)

    def _find_interval(
        self,
        settings: ResolvedSettings,
        known: NDArray[np.float64] | None,
        believed: LayerCosts | None,
        resident: NDArray[np.bool_] | None,
    ) -> Interval:
        tokens, share = int(self.needs.tokens_S.sum()), 1.0 + self.costs.spread.rest
        ends = [
            float(self._replay(settings, known, costs, believed or self.costs, resident, step_us).step_end_us[-1])
            for costs, step_us in (
                (self.costs.at_worst(), self.step_us * share), (self.costs.at_best(), self.step_us / share)
            )
        ]  # fmt: skip
        low, high = (1e6 * tokens / end for end in ends)
        return Interval(low / (1 + LEAST_OFF), high * (1 + LEAST_OFF))

    def _parts(self, steps: slice) -> Iterator[slice]:
        """Steps whose predictions are in memory at once."""
        most = max(1, min(MOST_STEPS, PART_BYTES // max(1, self.predictions.step_bytes)))
        for first in range(steps.start, steps.stop, most):
            yield slice(first, min(first + most, steps.stop))

    def _demand(self, steps: slice, depth: int, *, with_weights: bool) -> Demand:
        needs, L = self.needs, self.shape.num_layers
        first = needs.first[steps.start * L : steps.stop * L + 1]
        here = slice(int(first[0]), int(first[-1]))
        predicted = self.predictions.of(steps) if depth else Predicted(NOTHING_PREDICTED, NOTHING_PREDICTED)
        return Demand(
            first - first[0],
            needs.experts[here],
            needs.tokens[here],
            needs.weights[here] if with_weights else NO_WEIGHTS,
            predicted.expected_dSLE[:depth],
            predicted.used_dSLE[:depth],
        )

    def _prefill(
        self,
        table: ResidencyTable,
        prefills: list[int],
        settings: ScheduleSettings,
        costs: Costs,
        is_first: bool,
    ) -> None:
        """The first prompt's walk starts cold and depends on little, so it is remembered: a slider comes back to it."""
        policy = table.policy
        by = policy.scores.tobytes() if policy.scores.any() else b""
        known = b"" if table.known_LE is None else table.known_LE.tobytes()
        told = b"".join(np.asarray(value).tobytes() for value in (settings.schedule, *costs))
        key = table.num_slots, policy.name, by + table.placed.tobytes() + known, told
        if is_first and key in self._warm:
            table.slot_of[:], table.key_of[:], table.prefetched[:], policy.scores[:], tick = self._warm[key]
            policy.tick = int(tick)
            return
        if is_first:
            _put_back(table)
        for step in prefills:
            prefill(table, self.trace, step, settings, costs)
            _put_back(table)
        if is_first:
            kept = (
                table.slot_of.copy(),
                table.key_of.copy(),
                table.prefetched.copy(),
                policy.scores.copy(),
                np.array(policy.tick),
            )
            self._warm[key] = kept
            if len(self._warm) > MOST_WARM:
                del self._warm[next(iter(self._warm))]

    def _find_bounds(self, num_slots: int, cpu: bool, placed: bool) -> Bounds:
        costs, S = self.costs, len(self.needs.steps)
        misses, fewest = (
            decode_misses(self.trace, num_slots, bypass=bypass, placed=placed, sure_share=STREAM_SHARE)
            for bypass in (False, True)
        )
        needed = len(self.needs.experts)
        link_ms = misses * costs.link_us / S / 1e3
        has_lane = cpu and len(costs.cpu_us) > 1
        both_us, expert_us = float("nan"), costs.gpu_us
        if has_lane:
            # Behind a slow link the CPU may do more by itself than beside it: both read the same memory.
            alone_us = (costs.cpu_alone_us or costs.cpu_us)[1]
            both_us = min(_together(costs.link_us, costs.cpu_us[1]), alone_us)
            expert_us = _together(costs.gpu_us, alone_us)
        both_ms = fewest * both_us / S / 1e3
        in_the_way = costs.decide_us if costs.is_layered else 0.0
        layers_us = self.shape.num_layers * (costs.rest_us + in_the_way)
        gpu_ms = (layers_us + self.step_us + needed * expert_us / S) / 1e3
        step_ms = max(gpu_ms, both_ms if has_lane else link_ms)
        return Bounds(
            misses,
            fewest,
            static_misses(self.trace, num_slots).misses_decode,
            link_ms,
            both_ms,
            gpu_ms,
            step_ms,
            1e3 * float(self.needs.tokens_S.mean()) / step_ms if step_ms > 0 else float("inf"),
        )


def _together(first_us: float, second_us: float) -> float:
    """Time of one piece of work when two work side by side."""
    return 0.0 if min(first_us, second_us) == 0 else 1.0 / (1.0 / first_us + 1.0 / second_us)


def _put_back(table: ResidencyTable) -> None:
    """Off the clock: the engine does it with the prompt."""
    for _, _, slots in table.put_back():
        table.landed(slots)


def _fill(table: ResidencyTable, resident_LE: NDArray[np.bool_]) -> None:
    """Put experts into empty slots.

    Raises:
        UnsupportedOption: they do not fit, are another model's, or are no truth values.
    """
    if not isinstance(resident_LE, np.ndarray) or resident_LE.dtype != np.bool_:
        given = resident_LE.dtype if isinstance(resident_LE, np.ndarray) else type(resident_LE).__name__
        raise UnsupportedOption(f"resident is {given}; it is an array of truth values, (layers, experts)")
    shape, count = table.shape, int(resident_LE.sum())
    if resident_LE.shape != (shape.num_layers, shape.num_experts) or count > table.num_slots:
        raise UnsupportedOption(
            f"resident has shape {resident_LE.shape} and {count} experts; the model has {shape.num_layers} x "
            f"{shape.num_experts}, and there are {table.num_slots} slots"
        )
    for layer in range(shape.num_layers):
        table.landed(table.take(layer, np.flatnonzero(resident_LE[layer])))


def _segments(trace: RoutingTrace, needs: Needs) -> list[tuple[list[int], slice]]:
    """Prefill steps and the decode steps after them, in order: several pairs where runs were joined."""
    prefills = prefill_steps(trace)
    before = np.searchsorted(prefills, needs.steps)  # prefills that come before each decode step
    firsts = np.flatnonzero(np.diff(before, prepend=-1))
    ends = [*firsts[1:].tolist(), len(needs.steps)]
    segments, seen = [], 0
    for first, end in zip(firsts.tolist(), ends, strict=True):
        segments.append((prefills[seen : before[first]].tolist(), slice(first, end)))
        seen = int(before[first])
    return segments


def _joined(logs: list[Log]) -> Log:
    """Logs of consecutive segments as one; steps are counted on, and the list is emptied."""
    if len(logs) == 1:
        return logs[0]
    firsts = np.cumsum([0, *(len(log.step_end_us) for log in logs[:-1])])
    for log, first in zip(logs, firsts.tolist(), strict=True):
        log.copies[:, STEP] += first
    fields = [list(field) for field in zip(*logs, strict=True)]
    logs.clear()  # each field is given up as it is joined: not all of a long trace's log is there twice
    return Log(*(np.concatenate(fields.pop(0)) for _ in Log._fields))
