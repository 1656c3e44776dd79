"""Learn from layer to layer how far predictions can be trusted, and how long experts stay in use."""

import numpy as np

from ..core.jit import jit
from ..core.types import FloatArray, IntArray
from .types import FORMER_STEPS

#: Weight of the past in `learn_trust` and `learn_reuse`, per layer of a step: remembers about a hundred layers.
TRUST_DECAY = 0.99
#: Steps in which a copy's uses are counted: what text uses changes. And steps in which what they were is remembered:
#: some such lives; with 100 two more of 3240 cells are lost (docs/log/scheduler.md).
USE_STEPS, SWAP_STEPS = 20.0, 400.0


@jit
def learn_trust(
    trust: FloatArray,
    moe_layer: int,
    counts_E: IntArray,
    predicted_dLE: FloatArray,
    threshold: float,
) -> None:
    """Compare what was predicted for a layer with what it used.

    Of each prediction the likeliest experts count, those at least half as likely as the first: they are prefetched
    first. Over all experts even an inverted order is right on average, and that cost 24 %.

    Args:
        trust: (d, 2) decayed sums of the probabilities given to the likeliest experts, and of how many were used.
        counts_E: tokens of each expert. `predicted_dLE`: the last probability of use, by lookahead; the layer's are
            forgotten, so that none counts twice where the next ones come too late.
    """
    for ahead in range(min(len(trust), moe_layer)):
        row, most = predicted_dLE[ahead, moe_layer], 0.0
        for expert in range(len(row)):
            most = max(most, row[expert])
        if most <= 0.0:
            continue
        least = max(threshold, 0.5 * most)
        expected, found = 0.0, 0.0
        for expert in range(len(counts_E)):
            if row[expert] >= least:
                expected += row[expert]
                found += 1.0 if counts_E[expert] > 0 else 0.0
        trust[ahead, 0] = TRUST_DECAY * trust[ahead, 0] + expected
        trust[ahead, 1] = TRUST_DECAY * trust[ahead, 1] + found
        row[:] = 0.0


@jit
def learn_reuse(
    reuse: FloatArray, former_E: IntArray, experts: IntArray, num_misses: int, num_absent: int
) -> None:
    """Compare what a layer needs, experts (n,), with what it needed in the steps before.

    Args:
        reuse: (FORMER_STEPS + 4,) decayed sums of experts: needed, missing, absent, there, and of those needed, by how
            many steps ago, in which they were needed too.
        former_E: bit m: needed m + 1 steps ago; changed.
        num_misses: of `experts`. `num_absent`: of the layer's experts, those that have no slot.
    """
    reuse *= TRUST_DECAY
    reuse[0] += len(experts)
    reuse[1] += num_misses
    reuse[2] += num_absent
    reuse[3] += len(former_E) - num_absent
    for expert in experts:
        for m in range(FORMER_STEPS):
            reuse[4 + m] += former_E[expert] >> m & 1
    for expert in range(len(former_E)):
        former_E[expert] = (former_E[expert] << 1) & ((1 << FORMER_STEPS) - 1)
    for expert in experts:
        former_E[expert] |= 1


@jit
def learn_swaps(
    swaps: FloatArray,
    credit_E: FloatArray,
    copied_E: IntArray,
    slot_E: IntArray,
    num_layers: int,
    experts: IntArray,
) -> None:
    """Learn from a layer's experts (n,) what swaps have been worth that `fill.worth_a_copy` and `fill.watch_demand`
    have looked at: an expert without a slot for one in a slot. Their later uses are counted, of the one for the swap
    and of the other against it, be it made or not. Any estimate of how often experts are used is wrong in favour of
    the best of many; what came behind is not.

    Args:
        swaps: (5,) decayed sums: swaps looked at, uses gained by them, the variance of these (as if uses came by
            chance), and how often a copied expert was looked for and was gone.
        credit_E: what a use of each of the layer's experts counts; it ends as copies lose their slots, and within
            `USE_STEPS` in any case. `copied_E`: 1 of those copied, for reuse or on demand, until they are gone. Both
            are changed.
        slot_E: slots of the layer's experts, -1 for none.
    """
    for expert in range(len(copied_E)):  # without branches, which nobody could foresee
        is_gone = copied_E[expert] * (slot_E[expert] < 0)
        swaps[3] += copied_E[expert]
        swaps[4] += is_gone
        copied_E[expert] -= is_gone
    for expert in experts:
        swaps[1] += credit_E[expert]
        swaps[2] += credit_E[expert] ** 2
    credit_E *= (1.0 - 1.0 / USE_STEPS) * (1.0 - swaps[4] / (1.0 + swaps[3]))
    swaps *= 1.0 - 1.0 / (SWAP_STEPS * num_layers)


@jit
def gain_of_swap(swaps: FloatArray) -> float:
    """Uses that a swap gains, below 0 loses, a standard error less of either than found: 0 until something is known.
    See `learn_swaps`.
    """
    error = np.sqrt(swaps[2])
    return (max(0.0, swaps[1] - error) + min(0.0, swaps[1] + error)) / max(1.0, swaps[0])


@jit
def reuse_lasts(reuse: FloatArray) -> float:
    """How much likelier an expert is needed again m steps after a use, for the best m, than an expert without a slot.

    If experts in slots are needed less than those without (the slots hold experts of older text), it is compared with
    those instead. Near 0 in a large batch. `reuse`: see `learn_reuse`.
    """
    absent = reuse[1] / max(1.0, reuse[2])
    there = (reuse[0] - reuse[1]) / max(1.0, reuse[3])
    return reuse[4:].max() / max(1.0, reuse[0]) - min(absent, there)


@jit
def discount(trust: FloatArray, ahead: int) -> float:
    """Factor for probabilities given `ahead` layers before the use (1: the next layer); 1 until something is known."""
    expected, found = trust[ahead - 1]
    return 1.0 if expected <= 0.0 else min(1.0, found / expected)
