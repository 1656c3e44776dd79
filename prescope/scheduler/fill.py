"""What a copy is worth that nobody waits for: for link time that the window has no use for.

A copy's worth is the CPU's time that its expert would take, as often as it is expected to be used while it stays; its
price is the CPU's time that it costs, since both read the same memory. Pure; times are microseconds.
"""

from typing import NamedTuple

import numpy as np

from ..cache.slots import Slots
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
    keys: IntArray, each_us: float, price: float, victims: IntArray, habits: KnownUses, slots: Slots
) -> IntArray:
    """Of experts (n,) without a slot that the CPU computes, those that are worth a copy, the best first.

    The i-th best must be better than the i-th of those that give up their slots, by the cache's scores, and such swaps
    must have been worth more uses than a copy costs. Free slots are filled.

    Args:
        each_us: what the CPU takes for one of them. `price`: see `price_us`.
        victims: (m,) slots that would be given up, in this order: room for as many copies.
        habits: swaps that were looked at are taken down, for `learn.learn_swaps`.
    """
    if len(keys) == 0 or len(victims) == 0:
        return keys[:0]
    order = np.argsort(-slots.scores[keys], kind="mergesort")
    credit, copied, key_of, scores, count = habits.credit, habits.copied, slots.key_of, slots.scores, 0
    while count < min(len(keys), len(victims)):
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


@jit
def watch_demand(keys: IntArray, victims: IntArray, habits: KnownUses, slots: Slots) -> None:
    """Take down the swap that a layer's next copy on demand would have been, for `learn.learn_swaps`: of the experts
    without a slot (n,) that the CPU computes the one that is used most, for the one that gives up its slot next.

    The last copy that is made, or the first that is not, is what the window decides about. All on-demand copies of a
    large batch together have been worth more than that: they push out each other.

    Args:
        victims: (m,) slots that would be given up, in this order.
    """
    if len(keys) > 0 and len(victims) > 0 and slots.key_of[victims[0]] >= 0:
        habits.swaps[0] += 1.0
        habits.credit[keys[0]] += 1.0
        habits.credit[slots.key_of[victims[0]]] -= 1.0
