"""Learn from layer to layer how far predictions can be trusted, and how long experts stay in use."""

import numpy as np

from ..cache.slots import SortedNeed
from ..core.jit import jit
from ..core.types import FloatArray, IntArray
from .types import FORMER_STEPS

#: Weight of the past in `learn_trust` and `learn_reuse`, per layer of a step: remembers about a hundred layers.
TRUST_DECAY = 0.99
#: Steps that the share of uses remembers, and for which it is believed.
USE_STEPS = 20.0


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
def learn_uses(
    shares: FloatArray,
    uses_LE: FloatArray,
    former_E: IntArray,
    slot_of: IntArray,
    moe_layer: int,
    experts: IntArray,
) -> None:
    """Keep the share of steps that use each expert, now that a layer needs experts (n,), and learn what it is worth:
    of experts that have no slot, and that the last steps did not use, how much likelier those with a larger share are
    used. (Among all experts the popular ones would decide, which have slots for good.)

    Args:
        shares: (3,) steps that the shares remember, and the decayed sums of the regression of a use on the share before
            it; changed. Its slope is 1 where experts differ for good, 0 where they differ by chance.
        uses_LE: decayed; the layer's are changed. `former_E`: as `learn_reuse` left it a step ago. `slot_of`: by key.
    """
    uses_E, first = uses_LE[moe_layer], moe_layer * uses_LE.shape[1]
    absent, count, mean = np.empty(len(uses_E) + 1, np.int64), 0, 0.0
    for expert in range(len(uses_E)):  # without branches, which nobody could foresee
        absent[count] = expert
        count += former_E[expert] == 0 and slot_of[first + expert] < 0
    for i in range(count):
        mean += uses_E[absent[i]]
    mean /= max(1, count)
    found, spread = TRUST_DECAY * shares[1], TRUST_DECAY * shares[2]
    for i in range(count):
        spread += (uses_E[absent[i]] - mean) ** 2
    for expert in experts:
        if former_E[expert] == 0 and slot_of[first + expert] < 0:
            found += uses_E[expert] - mean
    # Rounded as if the sums were decayed together.
    steps = TRUST_DECAY * shares[0] / TRUST_DECAY
    steps += (USE_STEPS - steps) / (USE_STEPS * len(uses_LE))
    shares[0], shares[1], shares[2] = steps, found, spread
    # Each of the first steps counts as much as the others: a mean of what there is.
    weight = 1.0 / max(1.0, steps)
    for expert in range(len(uses_E)):
        uses_E[expert] *= 1.0 - weight
    for expert in experts:
        uses_E[expert] += weight


@jit
def share_lasts(shares: FloatArray) -> float:
    """What a larger share of uses says of the steps to come: 1 all of it, 0 nothing; see `learn_uses`."""
    return min(1.0, max(0.0, shares[1] / max(shares[2], 1e-9)))


@jit
def learn_returns(returns: FloatArray, missed_E: IntArray, need: SortedNeed) -> None:
    """Find out how many of the experts that a layer missed in the last steps it needs now.

    Args:
        returns: (FORMER_STEPS + 1,) decayed sums: of those it missed 1, 2, ... steps ago, how many are needed; and how
            many it misses in a step.
        missed_E: bit m: missed m + 1 steps ago; changed.
    """
    returns *= TRUST_DECAY
    begin = need.num_hits + need.num_late
    returns[FORMER_STEPS] += len(need.experts) - begin
    for expert in need.experts:
        for m in range(FORMER_STEPS):
            returns[m] += missed_E[expert] >> m & 1
    for expert in range(len(missed_E)):
        missed_E[expert] = (missed_E[expert] << 1) & ((1 << FORMER_STEPS) - 1)
    for expert in need.experts[begin:]:
        missed_E[expert] |= 1


@jit
def misses_return(returns: FloatArray, reuse: FloatArray) -> float:
    """How much likelier a missed expert is needed again m steps later, for the best m, than one without a slot.

    A standard error less than found: the best of several shares is one that chance has favoured.
    """
    missed = max(1.0, returns[FORMER_STEPS])
    share = min(1.0, returns[:FORMER_STEPS].max() / missed)
    return share - np.sqrt(share * (1.0 - share) / missed) - reuse[1] / max(1.0, reuse[2])


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
