"""The card's other half: what a prediction is worth to a cache and to a schedule, with intervals over prompts.

Recall counts all experts alike. A schedule pays for the experts that have no slot: it gains what was foreseen of these,
and loses what it copied in vain. So a trace is replayed three times at each number of slots: on demand with the
schedule's cache, which says what that cache would miss; by the schedule without predictions; and by it with them. The
costs are a profile's (`HardwareProfile.costs`), or any that are stated; their source is in the card.

Shapes: S steps, L MoE layers, E experts, U units: prompts at batch 1, groups of `batch` prompts otherwise.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.types import FloatArray
from ..errors import TraceMismatch, UnsupportedOption
from ..predictor.base import Predictor, require_lookahead
from ..scheduler.costs import LayerCosts
from ..simulator import SimResult, Simulator, as_decode
from ..simulator.replay import DECIDED, FETCHED, ON_DEMAND, PREFETCHED, REASON, STEP
from ..traces.routing import RoutingTrace
from .intervals import Interval, interval_of, prompts_of, resamples
from .misses import missed_by_cache
from .prepare import require_trace
from .score_sums import best_mask, domain_of_each

#: Shares of all experts that there are slots for.
SLOTS = (0.125, 0.25, 0.5)
#: Domain of a unit whose prompts are of several.
MIXED = "mixed"
#: What a card says, each a ratio of two sums over units; see `ScheduleCard.value`.
RATIOS = {
    "recall_at_slots": ("in_best", "needed"),
    "coverage": ("foreseen", "missed"),
    "stall_us": ("stall", "token_layers"),
    "stall_without_us": ("stall_without", "token_layers"),
    "lost_us": ("lost", "token_layers"),
    "lost_without_us": ("lost_without", "token_layers"),
    "useful_bytes": ("useful", "tokens"),
    "wasted_bytes": ("wasted", "tokens"),
    "tokens_per_s": ("tokens", "seconds"),
    "tokens_per_s_without": ("tokens", "seconds_without"),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class ScheduleCard:
    """What one predictor is worth at one number of slots.

    Attributes:
        predictor, schedule, cache: names. `lookahead`: of the predictions that recall and coverage are of.
        slots, num_slots: share of all experts that has a slot, and how many that are.
        batch, threshold: tokens of a step; least probability that the schedule prefetches for.
        domains: (U,) of each unit. `sums`: name -> (U,), see `RATIOS`.
        source: of the costs.
    """

    predictor: str
    schedule: str
    cache: str
    lookahead: int
    slots: float | str
    num_slots: int
    batch: int
    threshold: float
    domains: NDArray[np.str_]
    sums: dict[str, FloatArray]
    source: str

    def value(self, name: str, *, domain: str | None = None, seed: int = 0) -> Interval:
        """One of these, with its 95 % interval over units:

        recall_at_slots: share of the experts that steps need among the n best predicted of their layer, n a layer's
            share of the slots: what would be there if slots held what is predicted.
        coverage: of the experts that the cache would miss without prefetching, those given the threshold's probability.
        stall_us, stall_without_us: microseconds that a layer waits for copies, per token; with predictions, without.
        lost_us, lost_without_us: microseconds of a layer, per token, beyond what it takes with all experts in slots:
            stalls, experts on the CPU, and what predictions cost.
        useful_bytes, wasted_bytes: prefetched per token, and used before it gave up its slot, or not.
        tokens_per_s, tokens_per_s_without: simulated, with predictions and without.
        """
        return interval_of(
            float(self._ratio(name, prompts_of(domain, self.domains).astype(float))),
            self._ratio(name, resamples(prompts_of(domain, self.domains), seed)),
        )

    def gain(
        self, other: "ScheduleCard | None" = None, *, domain: str | None = None, seed: int = 0
    ) -> Interval:
        """How much faster than with another predictor (None: without any), as a share; paired over units.

        Raises:
            TraceMismatch: the other card is of other steps, slots or another schedule.
        """
        if other is not None and not self._is_comparable(other):
            raise TraceMismatch(
                f"the cards of {self.predictor} and {other.predictor} are of different traces or settings; "
                f"make both by one call of schedule_cards"
            )
        chosen = prompts_of(domain, self.domains)
        base, name = (self, "tokens_per_s_without") if other is None else (other, "tokens_per_s")
        shares = [
            self._ratio("tokens_per_s", weights) / base._ratio(name, weights) - 1.0
            for weights in (chosen.astype(float), resamples(chosen, seed))
        ]
        return interval_of(float(shares[0]), shares[1])

    def row(self, *, domain: str | None = None) -> dict[str, object]:
        """All values without their intervals, and the settings; for tables."""
        weights = prompts_of(domain, self.domains).astype(float)
        return {
            "predictor": self.predictor,
            "slots": self.slots,
            "batch": self.batch,
            **{name: float(self._ratio(name, weights)) for name in RATIOS},
            "schedule": self.schedule,
            "cache": self.cache,
            "threshold": self.threshold,
            "source": self.source,
        }

    def _ratio(self, name: str, weights: FloatArray) -> FloatArray:
        if name not in RATIOS:
            raise UnsupportedOption(f"a card has no {name!r}; choose one of {', '.join(map(repr, RATIOS))}")
        part, whole = (weights @ self.sums[key] for key in RATIOS[name])
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio: FloatArray = np.where(whole > 0, part / whole, np.nan)
        return ratio

    def _is_comparable(self, other: "ScheduleCard") -> bool:
        settings = ("schedule", "num_slots", "batch", "source")
        return all(getattr(self, name) == getattr(other, name) for name in settings) and np.array_equal(
            self.sums["needed"], other.sums["needed"]
        )


def schedule_cards(
    predictor: Predictor,
    trace: RoutingTrace,
    costs: LayerCosts,
    *,
    row_bytes: int,
    slots: float | str | Iterable[float | str] = SLOTS,
    schedule: str = "presched",
    batch: int = 1,
    lookahead: int = 1,
    cpu: bool | None = None,
) -> list[ScheduleCard]:
    """Replay a trace with a predictor and without at each number of slots; the tokens of its prompts as if decoded.

    Args:
        costs: of a layer, with what a prediction costs (`LayerCosts.with_predictor`).
        slots: as of `Simulator.run`, one or several. `row_bytes`: of one expert. `batch`: prompts side by side.
        lookahead: of the predictions whose recall and coverage are counted; the schedule reads all it can.
        cpu: as of `Simulator.run`.

    Raises:
        UnsupportedOption: a setting that does not exist or cannot be.
        BadTrace, TraceMismatch: as `predictor.replay`.
    """
    require_trace(trace)
    steps = as_decode(trace, batch)
    simulator = Simulator(steps, costs, row_bytes=row_bytes, predictor=predictor)
    require_lookahead(lookahead, simulator.predictions.depth, predictor.name)
    shares = [slots] if isinstance(slots, str) or not isinstance(slots, Iterable) else list(slots)
    unit_S, domains = _units(steps, batch)
    all_there = np.ones((trace.num_layers, trace.num_experts), bool)
    least = simulator.run("on-demand", slots=1.0, resident=all_there)
    cards = []
    for share in shares:
        with_it = simulator.run(schedule, slots=share, cpu=cpu)
        without = simulator.run(schedule, slots=share, cpu=cpu, lookahead=0)
        config = with_it.config
        on_demand = simulator.run("on-demand", slots=share, cache=config["cache"])
        per_step = _foreseen(simulator, on_demand, lookahead, config["threshold"]) | _spent(
            with_it, without, least
        )
        cards.append(
            ScheduleCard(
                predictor=predictor.name,
                schedule=schedule,
                cache=config["cache"],
                lookahead=lookahead,
                slots=share,
                num_slots=config["num_slots"],
                batch=batch,
                threshold=config["threshold"],
                domains=domains,
                sums=_by_unit(unit_S, per_step, len(domains)),
                source=costs.source,
            )
        )
    return cards


def _by_unit(
    unit_S: NDArray[np.int64], per_step: Mapping[str, FloatArray], num_units: int
) -> dict[str, FloatArray]:
    """Each sum by unit (U,)."""
    return {
        name: np.bincount(unit_S, values, num_units).astype(np.float64) for name, values in per_step.items()
    }


def _units(steps: RoutingTrace, batch: int) -> tuple[NDArray[np.int64], NDArray[np.str_]]:
    """(S,) the unit of each step, and (U,) each unit's domain; groups are `as_decode`'s."""
    _, rank_R = np.unique(steps.sequence, return_inverse=True)
    _, first = np.unique(steps.step, return_index=True)
    unit_R = rank_R // batch
    domain_R = domain_of_each(steps)[steps.sequence]
    found = [np.unique(domain_R[unit_R == unit]) for unit in range(int(unit_R.max()) + 1)]
    return unit_R[first], np.array([names[0] if len(names) == 1 else MIXED for names in found])


def _foreseen(
    simulator: Simulator, on_demand: SimResult, lookahead: int, threshold: float
) -> dict[str, FloatArray]:
    """Per step: needs and what the slots would hold of them, misses and what was foreseen of them."""
    used = simulator.needs.tokens_SLE[:, lookahead:] > 0
    predicted = simulator.predicted
    expected = predicted.expected_dSLE[lookahead - 1][:, lookahead:]
    is_named = predicted.used_dSLE[lookahead - 1][:, lookahead:] >= max(threshold, 1e-6)
    missed = missed_by_cache(on_demand)[:, lookahead:]
    per_layer = on_demand.config["num_slots"] // simulator.shape.num_layers
    counts = {
        "needed": used,
        "in_best": used & best_mask(expected, per_layer),
        "missed": missed,
        "foreseen": missed & is_named,
    }
    return {name: mask.sum(axis=(1, 2)).astype(np.float64) for name, mask in counts.items()}


def _spent(with_it: SimResult, without: SimResult, least: SimResult) -> dict[str, FloatArray]:
    """Per step: tokens, times, stalls, and bytes that were prefetched."""
    tokens = with_it.needs.tokens_S.astype(np.float64)
    copies = with_it.log.copies
    ahead = copies[copies[:, REASON] != ON_DEMAND, STEP]
    issued = np.bincount(ahead, minlength=len(tokens)).astype(np.float64)
    used = with_it.log.counts[..., PREFETCHED].sum(axis=1).astype(np.float64)
    return {
        "tokens": tokens,
        "token_layers": tokens * with_it.log.counts.shape[1],
        "seconds": with_it.step_us / 1e6,
        "seconds_without": without.step_us / 1e6,
        "stall": _stall_us(with_it),
        "stall_without": _stall_us(without),
        "lost": with_it.step_us - least.step_us,
        "lost_without": without.step_us - least.step_us,
        "useful": used * with_it.row_bytes,
        "wasted": (issued - used) * with_it.row_bytes,
    }


def _stall_us(result: SimResult) -> FloatArray:
    times = result.log.times_us
    stalls: FloatArray = (times[..., FETCHED] - times[..., DECIDED]).sum(axis=1)
    return stalls
