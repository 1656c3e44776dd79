"""What a copy is worth that nobody waits for: for link time that the window has no use for.

A copy's worth is the CPU's time that its expert would take, as often as it is expected to be used while it stays; its
price is the CPU's time that it costs, since both read the same memory. Pure; times are microseconds.
"""

from typing import NamedTuple

import numpy as np

from ..cache.slots import Slots, slots_to_give
from ..core.jit import jit
from ..core.types import FloatArray, IntArray
from .types import Costs, cpu_time


class KnownUses(NamedTuple):
    """What is known of experts besides predictions. The arrays are those of `types.Memory`, by key."""

    lasting: float  # see `learn.reuse_lasts`
    gain: float  # uses, see `learn.gain_of_swap`
    swaps: FloatArray
    credit: FloatArray
    copied: IntArray


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
    keys: IntArray, each_us: float, price: float, most: int, habits: KnownUses, slots: Slots
) -> IntArray:
    """Of experts (n,) without a slot that the CPU computes, at most `most` that are worth a copy, the best first.

    The i-th best must be better than the i-th least of those in slots, by the cache's scores, and such swaps must have
    been worth more uses than a copy costs. Free slots are filled.

    Args:
        each_us: what the CPU takes for one of them. `price`: see `price_us`.
        habits: swaps that were looked at are taken down, for `learn.learn_swaps`.
    """
    most = min(most, len(keys))
    if most <= 0:
        return keys[:0]
    victims = slots_to_give(most, slots.in_flight, keys[:0], slots)
    order = np.argsort(-slots.scores[keys], kind="mergesort")
    credit, copied, key_of, scores, count = habits.credit, habits.copied, slots.key_of, slots.scores, 0
    while count < len(victims):
        key, victim = keys[order[count]], key_of[victims[count]]
        if victim >= 0:
            if scores[key] <= scores[victim]:
                break
            habits.swaps[0] += 1.0
            credit[key] += 1.0
            credit[victim] -= 1.0
            if each_us * habits.gain <= price:
                break
            copied[key] = 1
        count += 1
    return keys[order[:count]]
