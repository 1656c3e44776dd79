"""The order in which a layer's experts are copied and computed; engine and simulator share it.

A layer whose experts fit is one round: copy what is missing, compute all. One that needs more experts than there are
slots, or misses many, is served in rounds, so that copies and compute overlap. Pure: the caller copies and computes.
"""

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

import numpy as np

from ..core.types import Reason
from .residency import NOTHING, ROUND_EXPERTS, IntArray, LayerNeed, ResidencyTable

#: When a layer needed at least this share of its experts, as a long prompt's do, the next one will too: its first
#: experts are copied ahead, so that the link does not wait for its router.
STREAM_SHARE = 0.95
#: How many: two rounds, which keep the link busy for longer than the layers around the experts take.
STREAM_EXPERTS = 2 * ROUND_EXPERTS


class What(Enum):
    """What is to be done with an act's experts."""

    COPY = "copy"
    COMPUTE = "compute"


class Act(NamedTuple):
    """One step of the walk."""

    what: What
    moe_layer: int
    experts: IntArray  # (n,)
    slots: IntArray  # (n,)
    reason: Reason = Reason.ON_DEMAND  # of copies


def next_is_sure(need: LayerNeed, num_experts: int) -> bool:
    """Whether a prompt's layer needed so many of its experts that any expert of the next layer will be needed too."""
    return len(need.experts) >= STREAM_SHARE * num_experts


def walk(
    table: ResidencyTable,
    need: LayerNeed,
    rounds: list[IntArray],
    following: tuple[int, int] | None = None,
    keep: IntArray = NOTHING,
) -> Iterator[Act]:
    """Copies and computations of one layer, in order; slots are taken and protected as it goes.

    Before a COMPUTE, the caller waits for the bytes of its slots and tells the table that they have landed. All of the
    first round's copies come before the first COMPUTE.

    Args:
        need: of the layer, without what goes to the CPU. `rounds`: as `ResidencyTable.rounds` gives.
        following: the next MoE layer and its number of experts, if some of them are to be
            streamed ahead.
        keep: keys that are evicted last.
    """
    layer = need.moe_layer
    if need.num_misses:
        found = need.experts[: need.num_hits + need.num_late]
        table.protect(table.slots_for(layer, found))
        yield from _copy(table, layer, rounds[0], keep)
    for i, experts in enumerate(rounds):
        after = rounds[i + 1] if i + 1 < len(rounds) else None
        if after is None and following is not None:
            yield from _stream_ahead(table, layer, experts, *following)
        slots = table.slots_for(layer, experts)
        # The next round's copies are issued before this round is computed wherever there is room for both.
        early = after is not None and table.can_take(len(after))
        if after is not None and early:
            yield from _copy(table, layer, after, keep)
        yield Act(What.COMPUTE, layer, experts, slots)
        if len(rounds) > 1:
            table.unprotect(slots)
        if after is not None and not early:
            yield from _copy(table, layer, after, keep)
    if need.num_misses:
        table.unprotect()


def _copy(table: ResidencyTable, layer: int, experts: IntArray, keep: IntArray) -> Iterator[Act]:
    """Copy those of a round's experts that have no slot yet; all of the round's slots are protected then."""
    missing = experts[table.slots_for(layer, experts) < 0]
    if len(missing):
        slots = table.take(layer, missing, keep)
        table.protect(slots)
        yield Act(What.COPY, layer, missing, slots)


def _stream_ahead(
    table: ResidencyTable, layer: int, experts: IntArray, following: int, num_experts: int
) -> Iterator[Act]:
    """Copy experts of the next layer after this layer's own; it is almost certain to need them.

    Args:
        experts: of this layer's last round, which are still to be computed.
    """
    row = table.row(following)[:num_experts]
    missing, resident = np.flatnonzero(row < 0), row[row >= 0]
    count = min(len(missing), STREAM_EXPERTS, table.num_slots // 4)
    # Needed now (a layer that missed nothing has not protected them), or next, however long ago they were used.
    wanted = np.concatenate([table.slots_for(layer, experts), resident])
    free = wanted[~table.is_protected(wanted)]
    table.protect(free)
    if count and table.can_take(count):
        slots = table.take(following, missing[:count], ahead=True)
        yield Act(What.COPY, following, missing[:count], slots, Reason.STREAM)
    table.unprotect(free)
