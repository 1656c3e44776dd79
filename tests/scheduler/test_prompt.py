"""What of a prompt's layer is copied: as many as end soonest, of all there could be."""

import numpy as np
import pytest

from prescope.cache.residency import LayerNeed
from prescope.scheduler import SCHEDULES
from prescope.scheduler.costs import LayerCosts, compiled_costs
from prescope.scheduler.presched import split
from prescope.scheduler.prompt import copies_of_prompt
from prescope.scheduler.settings import resolve

NOBODY = np.zeros(0)


def settings(schedule: str):
    return resolve(schedule, num_experts=32, depth=1).settings


def drawn(rng: np.random.Generator) -> tuple[LayerCosts, LayerNeed]:
    num, most = int(rng.integers(1, 33)), int(rng.integers(1, 14))
    hits, late = rng.multinomial(num, [0.3, 0.2, 0.5])[:2].tolist()
    tokens = np.concatenate(
        [np.sort(rng.integers(1, most + 1, n))[::-1] for n in (hits, late, num - hits - late)]
    )
    each, link_us = np.cumsum(rng.uniform(5.0, 90.0, 9)), rng.uniform(10.0, 400.0)
    costs = LayerCosts(
        link_us=link_us, link_busy_us=link_us * rng.uniform(1.0, 1.4), gpu_us=0.0, rest_us=80.0,
        cpu_us=(0.0, *each.tolist()), cpu_alone_us=(0.0, *(each * rng.uniform(0.6, 1.0)).tolist()),
        cpu_base_us=rng.uniform(0.0, 60.0), source="drawn",
    )  # fmt: skip
    return costs, LayerNeed(0, np.arange(num), tokens.astype(np.int64), hits, late)


def test_no_other_number_of_copies_ends_sooner():
    rng = np.random.default_rng(5)
    seen = set()
    for _ in range(300):
        layer_costs, need = drawn(rng)
        costs = compiled_costs(layer_costs, cpu=True, predicts=False)
        here = need.num_hits + need.num_late
        free = int(rng.integers(0, 4))
        found = copies_of_prompt(settings("presched"), costs, need, free)

        def ends(k: int, costs=costs, need=need, here=here) -> float:
            *_, done, _ = split(
                costs, need.tokens[here:], here, NOBODY, need.num_late * costs.link_us, NOBODY, NOBODY, k
            )
            return done

        least = max(
            int((need.tokens[here:] > 9).sum()), min(free, need.num_misses)
        )  # more than the costs know
        times = [ends(k) for k in range(need.num_misses + 1)]
        assert found >= least and times[found] == pytest.approx(min(times[least:]))
        seen.add((found > 0) + (found == need.num_misses > 0))
    assert seen == {0, 1, 2}, "all on the CPU, some, and all copied were drawn"


def test_without_a_cpu_lane_and_under_other_schedules_all_are_copied():
    layer_costs, need = drawn(np.random.default_rng(1))
    alone, both = (compiled_costs(layer_costs, cpu=cpu, predicts=False) for cpu in (False, True))
    assert copies_of_prompt(settings("presched"), alone, need, 0) == need.num_misses
    for schedule in set(SCHEDULES) - {"presched"}:
        assert copies_of_prompt(settings(schedule), both, need, 0) == need.num_misses


def test_a_cpu_whose_time_is_known_for_one_token_alone_computes_what_it_is_faster_with():
    costs = LayerCosts(link_us=100.0, gpu_us=0.0, rest_us=80.0, cpu_us=(0.0, 1.0), source="by hand")
    need = LayerNeed(0, np.arange(4), np.array([3, 2, 1, 1]), 0, 0)
    assert (
        copies_of_prompt(settings("presched"), compiled_costs(costs, cpu=True, predicts=False), need, 0) == 2
    )
