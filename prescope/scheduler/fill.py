"""What a copy is worth that nobody waits for: for link time that the window has no use for.

A copy's worth is the CPU's time that its expert would take, as often as it is expected to be used while it stays; its
price is the CPU's time that it costs, since both read the same memory. Pure; times are microseconds.
"""

from typing import NamedTuple

import numpy as np

from ..cache.slots import Slots, slots_to_give
from ..core.jit import jit
from ..core.types import FloatArray, IntArray
from .learn import USE_STEPS
from .types import Costs, cpu_time

#: An expert that the CPU computed saves its time so many times once it is in a slot, weighed by `misses_return`; below
#: the second number that is not counted. 1.5 loses up to 14 % at batch 1 of tiny-moe's own text without a predictor,
#: 2.5 another 1 % at batch 4; a fixed bound of 0.35, as it was, lost a third at batch 1 (simulated,
#: docs/log/scheduler.md).
REUSES_OF_A_COPY, LEAST_LASTING = 2.0, 0.05
#: The price of a copy is known, its worth is guessed: it must be so many times the price, and so many uses at least.
DOUBT, LEAST_USES = 1.5, 0.25


class Habits(NamedTuple):
    """What is known of experts besides predictions."""

    lasting: float  # see `learn.reuse_lasts`
    returning: float  # see `learn.misses_return`
    uses: FloatArray  # (L * E,) decayed share of the steps that used it
    share_lasts: float  # see `learn.share_lasts`
    newest: float  # what the last step has added to the share of an expert that it used
    num_experts: int  # E


@jit
def cpu_of(costs: Costs, tokens: IntArray) -> float:
    """The CPU's time for experts with their tokens (n,), in one submission; 0 for none."""
    total, cpu_us = costs.cpu_base_us if len(tokens) else 0.0, costs.cpu_us
    for i in range(len(tokens)):
        total += cpu_time(cpu_us, tokens[i])
    return total


@jit
def price_us(costs: Costs, cpu_us: float, layer_us: float) -> float:
    """What one copy costs the CPU, which computes `cpu_us` of every `layer_us`; 0 without a CPU lane."""
    if len(costs.cpu_us) < 2:
        return 0.0
    slower = 1.0 - costs.cpu_alone_us[1] / max(costs.cpu_us[1], 1e-9)
    share = cpu_us / max(cpu_us, layer_us, 1e-9)
    # Beside the CPU a copy takes longer too, so that it is there for longer.
    beside = share / max(costs.link_busy_us, 1e-9)
    copy_us = 1.0 / max(beside + (1.0 - share) / max(costs.link_us, 1e-9), 1e-9)
    return share * copy_us * slower


@jit
def pays(costs: Costs, tokens: float, used: float, price: float) -> bool:
    """Whether a predicted use saves the CPU more than the copy costs it; always without a CPU lane.

    Args:
        tokens: expected. `used`: probability of use.
    """
    return len(costs.cpu_us) < 2 or used * cpu_time(costs.cpu_us, max(1.0, tokens / used)) > price


@jit
def worth_a_copy(
    keys: IntArray, each_us: float, price: float, most: int, habits: Habits, slots: Slots
) -> IntArray:
    """Of experts (n,) without a slot that the CPU computes, at most `most` that are worth a copy, the best first.

    The i-th best must be better than the i-th least of those in slots, by the cache's scores, and be used so much more
    often that its copy pays: by what lasts from step to step, or by the shares of uses.

    Args:
        each_us: what the CPU takes for one of them. `price`: see `price_us`.
    """
    most = min(most, len(keys))
    if most <= 0:
        return keys[:0]
    victims = slots_to_give(most, slots.in_flight, keys[:0], slots)
    again = REUSES_OF_A_COPY * habits.returning if habits.returning >= LEAST_LASTING else 0.0
    order = np.argsort(-slots.scores[keys], kind="mergesort")
    count = 0
    while count < len(victims):
        key, victim = keys[order[count]], slots.key_of[victims[count]]
        if victim >= 0 and slots.scores[key] <= slots.scores[victim]:
            break
        more = _more_uses(habits, key, victim)
        if each_us * max(again, USE_STEPS * more) <= max(DOUBT * price, LEAST_USES * each_us):
            break
        count += 1
    return keys[order[:count]]


@jit
def _more_uses(habits: Habits, key: int, victim: int) -> float:
    """How much more often a step is expected to use an expert than the one whose slot it would get (-1: nobody's)."""
    if victim >= 0:  # a use that has just been seen is no reason: others had theirs at other times
        return habits.share_lasts * (habits.uses[key] - habits.newest - habits.uses[victim])
    first = key - key % habits.num_experts
    mean = habits.uses[first : first + habits.num_experts].mean()
    return mean + habits.share_lasts * (habits.uses[key] - mean)
