"""Does prediction pay at this setting, and why not? One line, computed from replays of the same trace."""

from dataclasses import replace
from typing import NamedTuple

from ..core.units import digits
from ..scheduler import SCHEDULES, schedule_named
from .result import SimResult
from .scenario import NONE, ORACLE, Scenario
from .scenarios import STAND_INS, Scenarios

#: A change of tokens/s below this is none: two orders of the same copies differ by as much.
LEAST_GAIN = 0.02
#: From this share of the time on, whatever is busy is the limit.
IS_LIMIT = 0.9
#: Predictors whose names are written otherwise in text.
TITLES = {"llapor": "LLaPor"}


class Verdict(NamedTuple):
    """What prediction does for one setting.

    Attributes:
        pays: it gains, or would; None: it changes nothing.
        gain: tokens/s with prediction over the best without, less 1; of the one that would be chosen, where the
            setting predicts nothing.
        perfect_gain: the same for an oracle that costs nothing.
        without: the best schedule without prediction. `with_it`: the one that predicts.
        limit: what is busy longest: "link", "GPU", "CPU" or "waiting". `limit_frac`: for which share of the time.
        words: one line for people.
    """

    pays: bool | None
    gain: float
    perfect_gain: float
    without: SimResult
    with_it: SimResult | None
    limit: str
    limit_frac: float
    words: str


def verdict(scenarios: Scenarios, scenario: Scenario) -> Verdict:
    """Whether prediction pays with these slots on this machine; raises as `Scenarios.run`."""
    full = scenarios.resolved(scenario)
    chosen = scenarios.run(scenario)
    is_predicting = predicts(scenarios, scenario)
    without = _best_without(scenarios, full)
    if not is_predicting and chosen.tokens_per_s > without.tokens_per_s:
        without = chosen  # with a cache or a schedule that is not among those that are tried
    guess = scenario if is_predicting else _best_known(scenarios, full)
    with_it = chosen if is_predicting else None if guess is None else scenarios.run(guess)
    base = scenarios.resolved(guess or _presched(full, ORACLE))
    perfect = scenarios.run(replace(base, predictor=ORACLE))
    gain = 0.0 if with_it is None else with_it.tokens_per_s / without.tokens_per_s - 1
    perfect_gain = max(perfect.tokens_per_s / without.tokens_per_s - 1, gain)
    limit, share = limit_of(chosen)
    found = Verdict(
        None if abs(gain) < LEAST_GAIN else gain > 0,
        gain,
        perfect_gain,
        without,
        with_it,
        limit,
        share,
        "",
    )
    return found._replace(words=_words(found, is_predicting, perfect, chosen))


def predicts(scenarios: Scenarios, scenario: Scenario) -> bool:
    """Whether a choice goes by predictions."""
    full = scenarios.resolved(scenario)
    return schedule_named(full.schedule).predictor != NONE and (full.predictor or NONE) != NONE


def link_frac(result: SimResult) -> float:
    """Share of the time in which the link copies."""
    spans = result.log.copy_us
    return float((spans[:, 1] - spans[:, 0]).sum()) / result.total_us if len(spans) else 0.0


def limit_of(result: SimResult) -> tuple[str, float]:
    """What is busy for the longest share of the time."""
    decode = result.metrics.decode
    shares = {
        "link": decode.link_use_frac,
        "GPU": (decode.dense_gpu_ms + decode.experts_gpu_ms) / decode.wall_ms,
        "CPU": decode.experts_cpu_ms / decode.wall_ms,
    }
    name = max(shares, key=lambda one: shares[one])
    return (name, shares[name]) if shares[name] > 0.5 else ("waiting", 1 - shares["GPU"])


def _presched(full: Scenario, predictor: str) -> Scenario:
    return Scenario(
        schedule="presched", slots=full.slots, machine=full.machine, cpu=full.cpu, predictor=predictor
    )


