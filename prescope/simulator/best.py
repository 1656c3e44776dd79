"""The best setting that is quickly found: every schedule as published, and PreSched's own knobs turned a little."""

from dataclasses import replace
from itertools import product

from ..scheduler import SCHEDULES
from .scenario import NONE, Scenario
from .scenarios import STAND_INS, Scenarios

#: Of PreSched, tried with each predictor that an engine can run: some two dozen replays in all.
LOOKAHEADS, THRESHOLDS = (1, 2, 4), (0.1, 0.2, 0.35, 0.5)


def best_found(scenarios: Scenarios, scenario: Scenario) -> Scenario:
    """The setting with the most simulated tokens/s among those tried; slots, machine and CPU lane are the choice's.

    What knows the recorded future is left out.
    """
    able = [name for name in SCHEDULES if _has_its_predictor(scenarios, name)]
    tried = [scenarios.as_published(scenario, name) for name in able]
    known = [name for name in STAND_INS if name in scenarios.predictors]
    presched = scenarios.as_published(scenario, "presched")
    tried += [
        replace(presched, predictor=name, lookahead=ahead, threshold=threshold)
        for name, ahead, threshold in product(known[:1], LOOKAHEADS, THRESHOLDS)
    ]
    return max(tried, key=lambda one: scenarios.run(one).tokens_per_s)


def _has_its_predictor(scenarios: Scenarios, schedule: str) -> bool:
    full = scenarios.resolved(Scenario(schedule=schedule, slots=1, machine=scenarios.first_machine))
    return not SCHEDULES[schedule].needs_predictor or full.predictor != NONE