def _best_without(scenarios: Scenarios, full: Scenario) -> SimResult:
    """On demand, PreSched without predictions, or the CPU lane alone where it may be used."""
    # A schedule whose own lane is the CPU's is there only if the choice allows the lane.
    alone = Scenario(
        schedule="on-demand", slots=full.slots, machine=full.machine, cpu=full.cpu or _may(scenarios, full)
    )
    names = ("fiddler", "presched") if alone.cpu else ("presched",)
    ways = [alone, *(replace(alone, schedule=name, predictor=NONE) for name in names)]
    return max((scenarios.run(one) for one in ways), key=lambda result: result.tokens_per_s)


def _may(scenarios: Scenarios, full: Scenario) -> bool:
    """The choice's schedule never uses the CPU, so it says nothing against the lane."""
    return not schedule_named(full.schedule).uses_cpu and len(scenarios.machine(full).costs.cpu_us) > 1


def _best_known(scenarios: Scenarios, full: Scenario) -> Scenario | None:
    """PreSched with the best predictor there is; None without one."""
    known = [name for name in STAND_INS if name in scenarios.predictors]
    return _presched(replace(full, cpu=full.cpu or _may(scenarios, full)), known[0]) if known else None


def _words(found: Verdict, is_predicting: bool, perfect: SimResult, chosen: SimResult) -> str:
    best = f"{name_of(found.without)}, the best without it ({digits(found.without.tokens_per_s)} tokens/s)"
    limit = (
        "the GPU waits" if found.limit == "waiting" else f"the {found.limit} is busy"
    ) + f" {100 * found.limit_frac:.0f} % of the time"
    most = digits(max(perfect.tokens_per_s, 0.0 if found.with_it is None else found.with_it.tokens_per_s))
    # A choice that never uses the CPU has a bound without it, which the others here may pass.
    with_lane = " with the CPU lane" if perfect.config["cpu"] and not chosen.config["cpu"] else ""
    bound = digits((perfect if with_lane else chosen).bounds.tokens_per_s)
    ceiling = f"; perfect prediction would give {most}, the bound{with_lane} is {bound}"
    if found.with_it is None:
        verb = "would pay" if found.perfect_gain >= LEAST_GAIN else "cannot pay"
        return f"Prediction {verb} here: {100 * found.perfect_gain:+.0f} % at most over {best}; {limit}"
    who = name_of(found.with_it)
    if found.pays:
        verb = "pays" if is_predicting else "would pay"
        by = "" if is_predicting else f" with {who}"
        return f"Prediction {verb} here: {100 * found.gain:+.0f} %{by} over {best}; {limit}{ceiling}"
    verb = "changes nothing" if found.pays is None else "does not pay"
    return f"Prediction {verb} here ({who}: {100 * found.gain:+.0f} % against {best}): {_why_not(found)}{ceiling}"


def name_of(result: SimResult) -> str:
    """Schedule and predictor."""
    way, predictor = SCHEDULES[result.config["schedule"]], result.config["predictor"]
    if predictor == NONE:
        return way.title if way.predictor == NONE else f"{way.title} without predictions"
    return f"{way.title} with {TITLES.get(predictor, predictor)}"


def _why_not(found: Verdict) -> str:
    """What keeps prediction from paying, the most general reason first."""
    plain, own = found.without, found.with_it
    assert own is not None, "somebody predicted"
    counts = plain.counts
    if not counts.misses + counts.late:
        return "nothing is missing, all experts needed are in slots"
    if counts.on_cpu > 0.5 * counts.misses:
        share = 100 * counts.on_cpu / counts.misses
        return f"the CPU computes {share:.0f} % of what is missing sooner than the link could bring it"
    if found.perfect_gain < LEAST_GAIN:
        busy = link_frac(plain)
        if busy >= IS_LIMIT:
            return f"the link is busy {100 * busy:.0f} % of the time already, prediction only copies earlier"
        waits = plain.stall_ms / (plain.total_us / 1e3)
        return f"layers wait for copies {100 * waits:.0f} % of the time only"
    wasted = own.counts.prefetches - own.counts.prefetched
    cost = own.config["costs"]["predict_us"]
    spent = f", a prediction takes {cost:.0f} us a layer" if cost else ""
    share = 100 * wasted / max(1, own.counts.prefetches)
    return f"{share:.0f} % of what {own.config['predictor']} has copied is not used{spent}"
